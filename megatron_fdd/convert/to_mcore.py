"""Hugging Face -> Megatron."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_fdd.convert.companions import TOKENIZER_FOLDER, write_companions
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.family import Family, Row
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.hf_writer import check_new_folder, new_folder, unfinished_name
from megatron_fdd.convert.mcore_checkpoint import save_model
from megatron_fdd.convert.mcore_model import DTYPES, build_model, complete_args, conversion_ranks
from megatron_fdd.convert.tokenizer import has_tokenizer


def hf_to_mcore(
    hf_model: Path,
    save: Path,
    *,
    dtype: str = "checkpoint",
    vocabulary_divisor: int = 128,
    progress: bool = False,
) -> int:
    """Write a Hugging Face model as an ordinary Megatron checkpoint; returns the number of parameters.

    `save` becomes a folder for `--load`, with the source's configs in `hf/` and its tokenizer in
    `tokenizer/`. Under torchrun every rank reads, holds and writes only its tensor-parallel slice.

    Args:
        dtype: "checkpoint" keeps the source's; else float32, bfloat16 or float16.
        vocabulary_divisor: see `complete_args`.

    Collectives: barriers, and those of `dist_checkpointing.save`, over all ranks.

    Raises:
        ValueError: anything that cannot be converted exactly, named.
    """
    hf_model, save = Path(hf_model), Path(save)
    check_new_folder(save)
    folder = HfFolder(hf_model)
    family = family_of(folder.config).as_stored(folder.file_of)
    architecture = {**family.fixed, **family.megatron_args(folder.config)}
    check_names(family, folder)
    params_dtype = common_dtype(folder, family.ignored) if dtype == "checkpoint" else DTYPES[dtype]
    with conversion_ranks() as groups:
        check_slices(architecture, groups.tp.size())
        args = complete_args(
            architecture,
            dtype=params_dtype,
            vocabulary_divisor=vocabulary_divisor,
            tensor_size=groups.tp.size(),
        )
        if has_tokenizer(hf_model):
            args.tokenizer_type = "HuggingFaceTokenizer"
            args.tokenizer_model = str((save / TOKENIZER_FOLDER).absolute())
        model = build_model(args, groups)
        fill(model, family, folder, groups.tp, progress)
        _save(save, model, args, groups, hf_model)
    return sum(_element_count(folder, name) for name in folder.file_of)


def _element_count(folder: HfFolder, name: str) -> int:
    """Number of elements of a tensor, from its header."""
    return torch.Size(folder.shape(name)).numel()


def _save(save: Path, model: torch.nn.Module, args: Any, groups: Any, hf_model: Path) -> None:
    """Rank 0 owns the folder; it appears under its name when every rank has written."""
    if dist.get_rank() == 0:
        with new_folder(save) as unfinished:
            write_companions(hf_model, unfinished)
            dist.barrier()
            save_model(unfinished, model, args, groups)
    else:
        dist.barrier()
        save_model(unfinished_name(save), model, args, groups)
    dist.barrier()


def check_names(family: Family, folder: HfFolder) -> None:
    """ValueError that lists every tensor the table needs and the folder lacks, or the other way round."""
    needed = [source for row in family.rows(folder.config) for source in row.sources]
    twice = [name for name, count in Counter(needed).items() if count > 1]
    assert not twice, f"the table uses {twice} more than once"
    present = {name for name in folder.file_of if not name.endswith(family.ignored)}
    head, embedding = family.tied
    if head in present - set(needed) and embedding in present:
        if not torch.equal(folder.read(head), folder.read(embedding)):
            raise ValueError(f"{folder.path}: config.json ties the embeddings, but {head} is not {embedding}")
        present.discard(head)
    missing, extra = sorted(set(needed) - present), sorted(present - set(needed))
    if missing or extra:
        raise ValueError(
            f"{folder.path} does not match its config.json. Missing: {', '.join(missing) or 'nothing'}. "
            f"Not used: {', '.join(extra) or 'nothing'}"
        )


def common_dtype(folder: HfFolder, ignored: tuple[str, ...] = ()) -> torch.dtype:
    """The one dtype of all tensors that are weights.

    Raises:
        ValueError: there are several, or one in which Megatron holds no parameters.
    """
    weights = [name for name in sorted(folder.file_of, reverse=True) if not name.endswith(ignored)]
    by_dtype = {folder.dtype(name): name for name in weights}
    if len(by_dtype) > 1:
        found = ", ".join(f"{name} is {dtype}" for dtype, name in by_dtype.items())
        raise ValueError(f"{folder.path} mixes dtypes ({found}); choose one with --dtype")
    (only,) = by_dtype
    if only not in DTYPES.values():
        raise ValueError(f"{folder.path} holds {only}, which Megatron does not train; choose with --dtype")
    return only


def check_slices(architecture: Mapping[str, Any], ranks: int) -> None:
    """ValueError unless tensor parallelism over `ranks` cuts every tensor evenly, and heads stay whole."""
    for name in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        if architecture[name] % ranks:
            raise ValueError(
                f"{ranks} ranks cannot share {name} = {architecture[name]} evenly. A checkpoint converted on "
                "fewer ranks loads at every layout: use 1 process"
            )


def fill(model: torch.nn.Module, family: Family, folder: HfFolder, tensor_group: Any, progress: bool) -> None:
    """Read this rank's slice of every tensor into the model's parameters."""
    parameters = dict(model.named_parameters())
    rows = list(family.rows(folder.config))
    assert {row.mcore for row in rows} == set(parameters), {row.mcore for row in rows} ^ set(parameters)
    rank, size = tensor_group.rank(), tensor_group.size()
    bar = tqdm(rows, unit="tensor", desc="reading", disable=not progress or dist.get_rank() != 0)
    for row in bar:
        parameter = parameters[row.mcore].data
        if not row.sources:
            parameter.zero_()
            continue
        parts = [folder.read(source) for source in row.sources]
        _check_shapes(row, parts, parameter, folder)
        value = row.transform.join(parts)
        parameter[: value.shape[0]].copy_(value)
        parameter[value.shape[0] :].zero_()


def _check_shapes(row: Row, parts: list[Tensor], parameter: Tensor, folder: HfFolder) -> None:
    """ValueError when the files hold other shapes than the model that config.json describes."""
    for source, part, expected in zip(row.sources, parts, row.transform.split(parameter), strict=True):
        found = folder.shape(source)
        if row.vocabulary:
            vocab_size = family_of(folder.config).megatron_args(folder.config)["vocab_size"]
            fits = found == (vocab_size, *expected.shape[1:])
        else:
            fits = part.shape == expected.shape
        if not fits:
            raise ValueError(f"{folder.path}: {source} of shape {list(found)} does not fit config.json")
