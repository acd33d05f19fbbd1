"""The delta of a student whose logits have a soft cap, compared with its definition over the vocabulary in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from megatron_fdd.ops.capped_cosine import capped_cosine
from megatron_fdd.ops.delta import head_grams
from megatron_fdd.ops.head_extras import NO_EXTRAS, HeadExtras
from megatron_fdd.ops.logit_changes import Ends
from tests.harness.ranks import distributed
from tests.ops.collectives import expect
from tests.ops.delta_case import Layers, leaves, make_layers
from tests.ops.linear_kl_case import RankPart, capped, error, gradients, tiles


def capped_layers(
    num_tokens: int, dtype: torch.dtype, *, vocab_size: int = 53, padded: int = 57, both: bool = True
) -> Layers:
    """Make layers whose student, or both of whose models, have a cap that bends most logits."""
    layers = make_layers(num_tokens, vocab_size, padded=padded, dtype=dtype)
    made = [capped(each, cap=2.0, biased=False, model="student") for each in (layers.earlier, layers.later)]
    return Layers(*(capped(each) for each in made)) if both else Layers(*made)


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients(dtype: torch.dtype, centred: bool, detached: bool, both: bool) -> None:
    layers = capped_layers(11, dtype, both=both)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    heads = layers.earlier.heads(implementation=tiles(16, block_rows=4))
    reference = layers.reference(centred=centred, detached=detached)
    linear = layers.cosine(head_grams(heads), centred=centred, detached=detached)
    assert (linear - reference).abs().max() > 0.05, "the Gram form is wrong under a cap"
    ours = layers.capped_cosine(heads, centred=centred, detached=detached)
    assert ours.dtype == dtype
    assert (ours - reference).abs().max() < tolerance
    weights, trained = torch.linspace(1, 2, 11), leaves(layers)[detached:]
    expected = gradients((weights * reference).sum(), *trained)
    found = gradients((weights * ours).sum(), *trained)
    for gradient, wanted in zip(found, expected, strict=True):
        assert error(gradient, wanted) < tolerance
    assert not found[-1][53:].any()


def test_a_cap_that_bends_nothing_is_none() -> None:
    layers = make_layers(7, 53, padded=57, dtype=torch.float64)
    heads = layers.earlier.heads(implementation=tiles(16))
    plain = layers.cosine(head_grams(heads), centred=False)
    for extras in (NO_EXTRAS, HeadExtras(cap=1e9)):
        wide = replace(heads, student_extras=extras)
        assert (layers.capped_cosine(wide, centred=False) - plain).abs().max() < 1e-6


def test_logits_that_shift_together() -> None:
    """All logits rise by thirty times the deviation of their rises, below the cap."""
    layers = make_layers(40, 500, padded=504, dtype=torch.float32)
    with torch.no_grad():
        for state, layer in enumerate((layers.earlier, layers.later), start=1):
            layer.student[:, 0] = state
        layers.earlier.student_head[:, 0] += 60
    layers = Layers(*(capped(each, cap=200.0, model="student") for each in (layers.earlier, layers.later)))
    ours = layers.capped_cosine(layers.earlier.heads(implementation=tiles(128)), centred=False)
    assert (ours - layers.reference(centred=False)).abs().max() < 1e-4


def test_no_direction_to_compare() -> None:
    """Layers that do not differ count as equal, without a gradient."""
    layers = capped_layers(5, torch.float32)
    same = Layers(layers.earlier, layers.earlier)
    ours = same.capped_cosine(layers.earlier.heads(), centred=True)
    assert ours.tolist() == [1.0] * 5
    assert not gradients(ours.sum(), layers.earlier.student)[0].any()


def test_no_tokens() -> None:
    layers = capped_layers(0, torch.float32)
    cosine = layers.capped_cosine(layers.earlier.heads(), centred=False)
    assert cosine.shape == (0,)
    assert not gradients(cosine.sum(), layers.earlier.student_head)[0].any()


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize(("vocab_size", "padded"), [(23, 24), (5, 8)])
@distributed(ranks=4)
def test_ranks_agree_with_the_definition(vocab_size: int, padded: int, sequence_parallel: bool) -> None:
    """At (5, 8) the ranks have 2, 2, 1 and 0 valid rows."""
    layers = capped_layers(8, torch.float64, vocab_size=vocab_size, padded=padded)
    part = RankPart.of(layers.earlier, sequence_parallel=sequence_parallel)
    head = layers.earlier.student_head.detach()[part.rows].clone().requires_grad_()
    heads = part.heads(head, tiles(2, block_rows=3))
    cosine = layers.capped_cosine(heads, part.tokens, centred=False)
    reference = layers.reference(centred=False)
    assert error(cosine, reference[part.tokens]) < 1e-12
    weights, trained = torch.linspace(1, 2, 8, dtype=torch.float64), leaves(layers)
    *expected, expected_head = gradients((weights * reference).sum(), *trained)
    *states, through_lse, through_changes = gradients((weights[part.tokens] * cosine).sum(), *trained, head)
    for gradient, wanted in zip(states, expected, strict=True):
        assert error(gradient[part.tokens], wanted[part.tokens]) < 1e-11
    if sequence_parallel:
        dist.all_reduce(through_lse)
    assert error(through_changes + through_lse[part.rows], expected_head[part.rows]) < 1e-11


@distributed(ranks=2)
def test_collectives() -> None:
    """Here T = 12, D = 7, in float32; 5 tokens, or 2 for each rank under sequence parallelism."""
    for sequence_parallel in (False, True):
        layers = capped_layers(4 if sequence_parallel else 5, torch.float32, vocab_size=30, padded=32)
        part = RankPart.of(layers.earlier, sequence_parallel=sequence_parallel)
        heads = part.heads(layers.earlier.student_head.detach()[part.rows].requires_grad_())
        tokens = part.tokens
        teacher, student = (
            Ends(*(getattr(layer, model)[tokens] for layer in (layers.earlier, layers.later)))
            for model in ("teacher", "student")
        )
        gathers = [("allgather_base", 4 * 2 * width) for width in (12, 12, 7, 7)] * sequence_parallel
        reduces = ("reduce_scatter_base", 4 * 4) if sequence_parallel else ("allreduce", 4 * 5)
        with expect([("allreduce", 4 * 20), *gathers, (reduces[0], reduces[1] * 5)]):
            cosine_N = capped_cosine(teacher, student, None, heads)
        with expect([("allgather_base", 4 * 2 * 5)] * sequence_parallel + [(reduces[0], reduces[1] * 7)] * 2):
            cosine_N.sum().backward()
