"""The parameters of a Megatron model, made from a Hugging Face folder."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_fdd.convert.checksums import Checksums, check_finite, digest
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.family import Family
from megatron_fdd.convert.families.transforms import join_blocks, joined
from megatron_fdd.convert.hf_companions import HF_FOLDER
from megatron_fdd.convert.hf_folder import CONFIG_FILES, HfFolder
from megatron_fdd.convert.left_out import (
    LEFT_OUT_FOLDER,
    SCALES_FOLDER,
    write_left_out,
    write_scales,
)
from megatron_fdd.convert.mcore_model import DTYPES, build_model, complete_args, name_of, stored_tensors
from megatron_fdd.host.ahead import ahead
from megatron_fdd.host.json_file import read_json, write_json
from megatron_fdd.host.listing import listing

# So many tensors are hashed side by side.
_HASHERS = 2


class HfSource:
    """Megatron parameters made from a Hugging Face folder, one at a time.

    Attributes:
        config: config.json.
        args: the model's complete args.
        model: the model on the meta device.
        digests: name -> checksum of every tensor read so far.
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

    def write_report(self, save: Path, digests: Sequence[Mapping[str, str]], keep_left_out: bool) -> None:
        """Write beside the checkpoint `save` its config, if it is not the source's, checksums, and what `_keep` says.

        Args:
            digests: those of each rank.
        """
        if self.config != read_json(self.folder.path / CONFIG_FILES[0]):
            write_json(save / HF_FOLDER / CONFIG_FILES[0], self.config)
        found = {name: digest for each in digests for name, digest in each.items()}
        found |= self._keep(save, keep_left_out)
        Checksums(self.dtype, found).write(save / HF_FOLDER)

    def _keep(self, save: Path, keep_left_out: bool) -> dict[str, str]:
        """Write beside the checkpoint `save` what its weights cannot say: scales, and what was left out.

        Returns:
            The checksums of tensors that were left out, as `write_left_out`.
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

    def values(self, names: Iterable[str]) -> Generator[list[Tensor]]:
        """Yield parameters' padded values on the CPU, in the model's dtype, read ahead by threads.

        Each comes in blocks that follow one another in dim 0, and is hashed while it is used.

        Raises:
            ValueError: a tensor's bytes do not agree with the folder's checksum report, or are not finite numbers.
        """
        sizes = [(name, self.parameters[name].nbytes) for name in names]
        with (
            ThreadPoolExecutor(_HASHERS) as hashers,
            closing(ahead(partial(self._read, hashers), sizes)) as made,
        ):
            for blocks, hashed in made:
                yield blocks
                for each in hashed:
                    each.result()
                del blocks  # not to be held while the next one is waited for

    def _read(self, hashers: ThreadPoolExecutor, name: str) -> tuple[list[Tensor], list[Future[None]]]:
        """Return a parameter's value, and what ends when the digests of its tensors are known."""
        row, parameter = self._row_of[name], self.parameters[name]
        if not row.sources:
            return [torch.zeros(parameter.shape, dtype=parameter.dtype)], []
        parts, hashed = [], []
        for source in row.sources:
            part, rounded = self._read_part(source, parameter.dtype)
            hashed.append(hashers.submit(self._hash, source, part, rounded))
            parts.append(rounded)
        blocks = join_blocks(row.transform, parts)
        for index, block in enumerate(blocks):
            if block.dtype != parameter.dtype:
                blocks[index] = narrowed = block.to(parameter.dtype)
                where = f"{self._folder.path}: {' and '.join(row.sources)}"
                too_narrow = f"{name_of(narrowed.dtype)} is too narrow for them: give another --dtype"
                check_finite(narrowed, where, too_narrow)
        padding = parameter.shape[0] - sum(map(len, blocks)) if row.vocabulary else 0
        return [torch.nn.functional.pad(joined(blocks), (0, 0, 0, padding))] if padding else blocks, hashed

    def _read_part(self, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return a tensor as it is, and in the dtype that it has in an export: transformers rounds some biases."""
        part = self._folder.read(name, dtype)
        check_finite(part, f"{self._folder.path}: {name}", "take other weights")
        own = self._own_dtypes.get(name)
        return part, part if own is None else part.to(own)

    def _hash(self, name: str, part: Tensor, rounded: Tensor) -> None:
        """Note the digest of a tensor as an export writes it; compare what was read with the folder's report."""
        self.digests[name] = digest(part)
        if self._expected is not None:
            quantised = self._folder.quantised.get(name)
            stored = {part: digest(self._folder.raw(part)) for part in quantised.parts} if quantised else {}
            for each, found in (stored or {name: self.digests[name]}).items():
                self._expected.check(self._folder.path, each, found)
        if rounded is not part:
            self.digests[name] = digest(rounded)

    @cached_property
    def _own_dtypes(self) -> dict[str, torch.dtype]:
        """The tensors that have a dtype of their own in Megatron and in an export."""
        return {name: row.dtype for row in self._row_of.values() if row.dtype for name in row.sources}


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
