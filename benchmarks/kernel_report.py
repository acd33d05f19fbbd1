"""The compiler's figures for the Triton kernels, on a GPU that need not be present: registers, spills, shared memory.

    python -m benchmarks.kernel_report --capability 90

Do not run it under TRITON_INTERPRET. A program that spills, or needs more shared memory than a multiprocessor has,
is slow or does not start at all. After changing a kernel or its tiles, look here first, and then measure.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from unittest.mock import patch

import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.compiler import ASTSource

from megatron_fdd.ops import vocab_tiles
from megatron_fdd.ops.divergence import DIVERGENCES, Divergence
from megatron_fdd.ops.gpu import sweeps as sweeps
from megatron_fdd.ops.gpu.sweeps import Launch, TritonSweeps
from megatron_fdd.ops.heads import Model
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.kl_gradients import Normalisers, Upstream
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.vocab_shard import VocabShard


@dataclass(frozen=True, slots=True)
class Compiled:
    """One compiled kernel."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: dict[str, int]  # how often a kind of instruction appears


COUNTED = {
    "ld 16": r"ld\.global\.v4\.b32",
    "st 16": r"st\.global\.v4\.b32",
    "st 8": r"st\.global\.v2\.b32",
}


def compiled(launch: Launch, capability: int) -> Compiled:
    """Compile a launch as a GPU of this compute capability (90: Hopper) would at its first run."""
    specialised = _specialised(launch)
    constants = {
        name: launch.arguments[name] for name, (kind, _) in specialised.items() if kind == "constexpr"
    }
    attributes = {
        (index,): BaseBackend.parse_attr(hint)
        for index, (_, hint) in enumerate(specialised.values())
        if isinstance(hint, str)
    }
    source = ASTSource(
        launch.kernel, {name: kind for name, (kind, _) in specialised.items()}, constants, attributes
    )
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options={"num_warps": launch.warps})
    registers, spilled = _resources(kernel.asm["ptx"], capability)
    counts = {name: len(re.findall(pattern, kernel.asm["ptx"])) for name, pattern in COUNTED.items()}
    return Compiled(registers, spilled, kernel.metadata.shared, counts)


def _specialised(launch: Launch) -> dict[str, tuple[str, Any]]:
    """Return type and hint of each argument, or "constexpr" and its value."""
    return {
        parameter.name: ("constexpr", launch.arguments[parameter.name])
        if parameter.is_constexpr
        else native_specialize_impl(BaseBackend, launch.arguments[parameter.name], False, True, True)
        for parameter in launch.kernel.params
    }


def _resources(ptx: str, capability: int) -> tuple[int, int]:
    """Return the registers of a thread and the bytes that it spills, as the assembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            nvidia.get_ptxas(capability).path,
            "-v",
            f"--gpu-name={nvidia.sm_arch_from_capability(capability)}",
        ]
        command += [str(source), "-o", str(Path(folder) / "kernel.cubin")]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    registers, spills = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
    assert registers is not None, said
    return int(registers[1]), int(spills[1]) if spills else 0


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the models in a report."""

    num_tokens: int = 8192
    vocab_size: int = 128 * 1024
    teacher_width: int = 4096
    student_width: int = 2048
    dtype: torch.dtype = torch.bfloat16

    def model(self, width: int) -> Model:
        """Return hidden states and head without memory."""
        hidden = torch.empty(self.num_tokens, width, dtype=self.dtype, device="meta")
        return hidden, torch.empty(self.vocab_size, width, dtype=self.dtype, device="meta")


HeadKind = Literal["still", "live", "held", "inner"]


def launches_of(shape: Shape, divergence: Divergence | None, head: HeadKind) -> list[Launch]:
    """Return the launches of one call of linear_kl with everything requested.

    "held": of head_loss. "inner": of a layer of `inner_loss` that leaves out tiles.

    `divergence` None: without a teacher.
    """
    head_gradient, is_inner = head != "still", head == "inner"
    request = Request(
        shard=VocabShard(0, shape.vocab_size, None),
        divergence=divergence,
        needs_lse=head != "held",
        has_labels=not is_inner,
        implementation=Implementation("triton", skip_below=1e-5 if is_inner else 0.0),
        body_gradient=not head_gradient,
        head_gradient=head_gradient,
        held_rows=shape.num_tokens if head in ("held", "inner") else None,
        skips_tiles=is_inner,
    )
    teacher = None if divergence is None else shape.model(shape.teacher_width)
    student = shape.model(shape.student_width)
    recorded: list[Launch] = []
    with (
        patch.object(Launch, "run", lambda launch: recorded.append(launch)),
        # As on a GPU; nothing depends on the products of these tensors.
        patch.object(vocab_tiles, "product_dtype", lambda tensor: tensor.dtype),
        patch.object(sweeps, "accumulate"),
        patch.object(sweeps, "add_kept_product"),
    ):
        sweeping = TritonSweeps(request, teacher, student)
        sums = sweeping.softmax_sums()
        if request.two_sweep is not None:
            sweeping.second_sums(sums.mass_M)
        if head_gradient:
            row_R = sums.mass_M[sums.student]
            upstream, normalisers = Upstream(row_R, row_R, row_R), Normalisers(sums.mass_M, row_R, row_R)
            sweeping.gradients(upstream, normalisers, torch.empty_like(row_R, dtype=torch.int64), None)
    return recorded


def distinct(recorded: list[Launch]) -> list[Launch]:
    """Return one launch of each program that the compiler would see."""
    return list({(launch.kernel.fn, str(_specialised(launch))): launch for launch in recorded}.values())


def main() -> None:
    """Print a table of every program of every divergence."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--capability", type=int, choices=(80, 86, 89, 90, 100, 120), default=90)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 2.0])
    parser.add_argument("--kinds", nargs="+", choices=[*DIVERGENCES, "none"], default=[*DIVERGENCES, "none"])
    parser.add_argument("--heads", nargs="+", choices=get_args(HeadKind), default=get_args(HeadKind))
    parser.add_argument("--vocab", type=int, default=Shape().vocab_size, help="entries of the vocabulary")
    options = parser.parse_args()
    if options.vocab < 1 or not all(0 < each < math.inf for each in options.temperatures):
        parser.error("--vocab and --temperatures must be numbers above 0")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1: the interpreter compiles nothing; unset it")
    shape = Shape(vocab_size=options.vocab, dtype=getattr(torch, options.dtype))
    print(f"{'':30} registers spilled shared  instructions")
    for kind in options.kinds:
        for temperature in options.temperatures if kind != "none" else (1.0,):
            divergence = None if kind == "none" else Divergence(kind, temperature=temperature)
            for head in options.heads:
                for launch in distinct(launches_of(shape, divergence, head)):
                    name = launch.kernel.fn.__name__.removesuffix("_kernel")
                    label = f"{kind} {temperature:g} {head} {name}"
                    result = compiled(launch, options.capability)
                    counts = ", ".join(
                        f"{count} {what}" for what, count in result.instructions.items() if count
                    )
                    figures = f"{result.registers:9} {result.spilled_bytes:7} {result.shared_bytes:5}B"
                    print(f"{label:30} {figures}  {counts}", flush=True)


if __name__ == "__main__":
    main()
