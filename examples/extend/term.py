"""A term of your own: how far features lie from the teacher's, projected to its width (docs/extend/term.md)."""

from typing import ClassVar

from torch import Tensor, nn

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.tap import TapWindow
from megatron_fdd.losses.term import TapContext, TapTerm
from megatron_fdd.losses.terms import add_term


class FixedMse(TapTerm):
    """|P s - t|^2 / |t|^2 for the features s and t that a layer of student and teacher would give to their heads.

    P is a constant: orthonormal, drawn at random for each layer, or nothing where both widths are the same. 1 is what a
    student of zeros has, whatever the layer and the teacher.
    """

    kind = "fixed_mse"
    title = "features, through a fixed projection"
    caption = "How far the student's features are from the teacher's."
    unit = "share of the teacher's squared length"
    color = "#8a6fb0"
    settings = ("tokens", "lens_norm", "teacher_lens")
    learns: ClassVar[bool] = False

    def make_module(self, widths: tuple[int, int], _config: FddConfig) -> nn.Module | None:
        if widths[0] == widths[1] and not self.learns:
            return None
        projection = nn.Linear(*widths, bias=False)
        nn.init.orthogonal_(projection.weight)
        if not self.learns:
            constant = projection.weight.detach()
            del projection.weight
            projection.register_buffer("weight", constant, persistent=False)  # no part of a checkpoint
        return projection

    def compute(self, window: TapWindow, context: TapContext) -> Tensor:
        features, student_MT = window.current.features, window.current.features.student_MD
        if isinstance(context.module, nn.Linear):
            student_MT = context.module(student_MT.to(context.module.weight.dtype)).float()
        gap_M = (student_MT - features.teacher_MT).square().sum(-1)
        return context.sum(gap_M / features.teacher_MT.square().sum(-1).clamp(min=1e-6))

    def flops(self, widths: tuple[int, int], _config: FddConfig) -> int:
        products = 3 if self.learns else 2 if widths[0] != widths[1] else 0
        return products * 2 * widths[0] * widths[1]


class LearnedMse(FixedMse):
    """The same, and P is trained with the student."""

    kind = "learned_mse"
    title = "features, through a learned projection"
    color = "#c06c84"
    learns = True


add_term(FixedMse())
add_term(LearnedMse())
