"""inner_loss on one rank and on several: sums and gradients against a float64 reference, products, memory."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from benchmarks.measure import MIB, peak_of
from megatron_fdd.ops.implementation import Implementation
from megatron_fdd.ops.linear_kl import Divergence
from tests.harness.ranks import distributed
from tests.ops.inner_case import FACTOR, Inner, gradients_of, leaves_of, make_layers, reference_of
from tests.ops.interpreted import DEVICE, few_columns
from tests.ops.linear_kl_case import KINDS, Products, RankPart, error

pytestmark = pytest.mark.tier("default")

VOCAB, PADDED, TOKENS = 53, 61, 11
# Two layers' logits of 4 tokens are held, so that there are three blocks.
FEW = Implementation("torch", held_logits=2 * 4 * PADDED)
VARIANTS = {
    "all": {},
    "detached": {"detaches": True},
    "given-first": {"given": (0,)},
    "given-last": {"given": (2,)},
    "given-ends-detached": {"given": (0, 2), "detaches": True},
    "one-divergence": {"divergences": (None, None, 0.7)},
    "no-divergence": {"divergence": None, "divergences": (None,) * 3},
    "one-delta": {"deltas": (None, None, 0.9)},
    "no-delta": {"deltas": (None,) * 3},
}


def assert_matches(inner: Inner, implementation: Implementation, dtype: torch.dtype = torch.float64) -> None:
    students = [leaf.detach().to(DEVICE).requires_grad_() for leaf in leaves_of(inner, dtype)]
    heads = inner.layers[0].to(dtype).heads(implementation=implementation)
    heads = replace(heads, teacher_WT=heads.teacher_WT.to(DEVICE), student_WD=heads.student_WD.to(DEVICE))
    rounded = replace(inner, layers=tuple(layer.to(dtype) for layer in inner.layers))
    total, sums = rounded.run(heads, students)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    wanted_total, wanted_sums, wanted = reference_of(rounded)
    assert error(total.cpu(), wanted_total) < tolerance
    for value, reference in zip(itertools.chain(*sums), itertools.chain(*wanted_sums), strict=True):
        assert (value is None) == (reference is None)
        assert value is None or error(value.cpu(), reference) < tolerance
        assert value is None or not value.requires_grad
    used = [index for index, each in enumerate(wanted) if index not in inner.given or each.any()]
    found = gradients_of(total, [students[index] for index in used])
    for gradient, index in zip(found, used, strict=True):
        assert error(gradient.cpu(), wanted[index]) < 5 * tolerance


@pytest.mark.parametrize("variant", VARIANTS)
def test_sums_and_gradients(variant: str) -> None:
    inner = Inner(make_layers(3, TOKENS, VOCAB, padded=PADDED), **VARIANTS[variant])
    assert_matches(inner, FEW)
    assert_matches(inner, Implementation("torch"))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence(kind: str, temperature: float) -> None:
    layers = make_layers(3, TOKENS, VOCAB, padded=PADDED)
    assert_matches(Inner(layers, Divergence(kind, temperature=temperature)), FEW)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["fkl", "rkl", "jsd"])
def test_triton(kind: str, temperature: float) -> None:
    pytest.importorskip("triton")
    inner = Inner(make_layers(3, TOKENS, VOCAB, padded=PADDED), Divergence(kind, temperature=temperature))
    with few_columns():
        assert_matches(inner, replace(FEW, kind="triton"), torch.float32)


def test_no_tokens() -> None:
    assert_matches(Inner(make_layers(3, 0, VOCAB)), FEW)


@pytest.mark.parametrize("kind", KINDS)
def test_three_products_a_layer(kind: str) -> None:
    """They are two for logits and one for the gradient, besides those of the deltas and their Gram matrices."""
    inner = Inner(make_layers(3, TOKENS, VOCAB), Divergence(kind), deltas=(None,) * 3)
    heads = inner.layers[0].heads(implementation=FEW)
    students = leaves_of(inner)
    with Products() as products:
        total, _ = inner.run(heads, students)
        (FACTOR * total).backward()
    teacher, student = (head.shape[1] for head in (heads.teacher_WT, heads.student_WD))
    grams = VOCAB * (teacher**2 + teacher * student + student**2)
    assert products.total == 3 * TOKENS * VOCAB * (teacher + 2 * student) + grams


def test_the_logits_of_two_layers_are_held_at_a_time() -> None:
    rows, vocab_size = 100, 2048
    layers = tuple(layer.to(torch.float32) for layer in make_layers(4, 600, vocab_size))
    inner = Inner(layers, divergences=(0.7,) * 4, deltas=(None, 0.4, 0.4, 0.4))
    held = rows * vocab_size * 4  # bytes of one model's logits of a layer
    heads = layers[0].heads(implementation=Implementation("torch", held_logits=2 * rows * vocab_size))
    students = leaves_of(inner, torch.float32)
    peak = peak_of(lambda: (FACTOR * inner.run(heads, students)[0]).backward()) * MIB
    assert 4 * held < peak < 5 * held


def test_a_gradient_a_layer_is_kept_in_the_heads_dtype() -> None:
    """A quarter, at most, of the two float32 gradients of a layer that a divergence by itself keeps."""
    layers = tuple(layer.to(torch.bfloat16) for layer in make_layers(4, 64, VOCAB, padded=PADDED))
    inner = Inner(layers, divergences=(0.7,) * 4, deltas=(None, 0.4, 0.4, 0.4))
    students, kept = leaves_of(inner, torch.bfloat16), []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        inner.run(layers[0].heads(implementation=Implementation("torch")), students)
    assert sum(each.nbytes for each in kept) == sum(each.nbytes for each in students)


def assert_ranks_match(inner: Inner, *, sequence_parallel: bool, implementation: Implementation) -> None:
    parts = [RankPart.of(layer, sequence_parallel=sequence_parallel) for layer in inner.layers]
    rows, dtype = parts[0].tokens, inner.layers[0].student_head.dtype
    students = [layer.student[rows].detach().clone().requires_grad_() for layer in inner.layers]
    heads = parts[0].heads(inner.layers[0].student_head[parts[0].rows], implementation)
    total, sums = inner.run(heads, students, rows)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    wanted_total, wanted_sums, wanted = reference_of(inner)
    for value, reference in zip(
        (total, *itertools.chain(*sums)), (wanted_total, *itertools.chain(*wanted_sums)), strict=True
    ):
        if value is not None:
            summed = value.detach().clone()
            if sequence_parallel:
                dist.all_reduce(summed)
            assert error(summed, reference) < tolerance
    for gradient, reference in zip(gradients_of(total, students), wanted, strict=True):
        assert error(gradient, reference[rows]) < 5 * tolerance


def inner_of_ranks(vocab_size: int, padded: int) -> tuple[Inner, ...]:
    layers = make_layers(3, 12, vocab_size, padded=padded)
    return Inner(layers), Inner(layers, Divergence("jsd", temperature=2.0), detaches=True)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=2)
def test_two_ranks(sequence_parallel: bool) -> None:
    for inner in inner_of_ranks(31, 32):
        few = Implementation("torch", held_logits=2 * 5 * 16)
        for implementation in (few, Implementation("torch")):
            assert_ranks_match(inner, sequence_parallel=sequence_parallel, implementation=implementation)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=4)
def test_four_ranks_one_of_them_all_padding(sequence_parallel: bool) -> None:
    for inner in inner_of_ranks(10, 16):
        few = Implementation("torch", held_logits=2 * 5 * 4)
        assert_ranks_match(inner, sequence_parallel=sequence_parallel, implementation=few)


@pytest.mark.skipif(DEVICE != "cpu", reason="ranks are on CPUs, where Triton has its interpreter alone")
@pytest.mark.parametrize("sequence_parallel", [False, True])
@distributed(ranks=2)
def test_triton_on_two_ranks(sequence_parallel: bool) -> None:
    few = Implementation("triton", held_logits=2 * 5 * 16)
    with few_columns():
        for inner in inner_of_ranks(31, 32):
            single = replace(inner, layers=tuple(layer.to(torch.float32) for layer in inner.layers))
            assert_ranks_match(single, sequence_parallel=sequence_parallel, implementation=few)
