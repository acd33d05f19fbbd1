"""The table of terms of which the loss is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from torch import Tensor, nn

from megatron_fdd.config import FddConfig
from megatron_fdd.config.flags import none_of
from megatron_fdd.losses.own_term import ask_needs, check_record
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.tap import TapWindow
from megatron_fdd.losses.term import Needs, TapContext, TapTerm, Term
from megatron_fdd.ops.capped_cosine import capped_cosine
from megatron_fdd.ops.delta import TeacherChange, capped_change, delta_cosine
from megatron_fdd.ops.logit_changes import Ends


class CrossEntropy(Term):
    """Cross-entropy with the data, from the final logits."""

    kind = "ce"
    flag = "--fdd-ce-weight"
    title = "cross-entropy with the data"
    color = "#94a3b8"
    tokens = "labels"
    is_always_logged = True

    def weight(self, config: FddConfig) -> float:
        return config.ce_weight

    def needs(self, _config: FddConfig) -> Needs:
        return Needs()


class LogitKD(Term):
    """Divergence of the final predictions."""

    kind = "kd"
    flag = "--fdd-kd-weight"
    title = "divergence from the teacher's prediction"
    color = "#4f7cac"
    settings = ("kd_divergence", "divergence_mix", "temperature", "tokens")

    def weight(self, config: FddConfig) -> float:
        return config.kd_weight

    def variant(self, config: FddConfig) -> str:
        return config.kd_divergence


class Trajectory(TapTerm):
    """Divergence of each sampled layer's prediction through the lens."""

    kind = "trajectory"
    flag = "--fdd-alpha"
    title = "divergence, mean of the layers"
    color = "#3aa17e"
    settings = (
        "trajectory_divergence",
        "divergence_mix",
        "temperature",
        "tokens",
        "lens_norm",
        "teacher_lens",
    )
    caption = "How far the student's prediction at each sampled layer is from the teacher's."

    def weight(self, config: FddConfig) -> float:
        return config.alpha

    def needs(self, _config: FddConfig) -> Needs:
        return Needs(teacher=True, divergence=True)

    def variant(self, config: FddConfig) -> str:
        return config.trajectory_divergence

    def compute(self, window: TapWindow, _context: TapContext) -> Tensor:
        assert window.current.divergence is not None
        return window.current.divergence


class Delta(TapTerm):
    """1 - cosine of both models' change of prediction since the sampled layer before.

    Collectives over the tensor-parallel group: those of `delta_cosine`, once a tap; where the teacher's logits have a
    soft cap, those of `capped_change` too. Where the student's have one, those of `capped_cosine` alone.
    """

    kind = "delta"
    flag = "--fdd-beta"
    title = "first derivative, mean of the layers"
    unit = "1 - cosine"
    color = "#e0a458"
    settings = ("delta", "tokens", "lens_norm", "teacher_lens")
    caption = "How far the change of prediction since the sampled layer before is from the teacher's change."
    reach = 1

    def weight(self, config: FddConfig) -> float:
        return config.beta

    def needs(self, config: FddConfig) -> Needs:
        return Needs(teacher=True, lse=config.delta == "logprob", grams=True)

    def variant(self, config: FddConfig) -> str:
        return config.delta

    def compute(self, window: TapWindow, context: TapContext) -> Tensor:
        assert window.previous is not None
        current, previous = window.current.features, window.previous.features
        detaches = context.config.delta_detach_previous
        student_previous_MD = previous.student_MD.detach() if detaches else previous.student_MD
        lse_deltas = None
        before, after = window.previous.statistics, window.current.statistics
        if before is not None and after is not None:
            student_lse_before_N = before.student_lse_N.detach() if detaches else before.student_lse_N
            lse_deltas = (
                after.teacher_lse_N - before.teacher_lse_N,
                after.student_lse_N - student_lse_before_N,
            )
        heads = context.heads
        if heads.student_extras.cap is not None:
            ends = (
                Ends(previous.teacher_MT, current.teacher_MT),
                Ends(student_previous_MD, current.student_MD),
            )
            return context.sum(1 - capped_cosine(*ends, lse_deltas, heads, is_earlier_constant=detaches))
        grams = context.grams()
        teacher: Tensor | TeacherChange
        if heads.teacher_extras.cap is None:
            teacher = current.teacher_MT - previous.teacher_MT
        else:
            teacher = capped_change(previous.teacher_MT, current.teacher_MT, heads, grams)
        teacher_lse_delta_N, student_lse_delta_N = lse_deltas or (None, None)
        cosine_N = delta_cosine(
            teacher,
            current.student_MD - student_previous_MD,
            teacher_lse_delta_N,
            student_lse_delta_N,
            grams,
            student_later_ND=current.student_MD if detaches else None,
        )
        return context.sum(1 - cosine_N)


# How names in a metrics file begin: of a validation's means, and of each kind's share of the total.
VALIDATION, SHARE = "valid ", "share "
# Words that metrics files use for other numbers, and names in the module that holds what terms learn.
RESERVED = {
    "by_tap",
    "sharded_state_dict",
    "total",
    VALIDATION.strip(),
    SHARE.strip(),
    "iteration",
    "tokens",
    "grad_norm",
    "seconds",
    "data_seconds",
}
TERMS: list[Term] = [CrossEntropy(), LogitKD(), Trajectory(), Delta()]
"""Every kind, in the order in which logs and files have them."""
_NUM_BUILT_IN = len(TERMS)


def add_term(term: TapTerm) -> None:
    """Add an own kind, from the module that `--fdd-plugin` names.

    Raises:
        ValueError: a kind of that name exists, the name is not one word, or the record of the term is not whole.
    """
    if not isinstance(term, TapTerm):
        raise ValueError(f"a term must be an instance of a subclass of TapTerm: {term!r} is none")
    check_record(term)
    if term.kind in {each.kind for each in TERMS} | RESERVED:
        raise ValueError(f"a term {term.kind!r} exists already: give this one another name")
    # Modules are children of a torch module by this name.
    if not term.kind.isidentifier() or term.kind.startswith("_") or hasattr(nn.Module(), term.kind):
        raise ValueError(
            f"a term cannot be called {term.kind!r}: use one word of letters, digits and underscores that is no "
            "attribute of a torch module"
        )
    TERMS.append(term)
    # The same order on every rank, whatever the order in which a plug-in adds them: sums are joined by it.
    TERMS[_NUM_BUILT_IN:] = sorted(TERMS[_NUM_BUILT_IN:], key=lambda each: each.kind)


def check_terms(config: FddConfig) -> None:
    """Refuse a run without a term, or with one that it cannot compute.

    Raises:
        ValueError: a weight of a term that is not there or has a flag of its own; all weights 0; too few layers for a
            term that compares them; no teacher where a term needs it.
    """
    known = {term.kind: term for term in TERMS}
    for kind, weight in config.term:
        if kind not in known:
            unknown = none_of(kind, tuple(known))
            raise ValueError(f"--fdd-term {kind}={weight:g}: must name a term that is there; {unknown}")
        if known[kind].flag != TapTerm.flag:
            raise ValueError(f"--fdd-term {kind}={weight:g}: give this weight with {known[kind].flag}")
    if not active_terms(config):
        flags = dict.fromkeys(term.flag for term in TERMS)
        raise ValueError(
            f"the weights of all terms are 0 ({', '.join(flags)}), so that nothing is trained: raise one of them"
        )
    for term in tap_terms(config):
        if config.num_pairs <= term.reach:
            raise ValueError(
                f"the term {term.kind} compares adjacent sampled layers and needs at least 2, there is "
                f"{config.num_pairs}: raise --fdd-layers, give more --fdd-layer-pairs, or switch the term off with a "
                f"weight of 0 ({term.flag})"
            )
    if needs_of(config).teacher and config.teacher_load is None and not config.teacher_store:
        raise ValueError(
            "no teacher: give its Megatron checkpoint with --teacher-load DIR (fdd import makes one from a Hugging "
            "Face model), or its features with --fdd-teacher-store DIR (fdd teach makes them)"
        )


def active_terms(config: FddConfig) -> tuple[Term, ...]:
    """Return the terms whose weight is not 0."""
    return tuple(term for term in TERMS if term.weight(config) > 0)


def tap_terms(config: FddConfig) -> tuple[TapTerm, ...]:
    """Return the terms of inner layers whose weight is not 0."""
    return tuple(term for term in active_terms(config) if isinstance(term, TapTerm))


def needs_of(config: FddConfig) -> Needs:
    """Return what a run has to provide for all of its terms; terms of inner layers always need the teacher."""
    needs = (ask_needs(term, config) for term in active_terms(config))
    return reduce(Needs.__or__, needs, Needs(teacher=uses_taps(config)))


def first_tap(config: FddConfig) -> int:
    """Return the first pair at which any term has a value: 1 if all compare a tap with the one before it."""
    return min((term.reach for term in tap_terms(config)), default=0)


def uses_taps(config: FddConfig) -> bool:
    """Whether any term looks at an inner layer."""
    return bool(tap_terms(config))


def uses_final_head(config: FddConfig) -> bool:
    """Whether any term looks at the final logits."""
    return any(not isinstance(term, TapTerm) for term in active_terms(config))


def compares_taps(config: FddConfig) -> bool:
    """Whether any term compares a tap with the one before it."""
    return any(term.reach for term in tap_terms(config))


@dataclass(frozen=True, slots=True)
class Part:
    """One number of the log: a term of the final logits, or a term's value at one layer pair.

    Attributes:
        count: how many parts the term has; the total has their mean.
    """

    term: Term
    pair: LayerPair | None
    count: int

    @property
    def name(self) -> str:
        """`kd`, `trajectory s4:t9`."""
        return self.term.kind if self.pair is None else f"{self.term.kind} {self.pair.name}"


def parts_of(config: FddConfig, pairs: Sequence[LayerPair]) -> tuple[Part, ...]:
    """List all parts of a run in the order in which their sums are packed, the same on every stage."""
    parts: list[Part] = []
    for term in TERMS:
        if isinstance(term, TapTerm):
            if term.weight(config) > 0:
                own = pairs[term.reach :]
                parts += [Part(term, pair, len(own)) for pair in own]
        elif term.weight(config) > 0 or (term.is_always_logged and uses_final_head(config)):
            parts.append(Part(term, None, 1))
    return tuple(parts)
