"""The groups of variants that `benchmarks.interleaved` measures, at the sizes of a GPU or of a toy."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch

from benchmarks import delta_steps, inner_steps, measure
from benchmarks import linear_kl_steps as steps
from benchmarks.linear_kl_steps import Size, Step
from megatron_fdd.ops.implementation import Implementation


@dataclass(frozen=True)
class Scale:
    """The sizes at which a device is measured; the first of two vocabularies has rows that are not aligned."""

    size: Size
    vocabularies: tuple[tuple[int, int], ...]
    held_tokens: tuple[int, ...]
    few_tokens: int
    square: int
    copied_mib: int
    rounds: int


SCALES = {
    "cuda": Scale(
        Size(8192, 128_000, 4096, 2048, 4, "bfloat16", "cuda"),
        ((50_257, 50_304), (151_669, 151_680)),
        (1024, 2048, 4096),
        few_tokens=1024,
        square=8192,
        copied_mib=2048,
        rounds=8,
    ),
    "cpu": Scale(
        Size(64, 500, 24, 16, 2),
        ((249, 256), (751, 752)),
        (16, 32, 64),
        few_tokens=16,
        square=64,
        copied_mib=1,
        rounds=2,
    ),
}


@dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        make: prepares its inputs and returns the step.
        floor: the row of its group by whose time its time is divided.
        work: floating-point operations or bytes of a call, for a rate.
    """

    row: str
    make: Callable[[], Step]
    size: Size
    floor: str | None = None
    work: float | None = None
    unit: str = "FLOP/s"


@dataclass(frozen=True)
class Group:
    """Rows that are measured in turn."""

    name: str
    variants: tuple[Variant, ...]


FLOOR, OURS = "bare matrix products", "megatron_fdd"
AT_ONCE = "gradient in the forward pass"


def groups(scale: Scale) -> Iterator[Group]:
    """Yield the groups in the order of their importance."""
    size, one = scale.size, replace(scale.size, layers=1)
    yield Group("ceilings", ceilings(scale))
    yield Group("one layer's divergence", tap(one))
    final = [
        Variant(f"{OURS}, {tokens:,} tokens held", partial(held_final, one, tokens), one, FLOOR)
        for tokens in scale.held_tokens
    ]
    yield Group("final logits", (bare(one, steps.bare_final), *final))
    whole = partial(steps.our_objective, size)
    yield Group(
        f"objective of {size.layers} layers",
        (
            bare(size, steps.bare_products),
            three(size),
            Variant(f"{OURS}, {AT_ONCE}", partial(inner_steps.our_layers, size), size, FLOOR),
            Variant(f"{OURS}, as in a training", partial(whole, keeps_teacher=True), size, FLOOR),
            Variant(f"{OURS}, with the teacher's Gram matrix", whole, size, FLOOR),
        ),
    )
    for pair in scale.vocabularies:
        both = [replace(one, vocab=vocab) for vocab in pair]
        names = [f", vocabulary {vocab:,}" for vocab in pair]
        label = f"vocabulary {pair[0]:,} beside {pair[1]:,}"
        rows = [row for each, more in zip(both, names, strict=True) for row in tap(each, more)]
        yield Group(f"one layer's divergence, {label}", tuple(rows))
        rows = [row for each, more in zip(both, names, strict=True) for row in trained_final(each, more)]
        yield Group(f"final logits, {label}", tuple(rows))
    few = replace(one, tokens=scale.few_tokens)
    yield Group(f"one layer's divergence, {few.tokens:,} tokens", tap(few))
    yield Group(f"final logits, {few.tokens:,} tokens", trained_final(few))
    yield Group("delta", deltas(one))
    yield Group("others", others(one))
    if importlib.util.find_spec("liger_kernel") is not None:
        yield Group("final logits, Liger-Kernel", liger(one))


def ceilings(scale: Scale) -> tuple[Variant, ...]:
    """Return variants that show how fast this chip multiplies and copies."""
    size, side = scale.size, scale.square
    work = 2.0 * side**3
    copied = 2.0 * scale.copied_mib * measure.MIB
    return (
        Variant(f"product of {side:,} x {side:,} x {side:,}", partial(square, size, side), size, work=work),
        Variant(
            f"copy of {scale.copied_mib:,} MiB",
            partial(copy, size, scale.copied_mib),
            size,
            None,
            copied,
            "B/s",
        ),
    )


def flops(size: Size) -> float:
    """Return the operations of the floor: both logits, and two more products with the student's head; all layers."""
    return 2.0 * size.layers * size.tokens * size.vocab * (size.teacher_width + 3 * size.student_width)


def bare(size: Size, make: Callable[[Size], Step], more: str = "") -> Variant:
    """Return the floor of a group."""
    return Variant(FLOOR + more, partial(make, size), size, work=flops(size))


def three(size: Size, more: str = "") -> Variant:
    """Return the products that are left of the floor where the gradient comes from the forward pass."""
    wide = size.teacher_width + 2 * size.student_width
    work = 2.0 * size.layers * size.tokens * size.vocab * wide
    return Variant(
        f"three products a layer{more}", partial(inner_steps.bare_layers, size), size, FLOOR + more, work
    )


def tap(size: Size, more: str = "") -> tuple[Variant, ...]:
    """Return one layer's divergence and its floor."""
    ours = Variant(OURS + more, partial(steps.our_tap, size), size, FLOOR + more)
    at_once = Variant(f"{OURS}, {AT_ONCE}{more}", partial(inner_steps.our_layers, size), size, FLOOR + more)
    return (bare(size, steps.bare_tap, more), three(size, more), at_once, ours)


def trained_final(size: Size, more: str = "") -> tuple[Variant, ...]:
    """Return the final logits as in a training, and their floor."""
    ours = Variant(OURS + more, partial(steps.our_final, size, trains=True), size, FLOOR + more)
    return (bare(size, steps.bare_final, more), ours)


def held_final(size: Size, tokens: int) -> Step:
    """Return a step of the same with the logits of so many tokens held."""
    return steps.our_final(size, Implementation(held_logits=tokens * size.vocab), trains=True)


def deltas(size: Size) -> tuple[Variant, ...]:
    """Return one delta, its products alone, and the Gram matrices of a step."""
    floor, grams = "one product each, of a delta", "one product each, of the Gram matrices"
    return (
        Variant(floor, partial(delta_steps.bare_delta, size), size),
        Variant("delta_cosine, with its gradient", partial(delta_steps.our_delta, size), size, floor),
        Variant("its products", partial(delta_steps.our_products, size), size, floor),
        Variant(grams, partial(delta_steps.bare_grams, size), size),
        Variant(
            "head_grams, as in a training",
            partial(delta_steps.our_grams, size, keeps_teacher=True),
            size,
            grams,
        ),
        Variant("head_grams, all", partial(delta_steps.our_grams, size, keeps_teacher=False), size, grams),
    )


def others(size: Size) -> tuple[Variant, ...]:
    """Return other implementations of the final logits, and options; the slow ones come last."""
    floor, of_a_tap = f"{FLOOR}, final logits", f"{FLOOR}, one layer"
    return (
        Variant(of_a_tap, partial(steps.bare_tap, size), size),
        Variant(
            "one layer, --fdd-kernels torch",
            partial(steps.our_tap, size, Implementation("torch")),
            size,
            of_a_tap,
        ),
        Variant(
            "one layer, --fdd-skip-below 1e-5 that skips nothing",
            partial(steps.our_tap, size, Implementation(skip_below=1e-5)),
            size,
            of_a_tap,
        ),
        Variant(floor, partial(steps.bare_final, size), size),
        Variant("gradient to autograd", partial(steps.our_final, size), size, floor),
        Variant("linear_kl (gradient per token)", partial(steps.our_final_per_token, size), size, floor),
        Variant(
            "--fdd-kernels torch",
            partial(steps.our_final, size, Implementation("torch"), trains=True),
            size,
            floor,
        ),
        Variant("plain torch", partial(steps.plain_final, size), size, floor),
    )


def liger(size: Size) -> tuple[Variant, ...]:
    """Return Liger's loss beside ours, if it is installed; in a group of its own, because a GPU compiles it first."""
    theirs = Variant("Liger LigerFusedLinearJSDLoss", partial(steps.liger_final, size), size, FLOOR)
    return (*trained_final(size), theirs)


def square(size: Size, side: int) -> Step:
    """Return a step of one product of square matrices."""
    left, right = (
        torch.ones(side, side, dtype=getattr(torch, size.dtype), device=size.device) for _ in range(2)
    )
    return lambda: left @ right


def copy(size: Size, mib: int) -> Step:
    """Return a step that copies so many MiB."""
    given = torch.zeros(mib * measure.MIB, dtype=torch.uint8, device=size.device)
    target = torch.empty_like(given)
    return lambda: target.copy_(given)
