"""Trajectory and delta of a chunk's taps in one pass, which computes their gradient forward (`ops.inner_loss`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.chunk_loss import ChunkLoss
from megatron_fdd.losses.own_term import ask_needs
from megatron_fdd.losses.tap import Tap, TapWindow
from megatron_fdd.losses.term import TapContext, TapTerm
from megatron_fdd.losses.terms import Delta, Trajectory
from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.inner_loss import InnerLayer, InnerTerms, inner_loss


def knows_all_gradients(terms: Sequence[TapTerm], config: FddConfig) -> bool:
    """Whether all that comes back to divergences and log-sum-exps of taps is known before the backward pass."""
    needs = [(type(term), ask_needs(term, config)) for term in terms]
    reading = {kind for kind, each in needs if each.divergence or each.lse}
    return Delta in reading and reading <= {Trajectory, Delta}


def is_in_pass(term: TapTerm, tap: Tap) -> bool:
    """Whether `inner_pass` computes a term at a tap."""
    return type(term) is Delta or (type(term) is Trajectory and tap.statistics is None)


def inner_pass(
    windows: Mapping[int, TapWindow],
    factor: Callable[[str, int], float | None],
    context: TapContext,
    divergence: Divergence | None,
) -> ChunkLoss:
    """Compute the deltas of all taps, and the divergence of those that have no log-sum-exps yet.

    Args:
        windows: of adjacent taps, by index.
        factor: gives the factor of a term's sum at a tap in the loss; None: the term is not computed there.

    Collectives: those of `inner_loss`, and of `TapContext.grams`.
    """
    layers: list[InnerLayer] = []
    first = next(iter(windows.values()))
    if first.previous is not None:
        layers.append(_layer(first.previous))
    for index, window in windows.items():
        tap = window.current
        trajectory = None if tap.statistics is not None else factor(Trajectory.kind, index)
        layers.append(_layer(tap, trajectory, None if window.previous is None else factor(Delta.kind, index)))
    terms = InnerTerms(divergence, context.weights.term_N, context.config.delta_detach_previous)
    loss, sums = inner_loss(layers, context.heads, context.grams(), terms)
    found = {}
    for window, each in zip(windows.values(), sums[len(sums) - len(windows) :], strict=True):
        for kind, value in ((Trajectory.kind, each.divergence), (Delta.kind, each.delta)):
            if value is not None:
                found[f"{kind} {window.current.pair.name}"] = value
    return ChunkLoss((loss,), found)


def _layer(tap: Tap, divergence: float | None = None, delta: float | None = None) -> InnerLayer:
    features, given = tap.features, tap.statistics
    lse = None if given is None else (given.teacher_lse_N, given.student_lse_N)
    return InnerLayer(features.teacher_MT, features.student_MD, divergence, delta, lse)
