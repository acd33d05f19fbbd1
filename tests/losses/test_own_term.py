"""A term of a plug-in that breaks a rule: in its record, in what its methods return, in what it computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.own_term import ask_flops, ask_module, ask_needs
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.tap import Features, Tap, TapWindow
from megatron_fdd.losses.term import Needs, TapContext, TapTerm, computed
from megatron_fdd.losses.terms import TERMS, add_term

CONFIG = FddConfig(teacher_load="T")


class Length(TapTerm):
    """A whole one."""

    kind = "length"
    title = "difference of lengths"
    caption = "How much longer one is."

    def compute(self, window: TapWindow, _context: TapContext) -> Tensor:
        return window.current.features.student_MD.sum()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"reach": 2}, "reach 2: it must be 0 or 1"),
        ({"caption": None}, "has no caption: give it"),
        ({"settings": ("tokenz",)}, r"the settings \['tokenz'\].*use names of its fields"),
        ({"unit": None}, "has no unit: give it"),
        ({"color": 7}, "has no color: give it"),
        ({"tokens": "labels"}, "tokens 'labels': a term of inner layers counts those of --fdd-tokens"),
        ({"flag": "--mine"}, "flag '--mine': the weight of an own term comes from --fdd-term"),
        ({"compute": "student_MD"}, r"compute: it must be a method that takes \(window, context\)"),
        (
            {"compute": lambda _self, _window: None},
            r"compute: it must be a method that takes \(window, context\)",
        ),
        ({"settings": None}, "the settings None: give a tuple of names"),
        ({"settings": "tokens"}, "the settings 'tokens': give a tuple of names"),
        ({"color": "red"}, "color 'red': write one as '#8a6fb0', or leave it out"),
        ({"weight": lambda _self, _config: 1.0}, "a method weight: the weight of an own term comes from"),
        ({"needs": Needs(lse=True)}, r"needs: it must be a method that takes \(config\)"),
        ({"flops": 7}, r"flops: it must be a method that takes \(widths, config\)"),
        ({"make_module": lambda _self, _widths: None}, r"make_module: it must be .* \(widths, config\)"),
        ({"__hash__": None}, "cannot be hashed: leave @dataclass out"),
    ],
)
def test_a_record_that_is_not_whole_is_refused(attributes: dict[str, Any], message: str) -> None:
    before = list(TERMS)
    with pytest.raises(ValueError, match=message):
        add_term(type("Broken", (Length,), attributes)())
    with pytest.raises(ValueError, match="an instance of a subclass of TapTerm"):
        add_term(cast(Any, Length))
    assert before == TERMS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda total: total[None], r"gives \[1\] of torch.float32 on cpu: compute must return context.sum"),
        (lambda total: total.bfloat16(), r"gives \[\] of torch.bfloat16"),
        (lambda total: total.item(), "gives 6.0"),
        (lambda total: total.to("meta"), r"gives \[\] of torch.float32 on meta"),
        (lambda total: total.detach(), "does not depend on the student, or its result is detached"),
    ],
)
def test_a_result_that_the_loss_cannot_use_is_refused(
    change: Callable[[Tensor], object], message: str
) -> None:
    student_MD = torch.ones(2, 3, requires_grad=True)
    window = window_of(student_MD)
    compute = Length().compute
    assert computed(Length(), window, cast(Any, None)).item() == 6
    changed = type("Changed", (Length,), {"compute": lambda _, *given: change(compute(*given))})()
    with pytest.raises(ValueError, match=message):
        computed(changed, window, cast(Any, None))


def window_of(student_MD: Tensor) -> TapWindow:
    rest = torch.ones(2, 3)
    return TapWindow(Tap(LayerPair(1, 2), Features(rest, rest.clone(), rest.clone(), student_MD)), None)


def leave(window: TapWindow, _context: TapContext) -> Tensor:
    raise SystemExit(0)


def write(window: TapWindow, _context: TapContext) -> Tensor:
    window.current.features.teacher_MT.zero_()
    return window.current.features.student_MD.sum()


def divide(*_: object) -> Any:
    return 1 / 0


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (leave, r"the term length: compute fails with SystemExit: 0 \(.*test_own_term.py, line \d+\)"),
        (divide, "compute fails with ZeroDivisionError: division by zero"),
        (write, "writes to the features of a tap, which others read: compute must make new tensors"),
    ],
)
def test_a_term_that_fails_or_spoils_what_it_reads_is_named(
    compute: Callable[..., Tensor], message: str
) -> None:
    term = type("Broken", (Length,), {"compute": lambda _, *given: compute(*given)})()
    with pytest.raises(ValueError, match=message):
        computed(term, window_of(torch.ones(2, 3, requires_grad=True)), cast(Any, None))


@pytest.mark.parametrize(
    ("method", "returned", "message"),
    [
        ("needs", None, "the term length: needs returns None: it must return a Needs"),
        ("needs", {"lse": True}, "needs returns {'lse': True}: it must return a Needs"),
        ("flops", "many", "flops returns 'many': it must return a number, 0 or more"),
        ("flops", float("nan"), "flops returns nan"),
        ("flops", -1, "flops returns -1"),
        ("make_module", {}, "make_module returns {}: it must return a torch module, or None"),
        (
            "make_module",
            torch.nn.Linear(2, 2, device="meta"),
            "returns weight, bias on another device than the CPU",
        ),
        ("make_module", torch.nn.Linear(2, 2).double(), "or in float64: make them on the CPU in float32"),
    ],
)
def test_what_a_method_may_not_return_is_refused(method: str, returned: object, message: str) -> None:
    ask: Any = {"needs": ask_needs, "flops": ask_flops, "make_module": ask_module}[method]
    given = (CONFIG,) if method == "needs" else ((2, 2), CONFIG)
    with pytest.raises(ValueError, match=message):
        ask(type("Broken", (Length,), {method: lambda *_: returned})(), *given)
    with pytest.raises(ValueError, match=f"the term length: {method} fails with ZeroDivisionError"):
        ask(type("Broken", (Length,), {method: divide})(), *given)
    ask(Length(), *given)
