"""Ordinary Megatron `torch_dist` checkpoints, one parameter at a time: no rank ever holds its whole share at once."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException

from megatron_fdd.convert.checkpoint_entries import (
    Pieces,
    blocks_of,
    entries_of,
    is_before_experts,
    norm_states,
    pieces_of,
    tensors_of,
)
from megatron_fdd.convert.stored_chunks import StoredChunks
from megatron_fdd.convert.streaming_save import Reader, StreamingSave
from megatron_fdd.host.checkpoint import RELEASE, TRACKER_FILE
from megatron_fdd.host.damage import DAMAGE, cause_of
from megatron_fdd.host.disk import is_torchs_writer
from megatron_fdd.host.file_sums import write_sums
from megatron_fdd.host.listing import listing
from megatron_fdd.host.together import together
from megatron_fdd.host.weight_names import other_name, use_stored_names, weights_only

_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def save_model(
    folder: Path, model: torch.nn.Module, args: Namespace, groups: Any, owned: Collection[str], read: Reader
) -> None:
    """Write the folder `release` and the tracker file that make `folder` loadable with `--load`.

    Args:
        model: the whole model on every rank. Only names, shapes and dtypes matter; it may be on the meta device.
        owned: names of the parameters that this rank writes; exactly one rank owns each parameter.
        read: called for each of these parameters while it is written; the result is dropped right after.

    Collectives: those of `dist_checkpointing.save` and `write_sums` over all ranks.

    Raises:
        ValueError, OSError, RuntimeError: as `told_causes` raises them.
    """
    rank_zero = dist.get_rank() == 0
    target = folder / RELEASE
    with together():
        if rank_zero:
            target.mkdir()
    entries = entries_of(model, groups, _CONTENT)
    parameters = {name: entries.pop(name) for name in tensors_of(model)}
    norms = {name for name in owned if is_before_experts(name, parameters)}
    weights = Pieces({name: parameters[name] for name in owned}, norms)
    # The rest are empty objects that TransformerEngine's modules look for. Its own models have all of them.
    left = {state.unique_key: state for state in entries.values() if isinstance(state, ShardedObject)}
    stored = {**weights.state, **(norm_states(parameters) | left if rank_zero else {})}
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "model": stored,
    }
    with told_causes():
        dist_checkpointing.save(state, str(target), StreamingSave(weights, read), content_metadata=_CONTENT)
    write_sums(target)
    if rank_zero:
        (folder / TRACKER_FILE).write_text(RELEASE)


@contextmanager
def told_causes() -> Iterator[None]:
    """Report the cause of a failure, in a block where all ranks save a checkpoint.

    Raises:
        OSError, RuntimeError: a file could not be written, in the words of the system or of torch's writer.
        ValueError: something else went wrong on some rank. The same on every rank.
    """
    try:
        yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError) or is_torchs_writer(failure):
                raise failure from error
        raise ValueError(cause_of(error)) from error


class StoredWeights:
    """The weights of a checkpoint saved at any layout, read one parameter at a time and without collectives.

    Args:
        path: the checkpoint's folder of an iteration, or its `release` folder.
        model: the whole model on the meta device; it gives names, shapes and how Megatron stores them.

    Raises:
        ValueError: checkpoint and model differ; the message lists what is missing, left over or of another shape.
    """

    def __init__(self, path: Path, model: torch.nn.Module, groups: Any) -> None:
        self._path = path
        CachedMetadataFileSystemReader.clear_metadata_cache()  # the cache would hide a rewritten checkpoint
        self._chunks = StoredChunks(path)
        content = dist_checkpointing.load_content_metadata(str(path)) or {}
        entries = entries_of(model, groups, content)
        self._parameters, self._weights = tensors_of(model), [name for name, _ in model.named_parameters()]
        self._entries = {name: entries[name] for name in self._parameters}
        stored = dist_checkpointing.load_tensors_metadata(str(path))
        use_stored_names(self._entries, stored)
        self._check(stored)
        self._dtypes = {name: self._dtype_of(entry, stored) for name, entry in self._entries.items()}

    @staticmethod
    def _dtype_of(entry: ShardedBase, stored: Mapping[str, ShardedTensor]) -> torch.dtype:
        return stored[pieces_of(entry, entry.data)[0].key].dtype

    def common_dtype(self, except_for: Collection[str] = ()) -> torch.dtype:
        """Return the one dtype of all weights. ValueError if they differ: the user must ask for rounding."""
        by_dtype = {self._dtypes[name]: name for name in self._weights if name not in except_for}
        if len(by_dtype) > 1:
            found = ", ".join(f"{name} is {dtype}" for dtype, name in by_dtype.items())
            raise ValueError(f"--load {self._path} mixes dtypes ({found}); choose one with --dtype")
        return next(iter(by_dtype))

    def _check(self, stored: Mapping[str, ShardedTensor]) -> None:
        needed = {
            piece.key: piece for entry in self._entries.values() for piece in pieces_of(entry, entry.data)
        }
        unused = weights_only(key for key in set(stored) - set(needed) if other_name(key) not in needed)
        missing = sorted(set(needed) - set(stored))
        if unused or missing:
            raise ValueError(
                f"--load {self._path}: the checkpoint and the model that its arguments describe differ. In the "
                f"checkpoint but not used: {listing(unused)}. Missing in it: {listing(missing)}."
            )
        for key, piece in needed.items():
            found, expected = stored[key].global_shape, piece.global_shape
            if found != expected and not piece.allow_shape_mismatch:
                raise ValueError(
                    f"--load {self._path}: {key} has the shape {list(found)}, and {list(expected)} in the model "
                    "that the checkpoint's arguments describe"
                )

    def read(self, name: str) -> list[Tensor]:
        """Return the value of a parameter on the CPU, from any thread, in blocks that follow one another in dim 0.

        Raises:
            ValueError: its bytes are damaged.
        """
        value = torch.empty(self._parameters[name].shape, dtype=self._dtypes[name], device="meta")
        pieces = pieces_of(self._entries[name], value)
        try:
            data = [self._chunks.read(piece) for piece in pieces]
        except DAMAGE as error:
            raise ValueError(
                f"--load {self._path}: {name} cannot be read ({cause_of(error)}); copy the checkpoint again"
            ) from error
        return blocks_of(value, pieces, data)


def stored_layout(folder: Path) -> tuple[torch.dtype, int]:
    """Return the dtype of the weights in a checkpoint, and its number of vocabulary rows with padding.

    Raises:
        ValueError: the checkpoint holds no GPT model.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(folder)).get("embedding.word_embeddings.weight")
    if stored is None:
        raise ValueError(f"{folder} holds no GPT model: it has no embedding.word_embeddings.weight")
    return stored.dtype, stored.global_shape[0]
