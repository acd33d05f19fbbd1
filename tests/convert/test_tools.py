"""Import and export as a user runs them, and what they refuse."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from megatron_fdd import convert
from megatron_fdd.host.checkpoint import TRACKER_FILE
from megatron_fdd.host.file_sums import SUMS_FILE
from megatron_fdd.host.unpickling import trust_checkpoints
from tests.convert import mcore, toys
from tests.harness import forked_python
from tests.harness.ranks import distributed
from tests.hostile.checkpoints import UNLISTED, untrusting

TOOLS = Path(__file__).parents[2] / "tools"


def _run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [forked_python.python(), str(TOOLS / tool), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


@pytest.mark.tier("default")
def test_there_and_back(tmp_path: Path) -> None:
    source = toys.make_llama(tmp_path / "source")
    saved, back = tmp_path / "mcore", tmp_path / "back"
    there = _run("hf_to_mcore.py", "--hf-model", source, "--save", saved)
    assert there.returncode == 0, there.stderr
    assert there.stdout.splitlines()[-1].endswith(
        f"a student: --pretrained-checkpoint {saved}, a teacher: --teacher-load {saved}"
    )
    again = _run("mcore_to_hf.py", "--load", saved, "--hf-out", back, "--max-shard-size", "50KB")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == (
        f"{back}: 30 tensors of {saved}, ready for from_pretrained; 30 are bit for bit those imported"
    )
    assert toys.tensor_hashes(back) == toys.tensor_hashes(source)


@distributed(tp=1)
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    source, load = toys.make_llama(tmp_path / "source"), tmp_path / "mcore"
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    for name, value in zip(names, (float("nan"), -float("inf")), strict=True):
        weights = load_file(source / "model.safetensors")
        spoilt = {**weights, name: weights[name].clone()}
        spoilt[name].view(-1)[3] = value
        save_file(spoilt, source / "model.safetensors")
        told = rf"{name}: 1 of {spoilt[name].numel()} values are not finite"
        with pytest.raises(ValueError, match=f"{source}: .*{told.removeprefix('model')}"):
            convert.hf_to_mcore(source, load)
        with pytest.raises(ValueError, match=told):
            convert.init_student(source, [0, 1], tmp_path / "student")
        with mock.patch("megatron_fdd.convert.hf_source.check_finite"):
            convert.hf_to_mcore(source, load)
        with pytest.raises(ValueError, match=told):
            convert.mcore_to_hf(load, tmp_path / "out")
        shutil.rmtree(load)
        save_file(weights, source / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@distributed(tp=1)
def test_values_too_large_for_a_dtype_are_refused(tmp_path: Path) -> None:
    source = toys.make_llama(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = 70000.0
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight: 1 of .* not finite .*float16 is too narrow"):
        convert.hf_to_mcore(source, tmp_path / "mcore", dtype="float16")
    convert.hf_to_mcore(source, tmp_path / "mcore")
    with pytest.raises(ValueError, match="model.norm.weight: 1 of .* not finite .*a wider --dtype"):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "out", dtype="float16")


def _exports(load: Path, out: Path, message: str, **options: str | Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert.mcore_to_hf(load, out, **options)
    assert not out.exists()


@distributed(tp=1)
def test_an_unlisted_class_is_exported_where_it_is_trusted(tmp_path: Path) -> None:
    """The class is in `common.pt`, for which Megatron asks torch for no kind of unpickling."""
    mcore.make_checkpoint(tmp_path, "plain")
    release = tmp_path / "mcore" / "release"
    state = dist_checkpointing.load_common_state_dict(str(release))
    torch.save({**state, "of_a_fork": UNLISTED}, release / "common.pt")
    (release / SUMS_FILE).unlink(missing_ok=True)
    told = r"common\.pt names the class fractions\.Fraction, .* give --fdd-trust-checkpoint$"
    with untrusting():
        _exports(tmp_path / "mcore", tmp_path / "out", told)
        trust_checkpoints()
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "out")


@distributed(tp=1)
def test_what_cannot_be_exported(tmp_path: Path) -> None:
    mcore.make_checkpoint(tmp_path, "plain")
    load, out, source = tmp_path / "mcore", tmp_path / "out", tmp_path / "source"
    _exports(tmp_path / "nowhere", out, f"the folder does not exist .no {TRACKER_FILE}")
    _exports(source / "config.json", out, f"a file, not a folder .no {TRACKER_FILE}")
    _exports(load, out, "5GB", max_shard_size="huge")
    _exports(load, out, "--hf-config .*no such file", hf_config=tmp_path / "nowhere")
    _exports(load, out, "--tokenizer .*not a folder with a tokenizer", tokenizer=tmp_path)
    toys.write_json(tmp_path / "wide.json", toys.llama_config(vocab_size=129))
    _without_vocab_size(load, tmp_path / "other")
    _exports(tmp_path / "other", out, "pass --hf-config")
    _exports(tmp_path / "other", out, "pass --tokenizer", hf_config=source)
    options = {"hf_config": tmp_path / "wide.json", "tokenizer": source}
    _exports(tmp_path / "other", out, "128 vocabulary rows, fewer than the vocab_size 129", **options)
    data = next((load / "release").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    _exports(load, out, "--load .*truncated")
    (load / TRACKER_FILE).write_text("12")
    _exports(load, out, "iter_0000012: .metadata is missing")


def _without_vocab_size(load: Path, save: Path) -> None:
    """Save the same weights as a run does that knows only the padded size of the vocabulary."""
    model, args = mcore.from_own_args(load)
    args.vocab_size = args.tokenizer_model = None
    mcore.save(save, model, args)


@distributed(tp=1)
def test_a_model_that_is_no_llama(tmp_path: Path) -> None:
    mcore.make_checkpoint(tmp_path, "attention_bias")
    load, out = tmp_path / "mcore", tmp_path / "out"
    model, args = mcore.from_own_args(load)
    args.qk_layernorm, args.softmax_type = True, "off-by-one"
    mcore.save(tmp_path / "other", model, args)
    told = r"qk_layernorm = True \(needs False\), softmax_type"
    _exports(tmp_path / "other", out, told, hf_config=load / "hf", tokenizer=load / "tokenizer")
    model, args = mcore.from_own_args(load)
    model.decoder.layers[1].mlp.linear_fc2.bias.data.fill_(0.5)
    mcore.save(tmp_path / "trained", model, args)
    given = {"hf_config": load / "hf", "tokenizer": load / "tokenizer"}
    _exports(tmp_path / "trained", out, r"layers.1.mlp.linear_fc2.bias, which are not zero", **given)
    args.num_layers = 4
    mcore.save(tmp_path / "deeper", model, args)
    _exports(
        tmp_path / "deeper",
        out,
        r"deeper.*layer_norm_weight has the shape \[3, 48\], and \[4, 48\] in the model",
        **given,
    )


@distributed(tp=1)
def test_a_checkpoint_of_two_dtypes(tmp_path: Path) -> None:
    """A float32 norm among bfloat16 weights is not rounded unless the user asks for it."""
    mcore.make_checkpoint(tmp_path, "bfloat16")
    model, args = mcore.from_own_args(tmp_path / "mcore")
    norm = model.decoder.final_layernorm.weight
    norm.data = norm.data.float() + 1e-4
    mcore.save(tmp_path / "mixed", model, args)
    given = {"hf_config": tmp_path / "source", "tokenizer": tmp_path / "source"}
    _exports(tmp_path / "mixed", tmp_path / "out", r"mixes dtypes .*final_layernorm.weight.*--dtype", **given)
    exported = convert.mcore_to_hf(tmp_path / "mixed", tmp_path / "out", dtype="float32", **given)
    assert exported.unchanged is None
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"], norm)
