"""The export from Megatron to Hugging Face."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_fdd.convert.checksums import Checksums, all_finite
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.family import Family, HfConfig, WeightRow
from megatron_fdd.convert.hf_companions import HF_FOLDER, find_hf_config, find_tokenizer
from megatron_fdd.convert.hf_folder import CONFIG_FILES, copy_files
from megatron_fdd.convert.hf_writer import (
    Shard,
    TensorSpec,
    check_new_folder,
    parse_size,
    plan_shards,
    write_index,
    write_shard,
)
from megatron_fdd.convert.mcore_model import DTYPES, build_model, complete_args, name_of
from megatron_fdd.convert.ranks import conversion_ranks, owners, shared_new_folder
from megatron_fdd.convert.to_mcore import Via, stored_tensors
from megatron_fdd.convert.vocabulary import TOKENIZER_FILES
from megatron_fdd.host.file_sums import check_sums
from megatron_fdd.host.json_file import read_json, write_json
from megatron_fdd.host.model_fields import check_stored_args
from megatron_fdd.host.together import together

if TYPE_CHECKING:  # importing Megatron takes seconds, and a rehearsal starts before it
    from megatron_fdd.convert.bridge_weights import BridgeExport
    from megatron_fdd.convert.mcore_checkpoint import StoredWeights

CONFIG_FILE, GENERATION_FILE = CONFIG_FILES
_OTHER_WEIGHTS = (
    "take an earlier checkpoint if its training diverged (--ckpt-step N), another copy, or a wider --dtype"
)


@dataclass(frozen=True, slots=True)
class Exported:
    """A summary of what an export wrote.

    Attributes:
        num_tensors: number of tensors in the Hugging Face folder.
        unchanged: number of these tensors with the bytes of the imported model; None if its checksums are not
            beside the checkpoint, or are for another dtype.
        left_out: names of the parameters that terms of the distillation learned beside the student.
        remark: for people, about the sums of the checkpoint's files; empty if they were not compared.
    """

    num_tensors: int
    unchanged: int | None
    left_out: tuple[str, ...] = ()
    remark: str = ""


class ExportOptions(TypedDict, total=False):
    """Options of an export; one that is left out has its default.

    Attributes:
        hf_config: config.json to start from, or a folder with one; see `find_hf_config` for the default.
        tokenizer: folder with tokenizer files; see `find_tokenizer` for the default.
        dtype: "checkpoint" (the default) keeps the stored dtype; the others are float32, bfloat16 and float16.
        max_shard_size: largest size of one file, by default 5GB; a larger tensor gets its own file.
        progress: whether to show a progress bar; by default not.
        via: "tables" (the default), or "bridge" for a model type that Megatron-Bridge knows and the tables lack; then
            one rank holds the model.
        skip_checksums: whether to read the checkpoint's files without comparing them with their sums before; by
            default not.
        ckpt_step: the iteration to take; by default the newest.
    """

    hf_config: Path | None
    tokenizer: Path | None
    dtype: str
    max_shard_size: str
    progress: bool
    via: Via
    skip_checksums: bool
    ckpt_step: int | None


def mcore_to_hf(load: Path, hf_out: Path, **options: Unpack[ExportOptions]) -> Exported:
    """Write the model of a Megatron checkpoint as a Hugging Face folder.

    Only weights are read, from a checkpoint saved at any layout. The shape of the model comes from the
    checkpoint's args; what Megatron does not keep (token ids, generation config) comes from `hf_config`. Under
    torchrun the ranks share the files; a rank holds one parameter at a time. The written bytes are the same for any
    number of ranks. `checksums.json` lists the SHA-256 of every tensor.

    Collectives: barriers, and gathers of a few words per tensor, over all ranks.

    Raises:
        ValueError: something cannot be converted; the message names it and the flag that helps. The same on every rank.
    """
    load, hf_out = Path(load), Path(hf_out)
    hf_config = options.get("hf_config")
    with conversion_ranks() as groups:
        from megatron_fdd.host.checkpoint import (
            RELEASE,
            check_no_spec,
            check_objects_together,
            find_checkpoint,
            read_checkpoint_args,
            term_shapes,
        )

        with together():
            check_new_folder(hf_out, "--hf-out")
            max_shard_bytes = parse_size(options.get("max_shard_size", "5GB"))
            step = options.get("ckpt_step")
            checkpoint = find_checkpoint(str(load), "--load", step=step, leaves_objects=True)
            args = check_stored_args(read_checkpoint_args(checkpoint, "--load"), f"--load {checkpoint}")
            check_no_spec(args, "--load", "a family gives its layers a table (docs/extend/family.md)")
            left_out = tuple(sorted(term_shapes(checkpoint, "--load")))
            config_path = find_hf_config(load, args, hf_config)
            tokenizer_path = find_tokenizer(load, args, options.get("tokenizer"))
            export = _prepare(checkpoint, args, config_path, groups, options)
            shards = plan_shards(export.specs(), max_shard_bytes)
            # No report of the import lies beside a config that the user gives.
            imported = Checksums.read(config_path.parent) if hf_config is None else None
        check_objects_together({"--load": checkpoint})
        remark = "" if options.get("skip_checksums") else check_sums({"--load": checkpoint})
        with shared_new_folder(hf_out, "--hf-out") as unfinished:
            written = Checksums(
                name_of(export.dtype), _write_own(unfinished, shards, export, options.get("progress", False))
            )
            if checkpoint.name == RELEASE:
                _check_untouched(written, imported, load)
            with together():
                if dist.get_rank() == 0:
                    write_index(unfinished, shards)
                    _write_config(unfinished, config_path, export.config, export.dtype)
                    copy_files(TOKENIZER_FILES, tokenizer_path, unfinished)
                    written.write(unfinished)
    return Exported(len(written.digests), written.count_same(imported), left_out, remark)


def _check_untouched(written: Checksums, imported: Checksums | None, load: Path) -> None:
    """Refuse a converted model that no training has changed and that is not what was converted."""
    if imported is not None and imported.dtype == written.dtype:
        for name in written.digests.keys() & imported.digests.keys():
            imported.check(load / HF_FOLDER, name, written.digests[name])


@dataclass(frozen=True, slots=True)
class _Export:
    """A model to be written: the place of its weights, and the table that writes them.

    Attributes:
        parameters: Megatron's names, shapes and stored dtypes, on the meta device.
        dtype: to write all in that have no dtype of their own.
    """

    weights: StoredWeights
    parameters: dict[str, Tensor]
    rows: list[WeightRow]
    config: HfConfig
    vocab_size: int
    dtype: torch.dtype

    @property
    def _row_of(self) -> dict[str, WeightRow]:
        """Map each Hugging Face name to its row."""
        return {name: row for row in self.rows for name in row.sources}

    def split(self, row: WeightRow, whole: Tensor) -> list[Tensor]:
        """Split a Megatron parameter into its Hugging Face tensors, in the order of the row's sources."""
        parts = row.transform.split(whole)
        return [part[: self.vocab_size] for part in parts] if row.vocabulary else parts

    def specs(self) -> Iterator[TensorSpec]:
        """Yield every Hugging Face tensor, in the order of the table."""
        for row in self.rows:
            if row.sources:
                parts = self.split(row, self.parameters[row.mcore])
                for name, part in zip(row.sources, parts, strict=True):
                    yield TensorSpec(name, row.dtype or self.dtype, tuple(part.shape))

    def read(self, shard: Shard) -> Iterator[Tensor]:
        """Yield the tensors of one file; a parameter is read once for all its tensors in sequence."""
        row_of = self._row_of
        current: WeightRow | None = None
        parts: dict[str, Tensor] = {}
        for spec in shard.tensors:
            if row_of[spec.name] is not current:
                parts.clear()  # free one parameter before reading the next
                current = row_of[spec.name]
                whole = self.weights.read(current.mcore)
                parts.update(zip(current.sources, self.split(current, whole), strict=True))
            yield parts.pop(spec.name).to(spec.dtype).contiguous()


def _write_own(
    folder: Path, shards: list[Shard], export: _Export | BridgeExport, progress: bool
) -> dict[str, str]:
    """Write this rank's files; return tensor name -> digest for the tensors of all ranks.

    Collectives: two all-gathers over all ranks, also on a rank without files.
    """
    owner = owners([shard.num_bytes for shard in shards], dist.get_world_size())
    own = [shard for shard, rank in zip(shards, owner, strict=True) if rank == dist.get_rank()]
    digests: dict[str, str] = {}
    bar = tqdm(
        total=sum(shard.num_bytes for shard in own),
        unit="B",
        unit_scale=True,
        desc="writing",
        disable=not progress or dist.get_rank() != 0,
    )
    with bar, together():
        for shard in own:
            tensors = all_finite(export.read(shard), (spec.name for spec in shard.tensors), _OTHER_WEIGHTS)
            for spec, digest in write_shard(folder, shard, tensors):
                digests[spec.name] = digest
                bar.update(spec.num_bytes)
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    return {name: digest for each in everyone for name, digest in each.items()}


def _prepare(
    checkpoint: Path, args: Namespace, config_path: Path, groups: Any, options: ExportOptions
) -> _Export | BridgeExport:
    dtype = options.get("dtype", "checkpoint")
    if options.get("via") == "bridge":
        from megatron_fdd.convert.bridge_weights import BridgeExport

        return BridgeExport(checkpoint, args, config_path, dtype, groups)
    return _by_table(checkpoint, args, read_json(config_path), dtype, groups)


def _by_table(checkpoint: Path, args: Namespace, seed: HfConfig, dtype: str, groups: Any) -> _Export:
    """Describe the model again from its Hugging Face config, so that no setting of the run has an effect."""
    from megatron_fdd.convert.mcore_checkpoint import StoredWeights, stored_layout

    family = family_of(seed)
    check_architecture(args, family.fixed, family.model_type)
    config = family.hf_config(seed, args)
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
    return _Export(weights, tensors, rows, config, vocab_size, out_dtype)


def check_architecture(args: Namespace, fixed: Mapping[str, Any], model_type: str) -> None:
    """Refuse a checkpoint unless its args have the values that all models of a family have."""
    wrong = {name: getattr(args, name, value) for name, value in fixed.items()}
    wrong = {name: value for name, value in wrong.items() if value != fixed[name]}
    if wrong:
        told = ", ".join(f"{name} = {value!r} (needs {fixed[name]!r})" for name, value in wrong.items())
        raise ValueError(f"the checkpoint's model is not of the shape of a {model_type}: {told}")


def _check_absent_are_zero(weights: StoredWeights, rows: list[WeightRow], family: Family) -> None:
    """Refuse values other than 0 that have no place in the Hugging Face model. Every rank checks all values."""
    trained = [row.mcore for row in rows if not row.sources and weights.read(row.mcore).any()]
    if trained:
        raise ValueError(
            f"config.json gives this {family.model_type} no place for {', '.join(trained)}, which are not zero; "
            'pass --hf-config with "attention_bias" and "mlp_bias" both true'
        )


def _write_config(folder: Path, seed_path: Path, config: HfConfig, dtype: torch.dtype) -> None:
    """Write the config with the dtype of the weights; it is the seed, byte for byte, if nothing changed."""
    named: HfConfig = {key: name_of(dtype) for key in ("dtype", "torch_dtype") if key in config}
    config = {**config, **named}
    if config == read_json(seed_path):
        shutil.copyfile(seed_path, folder / CONFIG_FILE)
    else:
        write_json(folder / CONFIG_FILE, config)
    copy_files([GENERATION_FILE], seed_path.parent, folder)
