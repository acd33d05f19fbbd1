"""The import from Hugging Face to Megatron."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_fdd.convert.checksums import Checksums, check_finite, digest
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.family import Family, WeightRow
from megatron_fdd.convert.hf_companions import HF_FOLDER, set_tokenizer, write_companions
from megatron_fdd.convert.hf_folder import CONFIG_FILES, HfFolder
from megatron_fdd.convert.hf_writer import check_new_folder
from megatron_fdd.convert.left_out import (
    LEFT_OUT_FOLDER,
    SCALES_FOLDER,
    write_left_out,
    write_scales,
)
from megatron_fdd.convert.mcore_model import DTYPES, build_model, complete_args, name_of
from megatron_fdd.convert.ranks import conversion_ranks, owners, shared_new_folder
from megatron_fdd.host.ahead import ahead
from megatron_fdd.host.bar import Bar
from megatron_fdd.host.json_file import read_json, write_json
from megatron_fdd.host.listing import listing
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

    `save` becomes a folder for `--load`, with the source's configs and the SHA-256 of its tensors in `hf/` and
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
        from megatron_fdd.convert.mcore_checkpoint import save_model

        with together():
            check_new_folder(save, "--save")
            source = _Source(hf_model, dtype, vocabulary_divisor, groups)
            keep_left_out |= source.family.keeps_left_out
            source.check_left_out(keep_left_out)
            args, parameters = source.args, source.parameters
            set_tokenizer(args, hf_model, save)
            owned = _share(parameters, dist.get_rank(), dist.get_world_size())
        with shared_new_folder(save, "--save") as unfinished:
            sizes = [(name, parameters[name].nbytes) for name in owned]
            with (
                _progress_bar([parameters[name] for name in owned], progress) as bar,
                closing(ahead(source.read, sizes)) as values,
            ):

                def read(name: str) -> Tensor:
                    bar.update(parameters[name].nbytes)
                    return next(values)  # they are asked for in this order

                save_model(unfinished, source.model, args, groups, owned, read)
            everyone: list[dict[str, str]] = [{}] * dist.get_world_size()
            dist.all_gather_object(everyone, source.digests)
            with together():
                if dist.get_rank() == 0:
                    source.write_companions(unfinished, everyone, keep_left_out)
    what = source.family.left_out.what if source.family.left_out is not None else ""
    return Imported(source.num_parameters, tuple(source.left_out), what, keep_left_out)


class _Source:
    """Megatron parameters made from a Hugging Face folder, one at a time.

    Attributes:
        config: config.json.
        args: the model's complete args.
        model: the model on the meta device.
        digests: name -> SHA-256 of every tensor read so far.
        folder, family: where they come from, and the table.
        left_out: names of tensors that have no place in the table.

    Raises:
        ValueError: for every reason that is known before a tensor is read.
    """

    def __init__(self, hf_model: Path, dtype: str, vocabulary_divisor: int, groups: Any) -> None:
        self.folder = folder = HfFolder(hf_model)
        self.config = folder.config
        family = family_of(folder.config).as_stored(folder)
        self.family = family
        architecture = {**family.fixed, **family.megatron_args(folder.config)}
        check_names(family, folder)
        self.left_out = family.left_out_names(folder.config, folder.names)
        self._folder = folder = folder.apart(family.stacked)
        self._row_of = {row.mcore: row for row in family.rows(folder.config)}
        params_dtype = folder.common_dtype(self._weights()) if dtype == "checkpoint" else DTYPES[dtype]
        self.args = complete_args(architecture, dtype=params_dtype, vocabulary_divisor=vocabulary_divisor)
        self.model = build_model(self.args, groups, "meta")
        self.parameters = stored_tensors(self.model, self._row_of.values())
        self._expected = Checksums.read(folder.path)
        self.digests: dict[str, str] = {}
        self._check_tensors(architecture["vocab_size"])

    def check_left_out(self, is_kept: bool) -> None:
        """Refuse tensors to be kept that are not floats: an export could not write them."""
        for name in self.left_out if is_kept else ():
            self.folder.dtype(name)

    def write_companions(self, save: Path, digests: Sequence[Mapping[str, str]], keep_left_out: bool) -> None:
        """Write beside the checkpoint `save` the source's configs and tokenizer, checksums, and what `_keep` says.

        Args:
            digests: those of each rank.
        """
        write_companions(self.folder.path, save)
        if self.config != read_json(self.folder.path / CONFIG_FILES[0]):
            write_json(save / HF_FOLDER / CONFIG_FILES[0], self.config)
        found = {name: digest for each in digests for name, digest in each.items()}
        found |= self._keep(save, keep_left_out)
        Checksums(self.dtype, found).write(save / HF_FOLDER)

    def _keep(self, save: Path, keep_left_out: bool) -> dict[str, str]:
        """Write beside the checkpoint `save` what its weights cannot say: scales, and what was left out.

        Returns:
            The SHA-256 of tensors that were left out, as `write_left_out`.
        """
        kept = set(self.folder.names) - set(() if keep_left_out else self.left_out)
        if any(name in kept for name in self.folder.quantised):
            write_scales(self.folder, kept, save / SCALES_FOLDER)
        if not (keep_left_out and self.left_out):
            return {}
        return write_left_out(self.folder, self.left_out, save / LEFT_OUT_FOLDER)

    @property
    def dtype(self) -> str:
        """Dtype of all tensors that have the model's, such as bfloat16; "mixed" where they differ."""
        quantised, read_in = self._folder.quantised, self.args.params_dtype
        found = {
            name_of(read_in if name in quantised else self._folder.dtype(name)) for name in self._weights()
        }
        return found.pop() if len(found) == 1 else "mixed"

    def _weights(self) -> set[str]:
        """List the tensors that have the dtype of the model."""
        return {name for row in self._row_of.values() if row.dtype is None for name in row.sources}

    def _check_tensors(self, vocab_size: int) -> None:
        """Refuse files with tensors that are not floats, or whose shapes are not those that config.json describes."""
        for row in self._row_of.values():
            parts = row.transform.split(self.parameters[row.mcore]) if row.sources else []
            for name, part in zip(row.sources, parts, strict=True):
                expected = (vocab_size, *part.shape[1:]) if row.vocabulary else tuple(part.shape)
                self._folder.dtype(name)
                found = self._folder.shape(name)
                if found != expected:
                    raise ValueError(
                        f"{self._folder.path}: {name} of shape {list(found)} does not fit config.json, which "
                        f"makes it {list(expected)}"
                    )

    @property
    def num_parameters(self) -> int:
        """Number of parameters, without padding, buffers and a head that repeats the embedding."""
        names = [name for row in self._row_of.values() for name in row.sources]
        return sum(math.prod(self._folder.shape(name)) for name in names)

    def read(self, name: str) -> Tensor:
        """Return a parameter's padded value on the CPU, in the model's dtype.

        Raises:
            ValueError: a tensor's bytes do not agree with the folder's checksum report, or are not finite numbers.
        """
        row, parameter = self._row_of[name], self.parameters[name]
        if not row.sources:
            return torch.zeros(parameter.shape, dtype=parameter.dtype)
        value = row.transform.join([self._read_part(part, parameter.dtype) for part in row.sources])
        if value.dtype != parameter.dtype:
            value = value.to(parameter.dtype)
            where = f"{self._folder.path}: {' and '.join(row.sources)}"
            check_finite(value, where, f"{name_of(value.dtype)} is too narrow for them: give another --dtype")
        padding = parameter.shape[0] - value.shape[0] if row.vocabulary else 0
        return torch.nn.functional.pad(value, (0, 0, 0, padding)) if padding else value

    def _read_part(self, name: str, dtype: torch.dtype) -> Tensor:
        part = self._folder.read(name, dtype)
        check_finite(part, f"{self._folder.path}: {name}", "take other weights")
        self.digests[name] = digest(part)
        if self._expected is not None:
            quantised = self._folder.quantised.get(name)
            stored = {part: digest(self._folder.raw(part)) for part in quantised.parts} if quantised else {}
            for each, found in (stored or {name: self.digests[name]}).items():
                self._expected.check(self._folder.path, each, found)
        own = self._own_dtypes.get(name)
        # transformers rounds some biases; an export has its own dtype.
        if own is not None and part.dtype != own:
            part = part.to(own)
            self.digests[name] = digest(part)
        return part

    @cached_property
    def _own_dtypes(self) -> dict[str, torch.dtype]:
        """The tensors that have a dtype of their own in Megatron and in an export."""
        return {name: row.dtype for row in self._row_of.values() if row.dtype for name in row.sources}


def stored_tensors(model: torch.nn.Module, rows: Collection[WeightRow]) -> dict[str, Tensor]:
    """Return the tensors of a model on the meta device that a checkpoint holds, in the dtypes that `rows` give them."""
    from megatron_fdd.convert.checkpoint_entries import tensors_of

    own = {row.mcore: row.dtype for row in rows if row.dtype is not None}
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.data = parameter.data.to(own[name])
    tensors = tensors_of(model)
    names = {row.mcore for row in rows}
    assert names == set(tensors), names ^ set(tensors)
    return tensors


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


def check_names(family: Family, folder: HfFolder) -> None:
    """Refuse a folder that lacks tensors of the table or has other ones; the message lists the first of them."""
    needed = [source for row in family.rows(folder.config) for source in row.sources]
    twice = [name for name, count in Counter(needed).items() if count > 1]
    assert not twice, f"the table uses {twice} more than once"
    present = {name for name in folder.apart(family.stacked).names if not name.endswith(family.ignored)}
    present -= set(family.left_out_names(folder.config, present))
    head, embedding = family.tied
    if head in present - set(needed) and embedding in present:
        if digest(folder.read(head)) != digest(folder.read(embedding)):
            raise ValueError(f"{folder.path}: config.json ties the embeddings, but {head} is not {embedding}")
        present.discard(head)
    missing, extra = sorted(set(needed) - present), sorted(present - set(needed))
    if missing or extra:
        raise ValueError(
            f"{folder.path} does not match its config.json. Missing: {listing(missing) if missing else 'nothing'}. "
            f"Not used: {listing(extra) if extra else 'nothing'}"
        )
