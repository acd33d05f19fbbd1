"""The flops of a run's units: a layer of the student, a tap, the final terms.

Figures are flops of matrix products per token, forward and backward. Tensor, context and data parallelism divide
all of them equally.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.inner_pass import knows_all_gradients
from megatron_fdd.losses.own_term import ask_flops
from megatron_fdd.losses.terms import compares_taps, first_tap, needs_of, tap_terms, uses_final_head
from megatron_fdd.ops.divergence import DIVERGENCES
from megatron_fdd.plan.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """The flops, forward and backward, of one layer of the student, one tap, and the final terms.

    Attributes:
        sent_tap: what a tap costs more if a later chunk compares its own tap with it.
    """

    layer: int
    tap: int
    head: int
    sent_tap: int = 0

    def taps(self, count: int, num_later: int) -> int:
        """Return the flops of a chunk's taps; `num_later`: how many lie in later chunks."""
        return count * self.tap + (self.sent_tap if count and num_later else 0)


def layer_flops(shape: ModelShape) -> int:
    """Count the flops of one layer forward: its matrices, and the scores and values of causal attention."""
    matrices = shape.attention_parameters + shape.active_ffn * shape.parameters_per_width
    # Two products of 2 * seq_length * width; the causal mask leaves half of each.
    return 2 * matrices + shape.seq_length * (shape.query_width + shape.attention_width)


def linear_kl_flops(
    student: ModelShape, teacher: ModelShape | None, divergence: str | None, *, trains_head: bool
) -> int:
    """Count the flops of one call of `ops.linear_kl` and its backward pass, without lse at another temperature."""
    product = 2 * student.vocab * student.hidden
    logits = product + (2 * student.vocab * teacher.hidden if teacher else 0)
    num_sweeps = 1 if divergence is None else DIVERGENCES[divergence].num_sweeps
    if trains_head:  # one more sweep gives the gradients of hidden states and head
        return (num_sweeps + 1) * logits + 2 * product
    # p_S W_S, and with a divergence p_T W_S or the product that replaces it.
    return num_sweeps * logits + (2 if divergence else 1) * product


def head_loss_flops(student: ModelShape, teacher: ModelShape | None, *, trains_head: bool) -> int:
    """Count the flops of one call of `ops.head_loss`, whose gradient needs no product in the backward pass."""
    product = 2 * student.vocab * student.hidden
    teacher_logits = 2 * student.vocab * teacher.hidden if teacher else 0
    return teacher_logits + (3 if trains_head else 2) * product


def inner_layer_flops(student: ModelShape, teacher: ModelShape) -> int:
    """Count the flops of one layer of `ops.inner_loss`, whose gradient needs no product in the backward pass.

    They are three products for every divergence; `linear_kl_flops` has four, or six.
    """
    return head_loss_flops(student, teacher, trains_head=False)


def is_computed_at_once(config: FddConfig, *, is_capped: bool) -> bool:
    """Whether on a GPU taps are layers of `ops.inner_loss`, except those whose features go on to another chunk.

    Args:
        is_capped: the logits of teacher or student have a soft cap.
    """
    has_triton = (
        not needs_of(config).divergence or DIVERGENCES[config.trajectory_divergence].triton is not None
    )
    return (
        knows_all_gradients(tap_terms(config), config)
        and config.lens_head == "detached"
        and not is_capped
        and (config.kernels == "triton" or (config.kernels == "auto" and has_triton))
    )


def capped_change_flops(student: ModelShape, teacher: ModelShape, *, trains_head: bool) -> int:
    """Count the flops of one call of `ops.capped_change` and its backward pass."""
    once = 2 * student.vocab * (2 * teacher.hidden + student.hidden)
    return (2 if trains_head else 1) * once


def capped_cosine_flops(student: ModelShape, teacher: ModelShape, *, trains_head: bool) -> int:
    """Count the flops of one call of `ops.capped_cosine` and its backward pass, which makes the logits again."""
    logits = 2 * student.vocab * 2 * (teacher.hidden + student.hidden)
    return 2 * logits + 2 * student.vocab * 2 * student.hidden * (2 if trains_head else 1)


def token_flops(student: ModelShape, teacher: ModelShape | None, config: FddConfig) -> TokenFlops:
    """Count the flops of a run's units on a GPU, without the teacher's own layers, which run before the schedule.

    Recomputation, embeddings, and the delta's Gram forms, which have no factor of the vocabulary, are left out too.
    With random taps the result is the mean over steps.
    """
    tap, head, sent_tap = 0.0, 0, 0.0
    needs, live = needs_of(config), config.lens_head == "live"
    divergence = config.trajectory_divergence if needs.divergence else None
    if needs.lse:
        tap = swept = float(linear_kl_flops(student, teacher, divergence, trains_head=live))
        is_capped = student.is_capped or (teacher is not None and teacher.is_capped)
        if teacher is not None and is_computed_at_once(config, is_capped=is_capped):
            tap = float(inner_layer_flops(student, teacher))
            sent_tap = swept - tap
        # The tap before the drawn one is read too; the first one has none.
        if config.sample_one_tap and compares_taps(config):
            before = linear_kl_flops(student, teacher, None, trains_head=live)
            tap += before * ((config.num_pairs - 1) / config.num_pairs if first_tap(config) == 0 else 1)
    elif needs.divergence:
        whole = linear_kl_flops(student, teacher, divergence, trains_head=True)
        tap = whole if live else head_loss_flops(student, teacher, trains_head=False)
    if teacher is not None and needs.grams and (student.is_capped or teacher.is_capped):
        count = capped_cosine_flops if student.is_capped else capped_change_flops
        flops = float(count(student, teacher, trains_head=live))
        is_always_one = config.sample_one_tap and first_tap(config) > 0
        tap += flops * (1 if is_always_one else (config.num_pairs - 1) / config.num_pairs)
    if teacher is not None:
        tap += sum(ask_flops(term, (student.hidden, teacher.hidden), config) for term in tap_terms(config))
    if uses_final_head(config):
        head = head_loss_flops(student, teacher if config.kd_weight > 0 else None, trains_head=True)
    return TokenFlops(3 * layer_flops(student), _sampled(tap, config), head, _sampled(sent_tap, config))


def _sampled(flops: float, config: FddConfig) -> int:
    """Return the share of a tap's flops that a step computes, on average."""
    return round(flops * config.sample_tokens / (config.num_pairs if config.sample_one_tap else 1))
