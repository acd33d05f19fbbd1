"""The rules for a term that a plug-in brings: what its record holds, and what its methods return."""

from __future__ import annotations

import dataclasses
import math
import re

import torch
from torch import nn

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.term import Needs, TapTerm, Term
from megatron_fdd.ops.own_code import called, takes

# The methods that the package calls, and their arguments.
_METHODS = {
    "compute": ("window", "context"),
    "needs": ("config",),
    "make_module": ("widths", "config"),
    "flops": ("widths", "config"),
    "variant": ("config",),
}


def check_record(term: TapTerm) -> None:
    """Refuse a term that lacks an attribute, or has one that cannot be used.

    Raises:
        ValueError: names the term's class and the attribute.
    """
    name = type(term).__name__
    texts = ("kind", "title", "caption", "unit", "color")
    missing = [each for each in texts if not isinstance(getattr(term, each, None), str)]
    if missing:
        raise ValueError(f"the term {name} has no {', '.join(missing)}: give it a text for each")
    if re.fullmatch("(#[0-9a-fA-F]{6})?", term.color) is None:
        raise ValueError(
            f"the term {name} has the color {term.color!r}: write one as '#8a6fb0', or leave it out"
        )
    if type(term).__hash__ is None:
        raise ValueError(f"the term {name} cannot be hashed: leave @dataclass out, or give it frozen=True")
    if term.reach not in (0, 1):
        raise ValueError(f"the term {name} has reach {term.reach!r}: it must be 0 or 1")
    if term.tokens != TapTerm.tokens:
        raise ValueError(
            f"the term {name} has tokens {term.tokens!r}: a term of inner layers counts those of --fdd-tokens; leave "
            "it out"
        )
    if term.flag != TapTerm.flag:
        raise ValueError(
            f"the term {name} has flag {term.flag!r}: the weight of an own term comes from {TapTerm.flag}; leave it out"
        )
    if type(term).weight is not TapTerm.weight:
        raise ValueError(
            f"the term {name} has a method weight: the weight of an own term comes from {TapTerm.flag}; leave it out"
        )
    _check_methods(term)
    _check_settings(term)


def _check_methods(term: TapTerm) -> None:
    """Refuse a method that cannot be called as the package calls it."""
    for method, arguments in _METHODS.items():
        if not takes(getattr(term, method), *arguments):
            raise ValueError(
                f"the term {type(term).__name__}: {method}: it must be a method that takes ({', '.join(arguments)})"
            )


def _check_settings(term: TapTerm) -> None:
    """Refuse settings that are no names of the config's fields."""
    name, settings = type(term).__name__, term.settings
    if not isinstance(settings, (tuple, list)) or not all(isinstance(each, str) for each in settings):
        raise ValueError(
            f"the term {name} has the settings {settings!r}: give a tuple of names, such as ('tokens', 'lens_norm')"
        )
    unknown = sorted(set(settings) - {field.name for field in dataclasses.fields(FddConfig)})
    if unknown:
        raise ValueError(
            f"the term {name} has the settings {unknown}, which FddConfig has not: use names of its fields"
        )


def ask_needs(term: Term, config: FddConfig) -> Needs:
    """Ask a term what it needs.

    Raises:
        ValueError: its method fails, or returns something else.
    """
    found = called(f"the term {term.kind}: needs", term.needs, config)
    if not isinstance(found, Needs):
        raise ValueError(
            f"the term {term.kind}: needs returns {found!r}: it must return a Needs, such as Needs(lse=True)"
        )
    return found


def ask_flops(term: TapTerm, widths: tuple[int, int], config: FddConfig) -> float:
    """Ask a term for its flops for a token and a tap.

    Raises:
        ValueError: its method fails, or returns no number that can be one.
    """
    found = called(f"the term {term.kind}: flops", term.flops, widths, config)
    if not isinstance(found, (int, float)) or not 0 <= found < math.inf:
        raise ValueError(f"the term {term.kind}: flops returns {found!r}: it must return a number, 0 or more")
    return found


def ask_module(term: TapTerm, widths: tuple[int, int], config: FddConfig) -> nn.Module | None:
    """Ask a term for its module for a tap.

    Raises:
        ValueError: its method fails, or returns what cannot be trained and kept.
    """
    module = called(f"the term {term.kind}: make_module", term.make_module, widths, config)
    if module is None:
        return None
    if not isinstance(module, nn.Module):
        raise ValueError(
            f"the term {term.kind}: make_module returns {module!r}: it must return a torch module, or None"
        )
    tensors = [*module.named_parameters(), *module.named_buffers()]
    wrong = [name for name, tensor in tensors if tensor.device.type != "cpu" or tensor.dtype == torch.float64]
    if wrong:
        raise ValueError(
            f"the term {term.kind}: make_module returns {', '.join(wrong)} on another device than the CPU, or in "
            "float64: make them on the CPU in float32"
        )
    return module
