"""The trial of a divergence that a plug-in brings: its functions, on a few random distributions.

Shapes: N tokens (any number of rows), C columns (any part of the vocabulary).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fdd.ops.own_code import called, takes

ValueAndScore = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


def check_functions(name: str, function: ValueAndScore, mixes: Sequence[float]) -> None:
    """Refuse a function that, when tried, gives wrong shapes, types, rows, columns or derivatives."""
    if not takes(function, "teacher_NC", "student_NC", "mix"):
        raise ValueError(
            f"divergence {name!r}: value_and_score: it must be a function that takes (teacher_NC, student_NC, mix)"
        )
    draw = torch.Generator().manual_seed(0)
    teacher_NC, logits_NC = (torch.randn(8, 12, generator=draw, dtype=torch.float64) * 2 for _ in range(2))
    for mix in mixes:
        _check_at(name, function, mix, teacher_NC, logits_NC)
        _tried(name, function, mix, teacher_NC.float().log_softmax(-1), logits_NC.float().log_softmax(-1))


def check_triton(name: str, triton: Any) -> None:
    """Refuse what the kernels could not call, without a GPU: they would say so in the first step on one."""
    if triton is None or (isinstance(triton, str) and re.fullmatch(r"[\w.]+:\w+", triton)):
        return
    # What `@triton.jit` makes has the decorated function; Triton itself need not be there.
    function = getattr(triton, "fn", None)
    if isinstance(triton, str) or function is None:
        raise ValueError(
            f"divergence {name!r} has triton {triton!r}: give a function decorated with @triton.jit, or its "
            "'module:name'"
        )
    if not takes(function, "teacher", "student", "mix", "log_mix", "log_rest"):
        raise ValueError(
            f"divergence {name!r}: triton: it must be a function that takes (teacher, student, mix, log_mix, log_rest)"
        )


def _tried(
    name: str, function: ValueAndScore, mix: float, teacher_NC: Tensor, student_NC: Tensor
) -> tuple[Tensor, Tensor]:
    """Call the function; refuse results that are not two tensors like its inputs, and finite."""
    result = called(f"divergence {name!r}: value_and_score", function, teacher_NC, student_NC, mix)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ValueError(
            f"divergence {name!r}: value_and_score returns {result!r}: return two tensors, value and score"
        )
    for what, tensor in zip(("value", "score"), result, strict=True):
        if not isinstance(tensor, Tensor) or (tensor.dtype, tensor.device) != (
            teacher_NC.dtype,
            teacher_NC.device,
        ):
            kind = f"{tensor.dtype} on {tensor.device}" if isinstance(tensor, Tensor) else repr(tensor)
            raise ValueError(
                f"divergence {name!r}: its {what} is {kind}: give a tensor of the inputs' dtype and device, here "
                f"{teacher_NC.dtype} on {teacher_NC.device}"
            )
        if tensor.shape != teacher_NC.shape or not tensor.isfinite().all():
            raise ValueError(
                f"divergence {name!r}: its {what} has the shape {[*tensor.shape]} or is not finite: give one finite "
                f"number for each log-probability, here {[*teacher_NC.shape]}"
            )
    return result[0], result[1]


def _check_at(name: str, function: ValueAndScore, mix: float, teacher_NC: Tensor, logits_NC: Tensor) -> None:
    """Refuse a divergence that is wrong at these logits and with this mix."""
    teacher_NC, logits_NC = teacher_NC.log_softmax(-1), logits_NC.clone().requires_grad_()
    student_NC = logits_NC.log_softmax(-1)
    value_NC, score_NC = _tried(name, function, mix, teacher_NC, student_NC)
    tensors = (value_NC, score_NC, teacher_NC, student_NC)
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    if set(places[:2]) & set(places[2:]) or 0 in (*value_NC.stride(), *score_NC.stride()):
        raise ValueError(
            f"divergence {name!r}: its value or score shares memory with an input or itself, and both are written to "
            "afterwards: return new tensors (.clone())"
        )
    for what, some in (("five columns", (slice(None), slice(5))), ("three rows", (slice(3), slice(None)))):
        some_teacher, some_student = (tensor[some].detach().clone() for tensor in (teacher_NC, student_NC))
        parts = (*_tried(name, function, mix, some_teacher, some_student), some_teacher, some_student)
        error = max(
            (part - whole[some]).abs().max().item() for part, whole in zip(parts, tensors, strict=True)
        )
        if not error <= 1e-9:
            raise ValueError(
                f"divergence {name!r}: {what} alone are off by {error:.2g}, or its inputs are written to: "
                "compute each number from its own two log-probabilities, into new tensors"
            )
    if not value_NC.requires_grad:
        raise ValueError(
            f"divergence {name!r}: autograd cannot differentiate its value, as --fdd-kernels reference does: compute "
            "it with torch's functions, and detach nothing"
        )
    (wanted_NC,) = torch.autograd.grad(value_NC.sum(), logits_NC)
    error = (score_NC - score_NC.sum(-1, keepdim=True) * student_NC.exp() - wanted_NC).abs().max().item()
    if not error <= 1e-9:
        raise ValueError(
            f"divergence {name!r}: the score is off by up to {error:.2g} from the value's derivative with respect to "
            f"the student's log-probability (mix {mix:g}): correct one of the two"
        )
