"""Megatron -> Hugging Face."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_fdd.convert.companions import find_hf_config, find_tokenizer
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.family import Family, HfConfig, Row
from megatron_fdd.convert.hf_folder import CONFIG_FILES, copy_files, read_json, write_json
from megatron_fdd.convert.hf_writer import ShardWriter, check_new_folder, new_folder, parse_size
from megatron_fdd.convert.mcore_checkpoint import (
    check_architecture,
    stored_layout,
)
from megatron_fdd.convert.mcore_model import DTYPES, build_model, complete_args, conversion_ranks
from megatron_fdd.convert.to_mcore import check_slices
from megatron_fdd.convert.tokenizer import TOKENIZER_FILES

CONFIG_FILE, GENERATION_FILE = CONFIG_FILES


def mcore_to_hf(
    load: Path,
    hf_out: Path,
    *,
    hf_config: Path | None = None,
    tokenizer: Path | None = None,
    dtype: str = "checkpoint",
    max_shard_size: str = "5GB",
    progress: bool = False,
) -> int:
    """Write the model of a Megatron checkpoint as a Hugging Face folder; returns the number of tensors.

    Only weights are read, from a checkpoint saved at any layout. The shape of the model comes from the
    checkpoint's args; what Megatron does not keep (token ids, generation config) from `hf_config`.

    Args:
        hf_config: config.json, or a folder with one, to start from; see `find_hf_config` for the default.
        tokenizer: folder with tokenizer files; see `find_tokenizer` for the default.
        dtype: "checkpoint" keeps the stored one; else float32, bfloat16 or float16.

    Collectives: one gather per tensor and those of `dist_checkpointing.load`, over all ranks.

    Raises:
        ValueError: anything that cannot be converted, named, with the flag that helps.
    """
    load, hf_out = Path(load), Path(hf_out)
    check_new_folder(hf_out)
    max_shard_bytes = parse_size(max_shard_size)
    with conversion_ranks() as groups:
        from megatron_fdd.checkpoint import find_checkpoint, read_checkpoint_args

        checkpoint = find_checkpoint(str(load), "--load")
        args = read_checkpoint_args(checkpoint, "--load")
        config_path = find_hf_config(load, args, hf_config)
        tokenizer_path = find_tokenizer(load, args, tokenizer)
        export = _prepare(checkpoint, args, read_json(config_path), groups)
        out_dtype = export.dtype if dtype == "checkpoint" else DTYPES[dtype]
        if dist.get_rank() != 0:
            return sum(1 for _ in export.tensors(export.rows, groups.tp))
        with new_folder(hf_out) as unfinished:
            writer = ShardWriter(unfinished, max_shard_bytes)
            rows = tqdm(export.rows, unit="tensor", desc="writing", disable=not progress)
            for name, tensor in export.tensors(rows, groups.tp):
                writer.add(name, tensor.to(out_dtype))
            _write_config(unfinished, config_path, export.config, out_dtype)
            copy_files(TOKENIZER_FILES, tokenizer_path, unfinished)
            return writer.close()


@dataclass(frozen=True, slots=True)
class _Export:
    """A loaded model and the table by which it is written."""

    model: torch.nn.Module
    rows: list[Row]
    config: HfConfig
    vocab_size: int
    dtype: torch.dtype

    def tensors(self, rows: Iterable[Row], group: Any) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face tensor, whole on rank 0, empty elsewhere. One gather each over `group`."""
        parameters = dict(self.model.named_parameters())
        for row in rows:
            if not row.sources:
                continue
            parts = row.transform.split(parameters[row.mcore].detach())
            for source, part in zip(row.sources, parts, strict=True):
                yield source, part[: self.vocab_size] if row.vocabulary else part


def _prepare(checkpoint: Path, args: Namespace, seed: HfConfig, groups: Any) -> _Export:
    """Build the model anew from its Hugging Face description, so that no setting of the run can matter."""
    family = family_of(seed)
    check_architecture(args, family.fixed, family.model_type)
    config = family.hf_config(seed, args)
    architecture = family.megatron_args(config)
    check_slices(architecture, groups.tp.size())
    dtype, stored_rows = stored_layout(checkpoint)
    own_args = complete_args(
        {**family.fixed, **architecture},
        dtype=dtype,
        vocabulary_divisor=args.make_vocab_size_divisible_by,
        tensor_size=groups.tp.size(),
    )
    vocab_size = architecture["vocab_size"]
    if stored_rows < vocab_size:
        raise ValueError(
            f"{checkpoint} holds {stored_rows} vocabulary rows, fewer than the vocab_size {vocab_size} of the "
            "Hugging Face config; give the model's own config with --hf-config"
        )
    from megatron_fdd.checkpoint import load_weights

    model = build_model(own_args, groups)
    load_weights(model, checkpoint, "--load", groups)
    export = _Export(model, list(family.rows(config)), config, vocab_size, dtype)
    _check_absent_are_zero(export, family)
    return export


def _check_absent_are_zero(export: _Export, family: Family) -> None:
    """A parameter without a place in the Hugging Face model may only hold zeros."""
    parameters = dict(export.model.named_parameters())
    trained = [row.mcore for row in export.rows if not row.sources and parameters[row.mcore].any()]
    if trained:
        raise ValueError(
            f"config.json gives this {family.model_type} no place for {', '.join(trained)}, which are not zero; "
            'pass --hf-config with "attention_bias" and "mlp_bias" both true'
        )


def _gather(part: Tensor, dim: int, group: Any) -> Tensor:
    """All ranks' parts side by side on rank 0; elsewhere the own part. One gather over `group`."""
    if group.size() == 1:
        return part
    raw = part.contiguous().view(torch.uint8)  # gloo knows fewer dtypes than models have
    received = [torch.empty_like(raw) for _ in range(group.size())] if group.rank() == 0 else None
    dist.gather(raw, received, group=group, group_dst=0)
    return part if received is None else torch.cat([each.view(part.dtype) for each in received], dim)


def _write_config(folder: Path, seed_path: Path, config: HfConfig, dtype: torch.dtype) -> None:
    """The config with its dtype fields true to the weights; byte for byte the seed where nothing changed."""
    named: HfConfig = {
        key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in config
    }
    config = {**config, **named}
    if config == read_json(seed_path):
        shutil.copyfile(seed_path, folder / CONFIG_FILE)
    else:
        write_json(folder / CONFIG_FILE, config)
    copy_files([GENERATION_FILE], seed_path.parent, folder)
