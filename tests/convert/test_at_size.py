"""The round trip of a model that exceeds the memory of a process: 1.1 GB over four processes of less than 1 GB."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_fdd.convert.checksums import Checksums
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.hf_writer import TensorSpec, plan_shards, write_index, write_shard
from megatron_fdd.convert.mcore_model import build_model, complete_args
from megatron_fdd.convert.ranks import conversion_ranks
from tests.convert import toys
from tests.harness.ranks import Layout, run_on_ranks

pytestmark = pytest.mark.tier("all")

ROOT = Path(__file__).parents[2]
RANKS = 4
GIGABYTE = 10**9
# The model has 1.1 GB in bfloat16. A quarter of it, together with Python and its modules (0.55 GB), is less than 1 GB.
SHAPE = {
    "vocab_size": 16001,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 11,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
}


def _specs(config: dict) -> list[TensorSpec]:
    """List the tensors of a model with this config, from the table that converts it."""
    family = family_of(config)
    args = {**family.fixed, **family.megatron_args(config)}
    with conversion_ranks() as groups:
        model = build_model(
            complete_args(args, dtype=torch.bfloat16, vocabulary_divisor=1), groups, device="meta"
        )
    parameters = dict(model.named_parameters())
    return [
        TensorSpec(name, part.dtype, tuple(part.shape))
        for row in family.rows(config)
        for name, part in zip(row.sources, row.transform.split(parameters[row.mcore]), strict=True)
    ]


def _make(folder: Path) -> int:
    """Write a model folder of random bits, all finite, tensor by tensor; return its size in bytes."""
    config = toys.llama_config("bfloat16", **SHAPE)
    folder.mkdir()
    toys.write_json(folder / "config.json", config)
    toys.make_tokenizer(folder)
    shards = plan_shards(_specs(config), 400 * 10**6)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randint(-(2**15), 2**15, (2**26,), dtype=torch.int16, generator=generator)
    noise &= ~0x80  # a bit of bfloat16's exponent: with all of them a number is infinite or none
    for shard in shards:
        tensors = (
            noise[index : index + spec.num_bytes // 2].view(torch.bfloat16).reshape(spec.shape)
            for index, spec in enumerate(shard.tensors)
        )
        for _ in write_shard(folder, shard, tensors):
            pass
    write_index(folder, shards)
    return sum(shard.num_bytes for shard in shards)


def _run(tool: str, *arguments: str | Path) -> str:
    """Run the tool on four ranks and return its last line. Every rank must stay below the limit."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    command += [str(ROOT / "tests" / "convert" / "measured_tool.py"), str(ROOT / "tools" / tool)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    peaks = [int(peak) for peak in re.findall(r"peak of rank \d: (\d+) bytes", run.stderr)]
    assert len(peaks) == RANKS
    assert max(peaks) < GIGABYTE, peaks
    return run.stdout.splitlines()[-1]


def _kill_an_export(load: Path, out: Path) -> None:
    """Send SIGKILL to an export while it writes, and check that only a hidden folder is left."""
    command = [
        sys.executable,
        str(ROOT / "tools" / "mcore_to_hf.py"),
        "--load",
        str(load),
        "--hf-out",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    hidden = out.with_name(f".{out.name}.incomplete")
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        while process.poll() is None and not any(hidden.glob("*.safetensors")):
            time.sleep(0.01)
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not out.exists()
    assert hidden.is_dir()
    assert not (hidden / "config.json").exists()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder and remove it at the end: it is large, and pytest keeps the folders of three sessions."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
def test_more_on_four_ranks_than_one_may_hold(folder: Path) -> None:
    source, saved, back = folder / "source", folder / "mcore", folder / "back"
    (size,) = run_on_ranks(_make, Layout(ranks=1), {"folder": source})
    assert size > 1.1 * GIGABYTE
    _run("hf_to_mcore.py", "--hf-model", source, "--save", saved)
    parts = [path.stat().st_size for path in (saved / "release").glob("*.distcp")]
    assert len(parts) == RANKS
    assert max(parts) < 0.3 * size
    shutil.rmtree(source)
    _kill_an_export(saved, back)
    line = _run("mcore_to_hf.py", "--load", saved, "--hf-out", back, "--max-shard-size", "250MB")
    written = Checksums.read(back)
    assert written is not None
    assert line.endswith(f"; {len(written.digests)} are bit for bit those imported")
    assert written == Checksums.read(saved / "hf")
    shards = [path.stat().st_size for path in back.glob("model-*.safetensors")]
    assert sum(shards) > size
    assert max(shards) < 251 * 10**6
    assert not list(folder.glob(".*"))
