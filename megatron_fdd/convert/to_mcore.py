"""The import from Hugging Face to Megatron."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_fdd.convert.hf_companions import set_tokenizer, write_companions
from megatron_fdd.convert.hf_source import HfSource
from megatron_fdd.convert.hf_writer import check_new_folder
from megatron_fdd.convert.ranks import conversion_ranks, owners, shared_new_folder
from megatron_fdd.host.bar import Bar
from megatron_fdd.host.together import together


@dataclass(frozen=True, slots=True)
class Imported:
    """A summary of what an import read.

    Attributes:
        num_parameters: without padding, buffers and a head that repeats the embedding.
        left_out: names of the tensors that have no place in the table.
        left_out_are: what those are, for people.
        left_out_kept: whether they are kept beside the checkpoint.
    """

    num_parameters: int
    left_out: tuple[str, ...] = ()
    left_out_are: str = ""
    left_out_kept: bool = False


def hf_to_mcore(
    hf_model: Path,
    save: Path,
    *,
    dtype: str = "checkpoint",
    vocabulary_divisor: int = 128,
    progress: bool = False,
    keep_left_out: bool = False,
) -> Imported:
    """Write a Hugging Face model as an ordinary Megatron checkpoint.

    `save` becomes a folder for `--load`, with the source's configs and the checksum of its tensors in `hf/` and
    its tokenizer in `tokenizer/`. Under torchrun every rank reads and writes its share of the tensors, read
    ahead within `MAX_BYTES`. If the source has a `checksums.json` (an export has one), its tensors must agree with it.

    Args:
        dtype: "checkpoint" keeps the source's dtype; the others are float32, bfloat16 and float16.
        vocabulary_divisor: see `complete_args`.
        keep_left_out: whether to copy what has no place in the table to `left-out/`, for the way back. What a model is
            none without, such as a part for images, is copied always.

    Collectives: barriers, a gather of a few words per tensor, and those of `dist_checkpointing.save`, over all
    ranks.

    Raises:
        ValueError: something cannot be converted exactly; the message names it. The same on every rank.
    """
    hf_model, save = Path(hf_model), Path(save)
    with conversion_ranks() as groups:
        with together():
            check_new_folder(save, "--save")
            source = HfSource(hf_model, dtype, vocabulary_divisor, groups)
            keep_left_out |= source.family.keeps_left_out
            source.check_left_out(keep_left_out)
            set_tokenizer(source.args, hf_model, save)
        with shared_new_folder(save, "--save") as unfinished:
            with together():  # before the weights, of which there may be hours
                if dist.get_rank() == 0:
                    write_companions(source.folder.path, unfinished)
            _write(unfinished, source, groups, progress)
            everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
            dist.all_gather_object(everyone, source.digests)
            with together():
                if dist.get_rank() == 0:
                    source.write_report(unfinished, everyone, keep_left_out)
    what = source.family.left_out.what if source.family.left_out is not None else ""
    return Imported(source.num_parameters, tuple(source.left_out), what, keep_left_out)


def _write(folder: Path, source: HfSource, groups: Any, progress: bool) -> None:
    """Write the checkpoint itself into `folder`, this rank its share of the parameters.

    Collectives: those of `save_model`, and an all-gather.
    """
    from megatron_fdd.convert.mcore_checkpoint import save_model

    parameters = source.parameters
    owned = _share(parameters, dist.get_rank(), dist.get_world_size())
    with (
        _progress_bar([parameters[name] for name in owned], progress) as bar,
        closing(source.values(owned)) as values,
    ):

        def read(name: str) -> list[Tensor]:
            bar.update(parameters[name].nbytes)
            return next(values)  # they are asked for in this order

        save_model(folder, source.model, source.args, groups, owned, read)
        with together():  # the last one may have been hashed since
            assert next(values, None) is None


def _share(parameters: Mapping[str, Tensor], rank: int, ranks: int) -> list[str]:
    """List the parameters that one of the ranks reads and writes; each parameter belongs to one rank."""
    owner = owners([parameter.nbytes for parameter in parameters.values()], ranks)
    return [name for name, its_rank in zip(parameters, owner, strict=True) if its_rank == rank]


def _progress_bar(owned: Iterable[Tensor], wanted: bool) -> Bar:
    """Make a progress bar over the bytes of this rank's share; only rank 0 shows it."""
    return Bar(
        total=sum(parameter.nbytes for parameter in owned),
        desc="converting",
        unit="B",
        is_shown=wanted and dist.get_rank() == 0,
    )
