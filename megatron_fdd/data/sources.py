"""The prepared sets that a run reads, by Megatron's flags."""

from __future__ import annotations

import argparse

from megatron.training.utils import get_blend_and_blend_per_split

# A blend in Megatron's form: prefixes, and weights or None.
Blend = tuple[list[str], list[float] | None]


def evaluates(args: argparse.Namespace) -> bool:
    """Whether the run reads validation and test data."""
    return bool(args.full_validation or args.eval_iters)


def blends(args: argparse.Namespace) -> tuple[Blend | None, list[Blend | None] | None]:
    """Return the blend for all parts together, or one for each of train, validation and test; only what is read."""
    blend, per_part = get_blend_and_blend_per_split(args)
    if per_part is not None and not evaluates(args):
        per_part = [per_part[0], None, None]
    return blend, per_part


def data_prefixes(args: argparse.Namespace) -> list[str]:
    """Return every prepared set that the run reads, once; empty with `--mock-data`."""
    blend, per_part = blends(args)
    used = [blend, *(per_part or [])]
    return list(dict.fromkeys(prefix for part in used if part is not None for prefix in part[0]))
