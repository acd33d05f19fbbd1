"""The speed of an import and an export against `cp` and `sync` of the same bytes, in turns.

    python -m benchmarks.conversion --folder /scratch            # four models of 2 GB, three turns each way
    python -m benchmarks.conversion --folder /scratch --model dense --turns 5

A model has published widths and random bits. A turn is a conversion in a new process, and a copy of what it wrote.
Start-up ends with the first tensor that is read. The rate is that of the bytes written, from there to the end of the
process; the copy writes as many. Wall times are those of the disk and of whoever else uses the machine: read the
medians, and the CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from torch import Tensor

from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.family import slice_name, whole_name
from megatron_fdd.convert.hf_writer import TensorSpec, plan_shards, write_index, write_shard
from megatron_fdd.convert.mcore_model import build_model, complete_args, stored_tensors
from megatron_fdd.convert.quantised import FIELD
from megatron_fdd.convert.ranks import conversion_ranks

COMMON = {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
DENSE = {
    **COMMON,
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 14,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
}
EXPERTS = {
    **COMMON,
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
}
FP8 = {
    **DENSE,
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 5120,
    "intermediate_size": 17408,
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
    "head_dim": 128,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
}
MXFP4 = {
    **COMMON,
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "sliding_window": 128,
    "layer_types": ["sliding_attention"],
    "attention_bias": True,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "rope_theta": 150000.0,
    "quantization_config": {"quant_method": "mxfp4"},
}
MODELS = {"dense": DENSE, "experts": EXPERTS, "fp8": FP8, "mxfp4": MXFP4}


@dataclass(frozen=True, slots=True)
class Turn:
    """One conversion, and the copy after it.

    Attributes:
        start_s: from the start of the process to the first tensor.
        rest_s: from there to its end.
        cpu_s: processor seconds of the whole process.
        peak_mb: the most memory that it had; mapped files are in it.
        copy_s: of `cp` and `sync` of what it wrote.
        num_bytes: how many bytes those are.
    """

    start_s: float
    rest_s: float
    cpu_s: float
    peak_mb: float
    copy_s: float
    num_bytes: int


def stored_specs(config: dict[str, Any]) -> Iterator[TensorSpec]:
    """Yield the tensors of a model's folder, from the table that converts it."""
    method = config.get(FIELD, {}).get("quant_method")
    config = {name: value for name, value in config.items() if name != FIELD}
    family = family_of(config)
    with conversion_ranks() as groups:
        args = {**family.fixed, **family.megatron_args(config)}
        model = build_model(complete_args(args, dtype=torch.bfloat16, vocabulary_divisor=1), groups, "meta")
    rows = family.rows(config)
    parameters = stored_tensors(model, rows)
    specs = [
        TensorSpec(name, row.dtype or torch.bfloat16, tuple(part.shape))
        for row in rows
        for name, part in zip(row.sources, row.transform.split(parameters[row.mcore]), strict=True)
    ]
    for name, group in groupby(specs, lambda spec: whole_name(spec.name)):
        whole = list(group)
        is_matrix = ".layers." in name and len(whole[0].shape) == 2
        if method == "fp8" and is_matrix:
            yield from _fp8(whole[0])
        elif method == "mxfp4" and is_matrix and whole[0].name != name:
            yield from _mxfp4(name, whole)
        else:
            yield from whole


def _fp8(spec: TensorSpec) -> Iterator[TensorSpec]:
    yield TensorSpec(spec.name, torch.float8_e4m3fn, spec.shape)
    yield TensorSpec(f"{spec.name}_scale_inv", torch.float32, tuple(-(-size // 128) for size in spec.shape))


def _mxfp4(name: str, slices: list[TensorSpec]) -> Iterator[TensorSpec]:
    inputs, rows = slices[0].shape
    for ending, shape in (("_blocks", (rows, inputs // 32, 16)), ("_scales", (rows, inputs // 32))):
        for index in range(len(slices)):
            yield TensorSpec(slice_name(name + ending, index), torch.uint8, shape)


def make_model(folder: Path, config: dict[str, Any]) -> None:
    """Write a model folder of random bits, all of them finite numbers, with a tokenizer."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.save(str(folder / "tokenizer.json"))  # an import loads it
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    shards = plan_shards(stored_specs(config), 10**9)
    noise = torch.randint(0, 256, (2**29 + 2**27,), dtype=torch.uint8)
    noise[1::2] &= 0xBF  # bfloat16 and float32 are below 2
    for shard in shards:
        tensors = (_bits(spec, noise[64 * index :]) for index, spec in enumerate(shard.tensors))
        for _ in write_shard(folder, shard, tensors):
            pass
    write_index(folder, shards)


def _bits(spec: TensorSpec, noise: Tensor) -> Tensor:
    raw = noise[: spec.num_bytes]
    if spec.dtype == torch.float8_e4m3fn:
        raw = raw & 0x7E  # all ones are no number
    elif spec.name.endswith("_scale_inv"):
        raw = raw.view(torch.int32) & 0x7FFFFF | 0x38800000  # 2^-14 to 2^-13
    elif whole_name(spec.name).endswith("_scales"):
        raw = raw // 64 + 121
    return raw.view(spec.dtype).reshape(spec.shape)


def converted(command: list[str], written: Path) -> Turn:
    """Run a conversion in a new process, and copy what it wrote."""
    reader, writer = os.pipe()
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(writer), *command], pass_fds=[writer], stdout=subprocess.DEVNULL
    )
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        pipe.read(1)
        first = time.perf_counter()
    _, status, used = os.wait4(process.pid, 0)
    ended = time.perf_counter()
    if status != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {status}")
    num_bytes = sum(path.stat().st_size for path in written.rglob("*") if path.is_file())
    peak_mb, cpu_s = used.ru_maxrss * 1024 / 1e6, used.ru_utime + used.ru_stime
    return Turn(first - started, ended - first, cpu_s, peak_mb, copied(written), num_bytes)


# `fdd`, with a byte into a pipe at the first access to weights: a map of a tensor, or an open file of a checkpoint.
_CHILD = """
import os, sys
pipe = int(sys.argv.pop(1))
told = []
def hook(event, args):
    if not told and (event == "mmap.__new__" or event == "open" and str(args[0]).endswith(".distcp")):
        told.append(os.write(pipe, b"1"))
sys.addaudithook(hook)
from megatron_fdd.cli import run
run()
"""


def copied(folder: Path) -> float:
    """Return the seconds of `cp` and `sync` of a folder."""
    copy = folder.with_name(f"{folder.name}-copy")
    os.sync()
    started = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    os.sync()
    seconds = time.perf_counter() - started
    shutil.rmtree(copy)
    return seconds


def told(name: str, turns: Sequence[Turn]) -> str:
    """Return the medians of some turns as a row of a table; the ratio is that of each pair."""
    medians = {
        field.name: statistics.median(getattr(turn, field.name) for turn in turns) for field in fields(Turn)
    }
    rate = medians["num_bytes"] / 1e6 / medians["rest_s"]
    ratio = statistics.median(turn.copy_s / turn.rest_s for turn in turns)
    return (
        f"| {name} | {medians['num_bytes'] / 1e9:.2f} | {medians['start_s']:.1f} | {medians['rest_s']:.1f} "
        f"| {rate:.0f} | {medians['copy_s']:.1f} | {ratio:.0%} | {medians['cpu_s']:.1f} | {medians['peak_mb']:.0f} |"
    )


def measure(name: str, folder: Path, num_turns: int) -> None:
    """Convert one of the models both ways, and print its two rows."""
    source, saved, back = folder / "source", folder / "saved", folder / "back"
    make_model(source, MODELS[name])
    imports, exports = [], []
    for _ in range(num_turns):
        for path in (saved, back):
            shutil.rmtree(path, ignore_errors=True)
        imports.append(converted(["import", "--hf-model", str(source), "--save", str(saved)], saved))
        exports.append(converted(["export", "--load", str(saved), "--hf-out", str(back)], back))
    print(told(f"{name}, import", imports))
    print(told(f"{name}, export", exports), flush=True)
    for path in (source, saved, back):
        shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="existing folder on the disk to measure; 10 GB"
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="default: all")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    print("| | GB | start-up s | the rest s | MB/s | copy s | speed of the copy | CPU s | peak MB |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name in options.model or MODELS:
        measure(name, options.folder, options.turns)
    print(f"load after: {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
