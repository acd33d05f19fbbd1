"""The prepared sets that a run reads, by Megatron's flags, and where Megatron keeps its index of them."""

from __future__ import annotations

import argparse
import os

from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_fdd.data.datasets import TextDataset
from megatron_fdd.data.prepared import PreparedSet, open_set

# A blend in Megatron's form: prefixes, and weights or None.
Blend = tuple[list[str], list[float] | None]


def evaluates(args: argparse.Namespace) -> bool:
    """Whether the run reads validation and test data."""
    return bool(args.full_validation or args.eval_iters)


def cuts_documents(args: argparse.Namespace) -> bool:
    """Whether documents of plain text are cut once (`--fdd-text-units documents`); not without this package's flags."""
    return getattr(args, "fdd_text_units", "rows") == "documents"


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


def open_sets(args: argparse.Namespace) -> dict[str, PreparedSet]:
    """Open every set that the run reads, by prefix; those in object storage are left out.

    Raises:
        ValueError: as `open_set`.
    """
    return {prefix: open_set(prefix) for prefix in data_prefixes(args) if not is_object_storage_path(prefix)}


def cache_folder(args: argparse.Namespace, prefix: str) -> str:
    """Return the folder of Megatron's index cache of a set; its default has the name of the prefix."""
    return args.data_cache_path or os.path.join(prefix, "cache", f"{TextDataset.__name__}_indices")
