"""The table of divergences between two distributions over the vocabulary, and the way to add others.

All code that computes, counts or lists divergences reads `DIVERGENCES` (docs/method.md has the formulas;
docs/extend/divergence.md explains how to add one).

Shapes: N tokens (any number of rows), C columns (any part of the vocabulary).
"""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_fdd.ops.own_divergence import ValueAndScore, check_functions, check_triton


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceKind:
    """What the package needs to know about a divergence of teacher T and student S.

    Attributes:
        value_and_score: takes (teacher_NC, student_NC, mix), log-probabilities of some columns, and returns two new
            tensors [N, C]: the value's summands, whose sum over the vocabulary is the divergence, and their score, the
            derivative with respect to the student's log-probabilities, to which any multiple of p_S may be added. It
            computes each column by itself and writes to no input; autograd can differentiate the value
            (`--fdd-kernels reference` does).
        formula: the formula, as docs/method.md writes it.
        explanation: a few words that help a reader to choose; --help shows formula and explanation.
        default_mix: the value of `mix` unless it is given; None: the divergence has no mix, and `mix` is NaN.
        triton: the same function for GPUs, decorated with `@triton.jit`, or its "module:name", which is imported only
            where it runs. It takes (teacher, student, mix, log_mix, log_rest): two blocks of float32 and three
            numbers, `mix` and the logarithms of mix and of 1 - mix. None: no such function exists, and torch computes
            the divergence.
        leader: set only for the two Kullback-Leibler divergences, which one sweep over the vocabulary computes: the
            model under which they are the expectation of the log-ratio. None: two sweeps, the second after both
            normalisers.
    """

    value_and_score: ValueAndScore
    formula: str
    explanation: str
    default_mix: float | None = None
    triton: Any = None
    leader: Literal["teacher", "student"] | None = None

    @property
    def num_sweeps(self) -> int:
        """Number of passes over the vocabulary until value and gradient are known."""
        return 2 if self.leader is None else 1

    def triton_function(self) -> Any:
        """Return `triton`, imported if it is a name."""
        if not isinstance(self.triton, str):
            return self.triton
        module, _, name = self.triton.partition(":")
        return getattr(importlib.import_module(module), name)


@dataclass(frozen=True, slots=True)
class Divergence:
    """The choice of a divergence of teacher T and student S, each softmax(z / temperature).

    The reported value has the factor temperature^2. `kind` is a name in `DIVERGENCES`. `mix`: None means the kind's
    default; kinds without a mix ignore it.
    """

    kind: str = "fkl"
    mix: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(f"divergence {self.kind!r} is unknown: use one of {tuple(DIVERGENCES)}")
        if self.mix is not None and not 0 < self.mix < 1:
            raise ValueError(f"divergence mix is {self.mix}: it must lie between 0 and 1, both excluded")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}: it must be positive and finite")

    @property
    def definition(self) -> DivergenceKind:
        """The row of the table for `kind`."""
        return DIVERGENCES[self.kind]

    @property
    def one_sweep(self) -> bool:
        """Whether one pass over the vocabulary gives value and gradient, so that no normaliser is needed before it."""
        return self.definition.num_sweeps == 1

    @property
    def teacher_leads(self) -> bool:
        """Whether it is the expectation under the teacher, as the forward KL is."""
        return self.definition.leader == "teacher"

    @property
    def student_leads(self) -> bool:
        """Whether it is the expectation under the student, as the reverse KL is."""
        return self.definition.leader == "student"

    @property
    def mix_weight(self) -> float:
        """`mix`, or the default of the kind; NaN if the kind has none."""
        default = self.definition.default_mix
        if default is None:
            return math.nan
        return default if self.mix is None else self.mix

    def value_and_score(self, teacher_NC: Tensor, student_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Return value and `score`, column by column, from log-probabilities (without temperature**2)."""
        return self.definition.value_and_score(teacher_NC, student_NC, self.mix_weight)

    def score(self, teacher_NC: Tensor, student_NC: Tensor) -> Tensor:
        """Return the gradient of the divergence, column by column, from log-probabilities (without temperature**2).

        With centre = sum over the vocabulary of score, the gradient with respect to the student's logit v is
        score_v - centre * p_v, p = exp(student). Any multiple of p may be added to the score: except for fkl, it is
        chosen so that equal models score 0, whatever rounding follows.
        """
        if self.teacher_leads:  # the value is not needed, and would be most of the work
            return teacher_NC.exp().neg_()
        return self.value_and_score(teacher_NC, student_NC)[1]


def _fkl(teacher_NC: Tensor, student_NC: Tensor, _mix: float) -> tuple[Tensor, Tensor]:
    mass = teacher_NC.exp()
    return mass * (teacher_NC - student_NC), -mass


def _rkl(teacher_NC: Tensor, student_NC: Tensor, _mix: float) -> tuple[Tensor, Tensor]:
    score = student_NC.exp() * (student_NC - teacher_NC)
    return score, score


def _jsd(teacher_NC: Tensor, student_NC: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    mixed = _mixture(teacher_NC, student_NC, mix)
    score = student_NC.exp() * (student_NC - mixed) * (1 - mix)
    return teacher_NC.exp() * (teacher_NC - mixed) * mix + score, score


def _sfkl(teacher_NC: Tensor, student_NC: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    gap = teacher_NC - _mixture(teacher_NC, student_NC, mix)
    return teacher_NC.exp() * gap, student_NC.exp() * (1 - gap.exp()) * (1 - mix)


def _srkl(teacher_NC: Tensor, student_NC: Tensor, mix: float) -> tuple[Tensor, Tensor]:
    gap = student_NC - _mixture(student_NC, teacher_NC, mix)
    mass = student_NC.exp()
    return mass * gap, mass * (gap + mix * (1 - gap.exp()))


def _mixture(first: Tensor, second: Tensor, mix: float) -> Tensor:
    """Return log(mix e^first + (1 - mix) e^second)."""
    return torch.logaddexp(first + math.log(mix), second + math.log1p(-mix))


_KERNELS = "megatron_fdd.ops.gpu.kernels"

DIVERGENCES: dict[str, DivergenceKind] = {
    "fkl": DivergenceKind(
        value_and_score=_fkl,
        formula="KL(T || S)",
        explanation="the student covers all that the teacher finds likely",
        triton=f"{_KERNELS}:fkl",
        leader="teacher",
    ),
    "rkl": DivergenceKind(
        value_and_score=_rkl,
        formula="KL(S || T)",
        explanation="the student avoids what the teacher finds unlikely",
        triton=f"{_KERNELS}:rkl",
        leader="student",
    ),
    "jsd": DivergenceKind(
        value_and_score=_jsd,
        formula="mix KL(T || M) + (1 - mix) KL(S || M), M = mix T + (1 - mix) S",
        explanation="Jensen-Shannon: between both, and bounded",
        default_mix=0.5,
        triton=f"{_KERNELS}:jsd",
    ),
    "sfkl": DivergenceKind(
        value_and_score=_sfkl,
        formula="KL(T || mix T + (1 - mix) S)",
        explanation="like fkl, but bounded",
        default_mix=0.1,
        triton=f"{_KERNELS}:sfkl",
    ),
    "srkl": DivergenceKind(
        value_and_score=_srkl,
        formula="KL(S || mix S + (1 - mix) T)",
        explanation="like rkl, but bounded",
        default_mix=0.1,
        triton=f"{_KERNELS}:srkl",
    ),
}
"""Every divergence by its name, the choice of `--fdd-kd-divergence` and `--fdd-trajectory-divergence`."""


def add_divergence(name: str, kind: DivergenceKind) -> None:
    """Add a divergence to the table by a name, before a command line is read. It is then fused wherever others are.

    Raises:
        ValueError: the name is taken or malformed, or `kind` breaks a rule of `DivergenceKind`; its functions are
            tried on a few random distributions.
    """
    if not isinstance(kind, DivergenceKind):
        raise ValueError(f"divergence {name!r}: must be a DivergenceKind: {kind!r} is none")
    if name in DIVERGENCES:
        raise ValueError(f"divergence {name!r} exists: give yours another name than {tuple(DIVERGENCES)}")
    if not isinstance(name, str) or re.fullmatch(r"[a-z][a-z0-9_-]*", name) is None:
        raise ValueError(
            f"divergence name {name!r}: use a small letter, then small letters, digits, - and _, as in 'tv'"
        )
    if kind.leader is not None:
        raise ValueError(
            f"divergence {name!r} has the leader {kind.leader!r}: only fkl and rkl need one sweep; leave it out"
        )
    mix = kind.default_mix
    if mix is not None and (not isinstance(mix, (int, float)) or not 0 < mix < 1):
        raise ValueError(f"divergence {name!r} has default_mix {mix!r}: it must lie between 0 and 1")
    for what in ("formula", "explanation"):
        text = getattr(kind, what)
        if not isinstance(text, str):
            raise ValueError(
                f"divergence {name!r} has the {what} {text!r}: give it a text, which --help shows"
            )
    check_functions(name, kind.value_and_score, (math.nan,) if mix is None else (mix, 0.37))
    check_triton(name, kind.triton)
    DIVERGENCES[name] = kind


def check_triton_function(name: str) -> None:
    """Refuse a divergence without a Triton function, where Triton is asked for.

    Raises:
        ValueError: names the divergence, and the implementation that can compute it.
    """
    if DIVERGENCES[name].triton is None:
        raise ValueError(
            f"divergence {name!r} has no Triton function: use --fdd-kernels torch (or auto), or add it with one "
            "(`triton` of DivergenceKind)"
        )
