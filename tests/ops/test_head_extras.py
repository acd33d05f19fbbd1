"""A bias and a soft cap of logits: every operation, compared with a float64 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fdd.ops.delta import capped_change, delta_cosine, head_grams
from megatron_fdd.ops.head_extras import NO_EXTRAS, HeadExtras
from megatron_fdd.ops.head_loss import head_loss
from megatron_fdd.ops.linear_kl import Divergence, Implementation, linear_kl
from tests.harness.ranks import distributed
from tests.ops.collectives import expect
from tests.ops.delta_case import Layers, leaves, make_layers
from tests.ops.head_loss_case import reference, scaled, weights_of
from tests.ops.linear_kl_case import (
    KINDS,
    Case,
    RankPart,
    capped,
    error,
    gradients,
    loss,
    make_case,
    reference_gradients,
    tiles,
)

PATHS = (tiles(16), tiles(16, block_rows=5), Implementation("reference"))
# A bias alone is a cap of None.
CAPS = pytest.mark.parametrize(("cap", "biased"), [(1.5, True), (1.5, False), (None, True)])


def capped_models(case: Case, models: tuple[str, ...], cap: float | None, biased: bool) -> Case:
    """Give some models extras; the student's cap is another than the teacher's."""
    if "teacher" in models:
        case = capped(case, cap=cap, biased=biased)
    if "student" in models:
        case = capped(case, cap=cap and cap * 1.4, biased=biased, model="student")
    return case


@pytest.mark.parametrize(
    ("models", "cap", "biased"),
    [(("teacher",), 1.5, False), (("student",), 1.5, True), (("teacher", "student"), 1.5, True)]
    + [(("teacher", "student"), None, True)],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_divergences(
    kind: str, temperature: float, models: tuple[str, ...], cap: float | None, biased: bool
) -> None:
    """Both operations, both kinds of head, in tiles and blocks and with all logits."""
    case = capped_models(make_case(13, 53, padded=61).to(torch.float32), models, cap, biased)
    divergence, weights = Divergence(kind, temperature=temperature), weights_of(case)
    expected, expected_gradients = reference_gradients(case, divergence)
    double = [x.double().requires_grad_() for x in (case.student, case.student_head)]
    summed = reference(case, divergence, weights, *double)
    summed_gradients = gradients(scaled(summed), *double)
    plain = replace(case, teacher_extras=NO_EXTRAS, student_extras=NO_EXTRAS).reference(divergence)
    assert error(expected.divergence_N, plain.divergence_N) > 0.02, "the extras matter here"
    for live in (False, True):
        for implementation in PATHS:
            hidden, head = case.student.clone().requires_grad_(), case.student_head.clone()
            heads = case.heads(head.requires_grad_(live), implementation)
            given = {"divergence": divergence, "labels_N": case.labels}
            ours = linear_kl(case.teacher, hidden, heads, **given)
            for value, wanted in zip(ours, expected, strict=True):
                assert error(value, wanted) < 2e-6
            inputs = (hidden, head)[: 1 + live]
            total = head_loss(case.teacher, hidden, heads, weights=weights, **given)
            assert error(total.loss, summed.loss) < 1e-6
            found = (gradients(loss(ours, case.upstream), *inputs), gradients(scaled(total), *inputs))
            for some, all_wanted in zip(found, (expected_gradients, summed_gradients), strict=True):
                for gradient, wanted in zip(some, all_wanted, strict=False):
                    assert error(gradient, wanted) < 1e-5


def capped_layers(num_tokens: int, dtype: torch.dtype, *, vocab_size: int = 53, padded: int = 57) -> Layers:
    """Make layers whose teacher has a cap that bends most logits, and a bias."""
    layers = make_layers(num_tokens, vocab_size, padded=padded, dtype=dtype)
    return Layers(capped(layers.earlier), capped(layers.later))


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_delta_under_a_cap(dtype: torch.dtype, centred: bool, detached: bool) -> None:
    layers = capped_layers(11, dtype)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-5
    heads = layers.earlier.heads(implementation=tiles(16, block_rows=4))
    grams = head_grams(heads)
    reference = layers.reference(centred=centred, detached=detached)
    linear = layers.cosine(grams, centred=centred, detached=detached)
    assert (linear - reference).abs().max() > 0.05, "the Gram form is wrong under a cap"
    ours = layers.cosine(grams, centred=centred, detached=detached, capped=heads)
    assert ours.dtype == dtype
    assert (ours - reference).abs().max() < tolerance
    weights, trained = torch.linspace(1, 2, 11), leaves(layers)[detached:]
    expected = gradients((weights * reference).sum(), *trained)
    found = gradients((weights * ours).sum(), *trained)
    for gradient, wanted in zip(found, expected, strict=True):
        assert error(gradient, wanted) < tolerance
    assert not found[-1][53:].any()


def test_a_delta_whose_logits_shift_together() -> None:
    """All logits rise by thirty times the deviation of their rises, below the cap."""
    layers = make_layers(40, 500, padded=504, dtype=torch.float32)
    with torch.no_grad():
        for state, layer in enumerate((layers.earlier, layers.later), start=1):
            layer.teacher[:, 0] = state
        layers.earlier.teacher_head[:, 0] += 60
    layers = Layers(*(capped(each, cap=200.0) for each in (layers.earlier, layers.later)))
    heads = layers.earlier.heads(implementation=tiles(128))
    ours = layers.cosine(head_grams(heads), centred=False, capped=heads)
    assert (ours - layers.reference(centred=False)).abs().max() < 5e-5


def test_a_bias_alone_leaves_the_delta_linear() -> None:
    layers = make_layers(7, 53, padded=57, dtype=torch.float64)
    layers = Layers(*(capped(each, cap=None) for each in (layers.earlier, layers.later)))
    ours = layers.cosine(head_grams(layers.earlier.heads()), centred=False)
    assert (ours - layers.reference(centred=False)).abs().max() < 1e-13


def test_a_cap_that_bends_nothing_is_none() -> None:
    layers = make_layers(7, 53, padded=57, dtype=torch.float64)
    heads = layers.earlier.heads(implementation=tiles(16))
    grams = head_grams(heads)
    plain = layers.cosine(grams, centred=False)
    wide = replace(heads, teacher_extras=HeadExtras(cap=1e9))
    assert (layers.cosine(grams, centred=False, capped=wide) - plain).abs().max() < 1e-6


def test_no_tokens() -> None:
    layers = capped_layers(0, torch.float32)
    heads = layers.earlier.heads()
    cosine = layers.cosine(head_grams(heads), centred=False, capped=heads)
    assert cosine.shape == (0,)
    assert not gradients(cosine.sum(), layers.earlier.student_head)[0].any()


@CAPS
@pytest.mark.parametrize("implementation", PATHS)
@pytest.mark.parametrize("live", [False, True])
def test_the_cross_entropy_of_one_model(
    implementation: Implementation, live: bool, cap: float | None, biased: bool
) -> None:
    case = capped(make_case(13, 53, padded=61).to(torch.float32), cap=cap, biased=biased, model="student")
    hidden, head = case.student.clone().requires_grad_(), case.student_head.clone().requires_grad_(live)
    given = {"divergence": None, "labels_N": case.labels, "needs_lse": False}
    ours = linear_kl(None, hidden, case.heads(head, implementation), **given).cross_entropy_N
    expected, wanted = reference_gradients(case, None, keep=(False, False, False, True))
    assert error(ours, expected.cross_entropy_N) < 1e-6
    found = gradients((case.upstream[2] * ours).sum(), *(hidden, head)[: 1 + live])
    for gradient, of_reference in zip(found, wanted, strict=False):
        assert error(gradient, of_reference) < 1e-5
    case.labels[2] = 55
    again = linear_kl(None, hidden, case.heads(head, implementation), **given).cross_entropy_N
    assert again.isnan().tolist() == [place == 2 for place in range(13)]


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("vocab_size", "padded"), [(23, 24), (5, 8)])
@distributed(ranks=4)
def test_ranks_agree_with_the_definition(vocab_size: int, padded: int, sequence_parallel: bool) -> None:
    """At (5, 8) the ranks have 2, 2, 1 and 0 valid rows."""
    case = capped_models(make_case(8, vocab_size, padded=padded), ("teacher", "student"), 1.5, True)
    part = RankPart.of(case, sequence_parallel=sequence_parallel)
    for kind in ("fkl", "jsd"):
        divergence = Divergence(kind, temperature=2.0)
        expected, expected_gradients = reference_gradients(case, divergence)
        for implementation in (tiles(2), Implementation("reference")):
            for live in (False, True):
                hidden, head = part.inputs(live=live)
                ours = part.run(hidden, head, divergence, implementation=implementation)
                for value, wanted in zip(ours, expected, strict=True):
                    assert error(value, wanted[part.tokens]) < 1e-12
                total = loss(ours, case.upstream[:, part.tokens])
                found = gradients(total, *(hidden, head)[: 1 + live])
                for gradient, wanted, own in zip(
                    found, expected_gradients, (part.tokens, part.rows), strict=False
                ):
                    assert error(gradient, wanted[own]) < 1e-11

    layers = capped_layers(8, torch.float64, vocab_size=vocab_size, padded=padded)
    part = RankPart.of(layers.earlier, sequence_parallel=sequence_parallel)
    head = layers.earlier.student_head.detach()[part.rows].clone().requires_grad_()
    heads = part.heads(head, tiles(2, block_rows=3))
    cosine = layers.cosine(head_grams(heads), part.tokens, centred=False, capped=heads)
    reference = layers.reference(centred=False)
    assert error(cosine, reference[part.tokens]) < 1e-12
    weights, trained = torch.linspace(1, 2, 8, dtype=torch.float64), leaves(layers)
    *expected, expected_head = gradients((weights * reference).sum(), *trained)
    *states, through_lse, through_grams = gradients((weights[part.tokens] * cosine).sum(), *trained, head)
    for gradient, wanted in zip(states, expected, strict=True):
        assert error(gradient[part.tokens], wanted[part.tokens]) < 1e-12
    if sequence_parallel:
        dist.all_reduce(through_lse)
    assert error(through_grams + through_lse[part.rows], expected_head[part.rows]) < 1e-11


@distributed(ranks=2)
def test_collectives() -> None:
    """Here T = 12, D = 7, in float32; 5 tokens (3 for a rank), or 2 for each rank under sequence parallelism."""
    for sequence_parallel, live in [(False, True), (True, True), (False, False), (True, False)]:
        layers = capped_layers(4 if sequence_parallel else 5, torch.float32, vocab_size=30, padded=32)
        part = RankPart.of(layers.earlier, sequence_parallel=sequence_parallel)
        heads = part.heads(layers.earlier.student_head.detach()[part.rows].requires_grad_(live))
        grams = head_grams(heads)
        before, after = (layer.teacher[part.tokens] for layer in (layers.earlier, layers.later))
        reduced = [("reduce_scatter_base", 4 * 4 * 9)] if sequence_parallel else [("allreduce", 4 * 5 * 9)]
        with expect([("allgather_base", 4 * 2 * 12)] * (2 * sequence_parallel) + reduced):
            change = capped_change(before, after, heads, grams)
        assert change.on_student_nD.requires_grad == live
        if live:
            with expect([("allgather_base", 4 * (3 - sequence_parallel) * 8)]):
                change.on_student_nD.sum().backward()


def test_gradcheck() -> None:
    case = capped(make_case(3, 9, padded=10))
    earlier = case.teacher.flip(0)

    def cosine(student: Tensor, head: Tensor) -> Tensor:
        heads = case.heads(head, tiles(4, block_rows=2))
        grams = head_grams(heads)
        return delta_cosine(capped_change(earlier, case.teacher, heads, grams), student, None, None, grams)

    assert torch.autograd.gradcheck(
        cosine, [tensor.requires_grad_() for tensor in (case.student, case.student_head)]
    )
