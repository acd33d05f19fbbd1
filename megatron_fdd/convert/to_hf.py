"""The export from Megatron to Hugging Face."""

from __future__ import annotations

import itertools
import shutil
from argparse import Namespace
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch
import torch.distributed as dist

from megatron_fdd.convert.checksums import Checksums
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.family import HfConfig
from megatron_fdd.convert.hf_companions import HF_FOLDER, find_beside, find_hf_config, find_tokenizer
from megatron_fdd.convert.hf_folder import CONFIG_FILES, copy_files
from megatron_fdd.convert.hf_writer import (
    Shard,
    check_new_folder,
    parse_size,
    plan_shards,
    write_index,
    write_shard,
)
from megatron_fdd.convert.kept_scales import QuantisedExport, quantised_export
from megatron_fdd.convert.left_out import LEFT_OUT_FOLDER, PROCESSOR_FILES, SCALES_FOLDER
from megatron_fdd.convert.mcore_model import name_of
from megatron_fdd.convert.model_card import CARD_FILE, CardSubject, model_card
from megatron_fdd.convert.ranks import conversion_ranks, owners, shared_new_folder
from megatron_fdd.convert.table_export import TableExport, table_export
from megatron_fdd.data.tokenizer_identity import TOKENIZER_FILES
from megatron_fdd.host.bar import Bar
from megatron_fdd.host.file_sums import check_sums
from megatron_fdd.host.json_file import read_json, write_json
from megatron_fdd.host.model_fields import check_stored_args
from megatron_fdd.host.together import together

CONFIG_FILE, GENERATION_FILE = CONFIG_FILES
AnyExport = TableExport | QuantisedExport
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
        remark: for people, about the sums of the checkpoint's files, if they were compared, and about ids in the
            generation config that the model does not have.
        loads_as: the `model_type` that config.json must be given before transformers loads the folder; empty if it
            does so as it is.
    """

    num_tensors: int
    unchanged: int | None
    left_out: tuple[str, ...] = ()
    remark: str = ""
    loads_as: str = ""


class ExportOptions(TypedDict, total=False):
    """Options of an export; one that is left out has its default.

    Attributes:
        hf_config: config.json to start from, or a folder with one; see `find_hf_config` for the default.
        tokenizer: folder with tokenizer files; see `find_tokenizer` for the default.
        dtype: "checkpoint" (the default) keeps the stored dtype; the others are float32, bfloat16 and float16.
        max_shard_size: largest size of one file, by default 5GB; a larger tensor gets its own file.
        progress: whether to show a progress bar; by default not.
        skip_checksums: whether to read the checkpoint's files without comparing them with their sums before; by
            default not.
        ckpt_step: the iteration to take; by default the newest.
        quantised: whether to write the codes and scales of the quantised folder that was imported, instead of the
            values; by default not.
    """

    hf_config: Path | None
    tokenizer: Path | None
    dtype: str
    max_shard_size: str
    progress: bool
    skip_checksums: bool
    ckpt_step: int | None
    quantised: bool


def mcore_to_hf(load: Path, hf_out: Path, **options: Unpack[ExportOptions]) -> Exported:
    """Write the model of a Megatron checkpoint as a Hugging Face folder.

    Only weights are read, from a checkpoint saved at any layout. The shape of the model comes from the
    checkpoint's args; what Megatron does not keep (token ids, generation config) comes from `hf_config`. Under
    torchrun the ranks share the files; a rank reads its parameters ahead, within `MAX_BYTES`. The written
    bytes are the same for any number of ranks. `checksums.json` lists the checksum of every tensor.

    Collectives: barriers, and gathers of a few words per tensor, over all ranks.

    Raises:
        ValueError: something cannot be converted; the message names it and the flag that helps. The same on every rank.
    """
    load, hf_out = Path(load), Path(hf_out)
    hf_config = options.get("hf_config")
    with conversion_ranks() as groups:
        from megatron_fdd.host.checkpoint import RELEASE, check_objects_together

        with together():
            check_new_folder(hf_out, "--hf-out")
            max_shard_bytes = parse_size(options.get("max_shard_size", "5GB"))
            checkpoint, args, left_out = _find(load, options.get("ckpt_step"))
            config_path = find_hf_config(load, args, hf_config)
            tokenizer_path = find_tokenizer(load, args, options.get("tokenizer"))
            kept = find_beside(load, args, LEFT_OUT_FOLDER)
            dtype = options.get("dtype", "checkpoint")
            table = table_export(checkpoint, args, read_json(config_path), dtype, groups, kept)
            export: AnyExport = table
            # No report of the import lies beside a config that the user gives.
            imported = Checksums.read(config_path.parent) if hf_config is None else None
            if table.left_out is not None and imported is not None:
                table.left_out.check_origin(imported)
            if options.get("quantised"):
                _check_quantised(checkpoint.name == RELEASE, dtype, hf_config)
                export = quantised_export(table, find_beside(load, args, SCALES_FOLDER))
                config_path, imported = export.scales.path / CONFIG_FILE, None
            strange = _strange_ids(config_path.parent / GENERATION_FILE, table.vocab_size)
            shards = plan_shards(export.specs(), max_shard_bytes)
        check_objects_together({"--load": checkpoint})
        remark = check_sums({"--load": checkpoint}, skip=options.get("skip_checksums", False))
        with shared_new_folder(hf_out, "--hf-out") as unfinished:
            digests = _write_own(unfinished, shards, export, options.get("progress", False))
            written = Checksums("mixed" if options.get("quantised") else name_of(export.dtype), digests)
            if checkpoint.name == RELEASE:
                _check_untouched(written, imported, load)
            with together():
                if dist.get_rank() == 0:
                    write_index(unfinished, shards)
                    _write_config(unfinished, config_path, export.config, export.dtype)
                    copy_files(TOKENIZER_FILES, tokenizer_path, unfinished)
                    if table.left_out is not None and kept is not None:
                        copy_files(PROCESSOR_FILES, kept, unfinished)
                    written.write(unfinished)
                    _write_card(unfinished, hf_out, checkpoint, args, written)
    remark = "\n".join(filter(None, [remark, *strange]))
    loads_as = family_of(export.config).same_as
    return Exported(written.count(), written.count_same(imported), left_out, remark, loads_as)


def _find(load: Path, step: int | None) -> tuple[Path, Namespace, tuple[str, ...]]:
    """Find a checkpoint; return its folder, its arguments, and names of what terms of a distillation learned."""
    from megatron_fdd.host.checkpoint import (
        check_no_spec,
        find_checkpoint,
        read_checkpoint_args,
        term_shapes,
    )

    checkpoint = find_checkpoint(str(load), "--load", step=step, leaves_objects=True)
    args = check_stored_args(read_checkpoint_args(checkpoint, "--load"), f"--load {checkpoint}")
    check_no_spec(args, "--load", "a family gives its layers a table (docs/extend/family.md)")
    return checkpoint, args, tuple(sorted(term_shapes(checkpoint, "--load")))


def _check_quantised(is_import: bool, dtype: str, hf_config: Path | None) -> None:
    """Refuse codes for weights that a training has changed, or that something else changes."""
    if not is_import:
        raise ValueError(
            "--quantised: a training has changed the weights, and the kept scales are those of the imported ones; "
            "leave the flag out, and quantise the export with another program"
        )
    if dtype != "checkpoint" or hf_config is not None:
        raise ValueError(
            "--quantised: writes the imported folder again; leave out --dtype and --hf-config, or it"
        )


def _write_card(
    unfinished: Path, hf_out: Path, checkpoint: Path, args: Namespace, written: Checksums
) -> None:
    """Write the model card of an export that is whole but for it."""
    label, name = checkpoint.name.removeprefix("iter_"), hf_out.resolve().name
    if label.isdecimal() and name == checkpoint.name:  # says nothing to a reader
        name = f"{checkpoint.parent.resolve().name}, iteration {int(label):,}"
    subject = CardSubject(
        name=name,
        load=checkpoint.parent,
        iteration=int(label) if label.isdecimal() else None,
        args=args,
        config=read_json(unfinished / CONFIG_FILE),
        written=written,
    )
    (unfinished / CARD_FILE).write_text(model_card(subject), encoding="utf-8")


def _strange_ids(path: Path, size: int) -> list[str]:
    """Return a warning for each field of a generation config with a token id that the model has no row for.

    Raises:
        ValueError: the file is no JSON object.
    """
    found = []
    for name, value in read_json(path).items() if path.is_file() else ():
        ids = value if isinstance(value, list) else [value]
        if name.endswith("_token_id") and any(type(each) is int and not 0 <= each < size for each in ids):
            found.append(
                f"warning: {GENERATION_FILE}: {name} is {value}, and the ids of the model are 0 to {size - 1}; correct "
                "it before you generate"
            )
    return found


def _check_untouched(written: Checksums, imported: Checksums | None, load: Path) -> None:
    """Refuse a converted model that no training has changed and that is not what was converted."""
    if imported is not None and imported.dtype == written.dtype:
        for name in written.digests.keys() & imported.digests.keys():
            imported.check(load / HF_FOLDER, name, written.digests[name])


def _write_own(
    folder: Path, shards: list[Shard], export: TableExport | QuantisedExport, progress: bool
) -> dict[str, str]:
    """Write this rank's files; return tensor name -> digest for the tensors of all ranks.

    Collectives: two all-gathers over all ranks, also on a rank without files.
    """
    owner = owners([shard.num_bytes for shard in shards], dist.get_world_size())
    own = [shard for shard, rank in zip(shards, owner, strict=True) if rank == dist.get_rank()]
    digests: dict[str, str] = {}
    bar = Bar(
        total=sum(shard.num_bytes for shard in own),
        desc="writing",
        unit="B",
        is_shown=progress and dist.get_rank() == 0,
    )
    specs = [spec for shard in own for spec in shard.tensors]
    with bar, together(), closing(export.read(specs)) as values:
        for shard in own:
            tensors = itertools.islice(values, len(shard.tensors))
            for spec, digest in write_shard(folder, shard, tensors, _OTHER_WEIGHTS):
                digests[spec.name] = digest
                bar.update(spec.num_bytes)
    everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    return {name: digest for each in everyone for name, digest in each.items()}


def _write_config(folder: Path, seed_path: Path, config: HfConfig, dtype: torch.dtype) -> None:
    """Write the config with the dtype of the weights; it is the seed, byte for byte, if nothing changed."""
    named: HfConfig = {key: name_of(dtype) for key in ("dtype", "torch_dtype") if key in config}
    config = {**config, **named}
    if config == read_json(seed_path):
        shutil.copyfile(seed_path, folder / CONFIG_FILE)
    else:
        write_json(folder / CONFIG_FILE, config)
    copy_files([GENERATION_FILE], seed_path.parent, folder)
