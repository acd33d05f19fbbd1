"""A Megatron checkpoint as the table of its family writes it: Hugging Face tensors, one parameter at a time."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.family import Family, HfConfig, WeightRow
from megatron_fdd.convert.families.transforms import split_blocks
from megatron_fdd.convert.hf_writer import TensorSpec
from megatron_fdd.convert.left_out import LEFT_OUT_FOLDER, LeftOutTensors
from megatron_fdd.convert.mcore_model import DTYPES, build_model, complete_args, stored_tensors
from megatron_fdd.host.ahead import ahead

if TYPE_CHECKING:  # importing Megatron takes seconds, and a rehearsal starts before it
    from megatron_fdd.convert.mcore_checkpoint import StoredWeights


@dataclass(frozen=True, slots=True)
class TableExport:
    """A model to be written: the place of its weights, and the table that writes them.

    Attributes:
        parameters: Megatron's names, shapes and stored dtypes, on the meta device.
        dtype: to write all in that have no dtype of their own.
        left_out: what the import kept beside the checkpoint; None without it.
    """

    weights: StoredWeights
    parameters: dict[str, Tensor]
    rows: list[WeightRow]
    config: HfConfig
    vocab_size: int
    dtype: torch.dtype
    left_out: LeftOutTensors | None = None

    @property
    def _row_of(self) -> dict[str, WeightRow]:
        """Map each Hugging Face name to its row."""
        return {name: row for row in self.rows for name in row.sources}

    def split(self, row: WeightRow, blocks: Sequence[Tensor]) -> list[Tensor]:
        """Split a Megatron parameter into its Hugging Face tensors, in the order of the row's sources.

        Args:
            blocks: its value, in blocks that follow one another in dim 0.
        """
        parts = split_blocks(row.transform, blocks)
        return [part[: self.vocab_size] for part in parts] if row.vocabulary else parts

    def specs(self) -> Iterator[TensorSpec]:
        """Yield every Hugging Face tensor, in the order of the table; what was left out comes last."""
        for row in self.rows:
            if row.sources:
                parts = self.split(row, [self.parameters[row.mcore]])
                for name, part in zip(row.sources, parts, strict=True):
                    yield TensorSpec(name, row.dtype or self.dtype, tuple(part.shape))
        if self.left_out is not None:
            yield from self.left_out.specs(self.dtype)

    def read(self, specs: Iterable[TensorSpec]) -> Generator[Tensor]:
        """Yield tensors in this order, read ahead by threads; a parameter is read once for all its tensors."""
        row_of = self._row_of

        def make(group: list[TensorSpec]) -> list[Tensor]:
            row = row_of.get(group[0].name)
            if row is None:
                assert self.left_out is not None
                return [self.left_out.read(spec) for spec in group]
            parts = dict(zip(row.sources, self.split(row, self.weights.read(row.mcore)), strict=True))
            return [parts[spec.name].to(spec.dtype).contiguous() for spec in group]

        def place(spec: TensorSpec) -> str:
            return row_of[spec.name].mcore if spec.name in row_of else spec.name

        groups = [list(group) for _, group in itertools.groupby(specs, place)]
        sized = [(group, sum(spec.num_bytes for spec in group)) for group in groups]
        with closing(ahead(make, sized)) as made:
            yield from itertools.chain.from_iterable(made)


def table_export(
    checkpoint: Path, args: Namespace, seed: HfConfig, dtype: str, groups: Any, left_out: Path | None = None
) -> TableExport:
    """Describe the model again from its Hugging Face config, so that no setting of the run has an effect.

    Args:
        left_out: the folder in which the import kept what the table has no place for.
    """
    from megatron_fdd.convert.mcore_checkpoint import StoredWeights, stored_layout

    family = family_of(seed)
    if family.of_args is not None:
        family = family.of_args(seed, args)
    check_architecture(args, family.fixed, family.model_type)
    config = family.hf_config(seed, args)
    kept = None if left_out is None else LeftOutTensors(left_out)
    if kept is None or not kept.fit(family, config):
        _check_needs_none(family, checkpoint)
        kept, config = None, family.without_left_out(config)
    elif family.keeps_left_out:
        family = family.as_stored(kept)
    architecture = family.megatron_args(config)
    stored_dtype, stored_rows = stored_layout(checkpoint)
    vocab_size = architecture["vocab_size"]
    if stored_rows < vocab_size:
        raise ValueError(
            f"{checkpoint} holds {stored_rows} vocabulary rows, fewer than the vocab_size {vocab_size} of the "
            "Hugging Face config; give the model's own config with --hf-config"
        )
    own_args = complete_args(
        {**family.fixed, **architecture},
        dtype=stored_dtype,
        vocabulary_divisor=args.make_vocab_size_divisible_by,
    )
    model = build_model(own_args, groups, "meta")
    rows = family.rows(config)
    tensors = stored_tensors(model, rows)
    weights = StoredWeights(checkpoint, model, groups)
    _check_absent_are_zero(weights, rows, family)
    own = [row.mcore for row in rows if row.dtype is not None]
    out_dtype = weights.common_dtype(except_for=own) if dtype == "checkpoint" else DTYPES[dtype]
    return TableExport(weights, tensors, rows, config, vocab_size, out_dtype, kept)


def _check_needs_none(family: Family, checkpoint: Path) -> None:
    """Refuse a model without what its import always keeps."""
    if family.keeps_left_out:
        raise ValueError(
            f"--load {checkpoint.parent}: the import of this {family.model_type} kept the part for images beside its "
            f"checkpoint, in {LEFT_OUT_FOLDER}/, and no such folder is here or there: copy it, or export the text "
            "model alone with --hf-config and its text_config as a config.json"
        )


def check_architecture(args: Namespace, fixed: Mapping[str, Any], model_type: str) -> None:
    """Refuse a checkpoint unless its args have the values that all models of a family have."""
    wrong = {name: getattr(args, name, value) for name, value in fixed.items()}
    wrong = {name: value for name, value in wrong.items() if value != fixed[name]}
    if wrong:
        told = ", ".join(f"{name} = {value!r} (needs {fixed[name]!r})" for name, value in wrong.items())
        raise ValueError(f"the checkpoint's model is not of the shape of a {model_type}: {told}")


def _check_absent_are_zero(weights: StoredWeights, rows: list[WeightRow], family: Family) -> None:
    """Refuse values other than 0 that have no place in the Hugging Face model. Every rank checks all values."""
    trained = [row.mcore for row in rows if not row.sources and any(map(torch.any, weights.read(row.mcore)))]
    if trained:
        raise ValueError(
            f"config.json gives this {family.model_type} no place for {', '.join(trained)}, which are not zero; "
            'pass --hf-config with "attention_bias" and "mlp_bias" both true'
        )
