"""The modules that terms of inner layers learn or keep for the taps of a chunk, made alike on every rank."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import torch
from torch import nn

from megatron_fdd.config import FddConfig
from megatron_fdd.losses.own_term import ask_module
from megatron_fdd.losses.term import TapTerm
from megatron_fdd.losses.terms import tap_terms

TapModules = Mapping[tuple[str, int], nn.Module]
"""By kind of term, and by the index of the tap's pair in the run's."""

NO_MODULES: TapModules = MappingProxyType({})


def make_modules(config: FddConfig, pairs: Collection[int], widths: tuple[int, int]) -> TapModules:
    """Make the modules of all terms for some taps, in host memory.

    What is drawn follows from kind and index alone: neither the rank, nor the layout, nor the seed of the run
    changes it. Random state is as it was before.

    Args:
        pairs: indices in the run's pairs. A term that compares a tap with the one before it has nothing for the first.
        widths: hidden width of student and teacher.
    """
    made: dict[tuple[str, int], nn.Module] = {}
    for term in tap_terms(config):
        for index in pairs:
            module = None if index < term.reach else _make(term, index, widths, config)
            if module is not None:
                made[term.kind, index] = module
    return made


@dataclass(frozen=True, slots=True)
class ModuleSize:
    """The size of a term's module for one tap.

    Attributes:
        saved: shapes of what checkpoints hold of it, by name in the module.
        num_trained: parameters that are trained.
    """

    saved: Mapping[str, tuple[int, ...]]
    num_trained: int


NOTHING = ModuleSize({}, 0)


@cache
def module_size(term: TapTerm, widths: tuple[int, int], config: FddConfig) -> ModuleSize:
    """Make one tap's module and measure it: those of all taps are alike.

    Raises:
        ValueError: it cannot be made, has a parameter that is not finite, or made a second time it is another one.
    """
    module, again = (_make(term, term.reach, widths, config) for _ in range(2))
    if module is None or again is None:
        return NOTHING
    odd = [name for name, parameter in module.named_parameters() if not bool(parameter.isfinite().all())]
    if odd:
        raise ValueError(
            f"the term {term.kind}: make_module gives {', '.join(odd)} values that are not finite: set each with "
            "torch.nn.init (torch.empty holds what was in memory)"
        )
    if not _are_equal(module, again):
        raise ValueError(
            f"the term {term.kind}: make_module must return the same at every call, or ranks would train different "
            "ones: draw with torch's generator alone, which is seeded for it"
        )
    saved = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    return ModuleSize(saved, sum(p.numel() for p in module.parameters() if p.requires_grad))


def saved_shapes(config: FddConfig, num_pairs: int, widths: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Return shapes of all that the terms of a run save, by name: `KIND.PAIR.NAME`."""
    return {
        f"{term.kind}.{index}.{name}": shape
        for term in tap_terms(config)
        for index in range(term.reach, num_pairs)
        for name, shape in module_size(term, widths, config).saved.items()
    }


def trained_parameters(config: FddConfig, pairs: Collection[int], widths: tuple[int, int]) -> int:
    """Count the parameters that the terms train for some taps."""
    return sum(
        module_size(term, widths, config).num_trained * sum(index >= term.reach for index in pairs)
        for term in tap_terms(config)
    )


def _are_equal(module: nn.Module, other: nn.Module) -> bool:
    one, two = ([*each.named_parameters(), *each.named_buffers()] for each in (module, other))
    return len(one) == len(two) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, two, strict=True)
    )


def _make(term: TapTerm, index: int, widths: tuple[int, int], config: FddConfig) -> nn.Module | None:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.random.default_generator.manual_seed(random.Random(f"term {term.kind} {index}").getrandbits(63))
        return ask_module(term, widths, config)
