"""The base class of a term of the loss: all that objective, log, plan, report and documentation know about it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.tap import TapWindow, TokenWeights
from megatron_fdd.ops.delta import HeadGrams
from megatron_fdd.ops.head_loss import masked_sum
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.own_code import called


@dataclass(frozen=True, slots=True)
class Needs:
    """The things that a step has to provide for a term.

    Attributes:
        teacher: the teacher's features.
        divergence: `Tap.divergence`.
        lse: `Tap.statistics`.
        grams: Gram matrices of both heads.
    """

    teacher: bool = False
    divergence: bool = False
    lse: bool = False
    grams: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.teacher or other.teacher,
            self.divergence or other.divergence,
            self.lse or other.lse,
            self.grams or other.grams,
        )


@dataclass(frozen=True, slots=True)
class TapContext:
    """The things that a term of inner layers may use beside the taps.

    Attributes:
        weights: of the rows that are looked at.
        grams: makes the Gram matrices of both heads once a step; its collectives are those of `head_grams`.
        module: what the term's `make_module` made for this tap.
    """

    config: FddConfig
    heads: Heads
    weights: TokenWeights
    grams: Callable[[], HeadGrams]
    module: nn.Module | None = None

    def sum(self, value_M: Tensor) -> Tensor:
        """Sum over the rows that count, each weighted. A masked row contributes exactly 0, whatever it holds.

        Raises:
            ValueError: not one number for each row.
        """
        if value_M.shape != self.weights.term_N.shape:
            raise ValueError(
                f"a term's values have the shape {[*value_M.shape]}: they must be one number for each row, "
                f"{[*self.weights.term_N.shape]}"
            )
        return masked_sum(value_M, self.weights.term_N)


class Term(ABC):
    """A kind of term.

    Attributes:
        kind: one word; how flags, logs and files name it.
        flag: which gives its weight.
        title: what it is, in the report.
        unit: of its mean over tokens.
        color: of its share in the report's picture; empty: the report chooses one.
        tokens: whether its mean is over tokens with a label, or over those that `--fdd-tokens` chose.
        is_always_logged: measured wherever the final logits are there, be its weight 0.
        settings: names of `FddConfig` on which its value depends, beside the models.
    """

    kind: ClassVar[str]
    flag: ClassVar[str]
    title: ClassVar[str]
    unit: ClassVar[str] = "nats per token"
    color: ClassVar[str] = ""
    tokens: ClassVar[Literal["labels", "term"]] = "term"
    is_always_logged: ClassVar[bool] = False
    settings: ClassVar[tuple[str, ...]] = ("tokens",)

    @abstractmethod
    def weight(self, config: FddConfig) -> float:
        """Return the factor of the term's mean in the total; 0 switches the term off."""

    def needs(self, _config: FddConfig) -> Needs:
        """Return what the term needs if its weight is not 0."""
        return Needs(teacher=True)

    def variant(self, _config: FddConfig) -> str:
        """Name the form of the term that a run uses, for the plan; empty if the term has one form."""
        return ""


class TapTerm(Term):
    """A term of inner layers: one value for each tap, and their mean in the total.

    Attributes:
        caption: what a layer's value says, in the report.
        reach: 1 where a tap is compared with the one before it, so that the first tap has no value; else 0.
    """

    flag = "--fdd-term"
    caption: ClassVar[str]
    reach: ClassVar[Literal[0, 1]] = 0

    def weight(self, config: FddConfig) -> float:
        """Return the weight that `--fdd-term` gives; 0 if the flag does not name the term."""
        return dict(config.term).get(self.kind, 0.0)

    @abstractmethod
    def compute(self, window: TapWindow, context: TapContext) -> Tensor:
        """Sum the term over this rank's rows, float32, each with its weight; `context.sum` does so.

        Under tensor parallelism without sequence parallelism all its ranks have the same rows, and the same result.
        """

    def make_module(self, _widths: tuple[int, int], _config: FddConfig) -> nn.Module | None:
        """Make what the term learns or keeps for a tap, float32. It is drawn for each tap, equally on every rank.

        Its parameters are trained and saved with the student's. A buffer that is not persistent is made anew by each
        run, the same again.

        Args:
            _widths: hidden width of student and teacher.
        """
        return None

    def flops(self, _widths: tuple[int, int], _config: FddConfig) -> int:
        """Count flops for a token and a tap, forward and backward, beside those of `measure`.

        Args:
            _widths: hidden width of student and teacher.
        """
        return 0


def computed(term: TapTerm, window: TapWindow, context: TapContext) -> Tensor:
    """Compute a term at a tap.

    Raises:
        ValueError: the term fails or writes to what it reads; the result is not one float32 number on the tap's device,
            or would train nothing.
    """
    features = [tap.features for tap in (window.current, window.previous) if tap is not None]
    read = [tensor for each in features for tensor in each.tensors]
    before = [tensor._version for tensor in read]
    result = called(f"the term {term.kind}: compute", term.compute, window, context)
    if before != [tensor._version for tensor in read]:
        raise ValueError(
            f"the term {term.kind} writes to the features of a tap, which others read: compute must make new tensors "
            "(x * 2, not x.mul_(2))"
        )
    student_MD = window.current.features.student_MD
    if not (
        isinstance(result, Tensor)
        and result.shape == ()
        and result.dtype in (torch.float32, torch.float64)
        and result.device == student_MD.device
    ):
        is_tensor = isinstance(result, Tensor)
        found = f"{[*result.shape]} of {result.dtype} on {result.device}" if is_tensor else repr(result)
        raise ValueError(
            f"the term {term.kind} gives {found}: compute must return context.sum(one number a row)"
        )
    if student_MD.requires_grad and not result.requires_grad:
        raise ValueError(
            f"the term {term.kind} does not depend on the student, or its result is detached: it would train "
            "nothing; use the tap's student side"
        )
    return result
