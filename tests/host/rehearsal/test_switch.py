"""When a rehearsal is wanted, and that starting it twice is harmless and makes `cuda` mean `cpu`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_fdd.host import rehearsal
from megatron_fdd.host.rehearsal import device, gloo


@pytest.mark.parametrize(
    ("gpu", "asked", "wanted"),
    [
        (False, None, True),
        (False, "0", False),
        (False, "1", True),
        (True, None, False),
        (True, "0", False),
        (True, "1", True),
    ],
)
def test_never_wanted_beside_a_gpu_unless_asked(
    gpu: bool, asked: str | None, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("FDD_REHEARSE", raising=False)
    if asked is not None:
        monkeypatch.setenv("FDD_REHEARSE", asked)
    assert rehearsal.is_wanted() is wanted


def test_a_started_rehearsal_stays_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FDD_REHEARSE", raising=False)
    rehearsal.start()
    assert torch.cuda.is_available()
    assert rehearsal.is_wanted()


def test_an_unclear_wish_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDD_REHEARSE", "yes")
    with pytest.raises(ValueError, match="FDD_REHEARSE='yes': set 1"):
        rehearsal.is_wanted()


def test_starting_twice_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rehearsal.start()
    before = (torch.cuda.current_stream, torch.cuda.is_available, torch.zeros, torch.Tensor.to)
    capsys.readouterr()
    rehearsal.start()
    after = (torch.cuda.current_stream, torch.cuda.is_available, torch.zeros, torch.Tensor.to)
    assert before == after
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("cuda", ["cuda", "cuda:3", torch.device("cuda"), torch.device("cuda", 1), 0])
def test_tensors_asked_for_on_cuda_are_on_the_cpu(cuda: str | torch.device | int) -> None:
    rehearsal.start()
    host = torch.ones(2)
    tensors = [torch.zeros(2, device=cuda), host.to(cuda), host.to(device=cuda, dtype=torch.bfloat16)]
    tensors += [
        host.cuda(),
        host.pin_memory(),
        torch.empty(2, pin_memory=True),
        host.new_zeros(2, device=cuda),
    ]
    tensors += [next(torch.nn.Linear(2, 2).cuda().parameters()), torch.zeros_like(host, device=cuda)]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}
    assert host.to(cuda) is host


def test_every_function_that_takes_a_device_is_redirected() -> None:
    """The functions come from torch's own list of operators, without those that make no tensor on the device."""
    rehearsal.start()
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")]
    taking = {each.name[6:] for each in schemas if any(given.name == "device" for given in each.arguments)}
    names = {name for name in taking if not name.startswith("_")} - {"Generator", "is_pinned"}
    owned = [(owner, name) for name in names for owner in (torch, torch.Tensor) if hasattr(owner, name)]
    assert len(owned) > 40
    replaced = [name for owner, name in owned if getattr(owner, name).__module__ == device.__name__]
    wrapped = [name for owner, name in owned if hasattr(getattr(owner, name), "__wrapped__")]
    assert {name for _, name in owned} - {*replaced, *wrapped} == set()
    assert torch.normal(0.0, 1.0, (2,), device="cuda").device.type == "cpu"


@pytest.mark.tier("default")
def test_functions_are_redirected_after_another_library_had_replaced_them() -> None:
    """torch may make its list of constructors while they are replaced, and keeps it."""
    script = (
        "import torch\nmine = torch.linspace\ntorch.linspace = lambda *args: mine(*args)\n"
        "with torch.device('meta'): assert torch.ones(1).is_meta\n"
        "torch.linspace = mine\n"
        "from megatron_fdd.host import rehearsal\nrehearsal.start()\n"
        "assert torch.linspace(0, 1, 3, device='cuda').device.type == 'cpu'\n"
        "with torch.device('meta'): assert torch.ones(1).is_meta\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "Float"), (torch.bfloat16, "BFloat16")])
def test_tensors_bear_the_names_that_megatrons_optimizers_look_for(dtype: torch.dtype, name: str) -> None:
    rehearsal.start()
    assert torch.zeros(2, dtype=dtype).type() == f"torch.cuda.{name}Tensor"
    assert torch.zeros(2).type(dtype).dtype == dtype


def test_one_generator_serves_cuda_and_cpu() -> None:
    rehearsal.start()
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)
    torch.cuda.manual_seed(5)
    assert torch.initial_seed() == 5


@pytest.mark.parametrize("policy", [os.SCHED_OTHER, os.SCHED_IDLE])
def test_threads_are_batch_work_unless_a_policy_was_chosen(
    policy: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(os, "sched_getscheduler", lambda _process: policy)
    monkeypatch.setattr(os, "sched_setscheduler", lambda _process, policy, _parameters: chosen.append(policy))
    gloo.install_gloo()
    assert chosen == ([os.SCHED_BATCH] if policy == os.SCHED_OTHER else [])


def test_a_scheduler_that_may_not_be_chosen_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getscheduler", mock.Mock(side_effect=PermissionError))
    gloo.install_gloo()
    monkeypatch.delattr(os, "sched_getscheduler")
    gloo.install_gloo()


@pytest.mark.tier("default")
def test_packages_that_need_a_gpu_are_as_if_not_installed(tmp_path: Path) -> None:
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise OSError('needs a GPU')")
    script = (
        "from megatron_fdd.host import rehearsal\nrehearsal.start()\n"
        "from megatron.core.optimizer import clip_grads\n"
        "from megatron.core.utils import local_multi_tensor_applier\n"
        "assert clip_grads.multi_tensor_applier is local_multi_tensor_applier\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | {"PYTHONPATH": path})


@pytest.mark.tier("default")
def test_no_compiler_is_imported() -> None:
    script = (
        "import sys\nfrom megatron_fdd.host import rehearsal\nrehearsal.start()\nimport torch, megatron.core\n"
        "assert not {'torch._dynamo', 'torch._inductor'} & set(sys.modules)\n"
        "assert torch.compile(len)([1]) == torch.compile(dynamic=True)(len)([1]) == 1\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


@pytest.mark.tier("default")
def test_it_may_start_after_megatron_was_imported_and_says_nothing() -> None:
    script = (
        "import os, megatron.core.fusions.fused_bias_swiglu as late\n"
        "from megatron_fdd.host import rehearsal\n"
        "import torch\n"
        "rehearsal.start()\n"
        "rehearsal.start()\n"
        "assert late.swiglu(torch.ones(2, 4)).shape == (2, 2)\n"
        "assert os.environ['OMP_NUM_THREADS'] == os.environ['CUDA_DEVICE_MAX_CONNECTIONS'] == '1'\n"
    )
    unset = ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "TORCHDYNAMO_DISABLE", "RANK")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == ""
