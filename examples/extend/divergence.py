"""A divergence of your own: total variation, half of what two distributions differ by (docs/extend/divergence.md)."""

from torch import Tensor

from megatron_fdd.ops.divergence import DivergenceKind, add_divergence

try:
    import triton
    import triton.language as tl
except ImportError:  # where no GPU is; torch computes it there
    on_gpu = None
else:

    @triton.jit
    def on_gpu(teacher, student, mix, log_mix, log_rest):
        """The same as `total_variation`."""
        mass = tl.exp(student)
        gap = mass - tl.exp(teacher)
        sign = tl.where(gap > 0, 1.0, tl.where(gap < 0, -1.0, 0.0))
        return tl.abs(gap) / 2, mass * sign / 2


def total_variation(teacher_NC: Tensor, student_NC: Tensor, _mix: float) -> tuple[Tensor, Tensor]:
    """|p_S - p_T| / 2, and its derivative with respect to log p_S."""
    mass = student_NC.exp()
    gap = mass - teacher_NC.exp()
    return gap.abs() / 2, mass * gap.sign() / 2


add_divergence(
    "tv",
    DivergenceKind(
        value_and_score=total_variation,
        formula="sum |T - S| / 2",
        explanation="total variation: at most 1, whatever the models say",
        triton=on_gpu,
    ),
)
