"""Ordinary Megatron `torch_dist` checkpoints, a parameter at a time: no rank ever holds its share at once."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import (
    CachedMetadataFileSystemReader,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed import checkpoint as torch_checkpoint
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _write_item
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_fdd.checkpoint import (
    DAMAGE,
    RELEASE,
    TRACKER_FILE,
    cause_of,
    listing,
    other_name,
    use_stored_names,
    weights_only,
)

_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
Reader = Callable[[str], Tensor]
"""Name of a parameter -> its value on the CPU."""


def save_model(
    folder: Path, model: torch.nn.Module, args: Namespace, groups: Any, owned: Collection[str], read: Reader
) -> None:
    """Write the folder `release` and the tracker file that make `folder` loadable with `--load`.

    Args:
        model: whole on every rank, so that only names, shapes and dtypes matter; may be on the meta device.
        owned: names of the parameters that this rank writes; together the ranks own each one once.
        read: called for each of them while it is written; its result is dropped right after.

    Collectives: those of `dist_checkpointing.save` over all ranks.

    Raises:
        ValueError: `read` or a file failed on some rank; the same on every rank.
    """
    rank_zero = dist.get_rank() == 0
    target = folder / RELEASE
    if rank_zero:
        target.mkdir()
    entries = _entries(model, groups, _CONTENT)
    parameters = {name: entries.pop(name) for name, _ in model.named_parameters()}
    norms = {name for name in owned if _is_before_experts(name, parameters)}
    weights = _Pieces({name: parameters[name] for name in owned}, norms)
    # What is left are empty objects that TransformerEngine's modules look for.
    stored = {**weights.state, **(entries if rank_zero else {})}
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "model": stored,
    }
    dist.barrier()
    try:
        dist_checkpointing.save(state, str(target), _StreamingSave(weights, read), content_metadata=_CONTENT)
    except torch_checkpoint.CheckpointException as error:  # the same on every rank
        raise ValueError(cause_of(error)) from error
    if rank_zero:
        (folder / TRACKER_FILE).write_text(RELEASE)


def _is_before_experts(name: str, parameters: Collection[str]) -> bool:
    layer, norm, _ = name.partition("pre_mlp_layernorm.")
    return bool(norm) and f"{layer}mlp.router.weight" in parameters


def _entries(model: torch.nn.Module, groups: Any, content: Mapping[str, Any]) -> dict[str, ShardedBase]:
    """How Megatron stores the model; a parameter's entry is under its own name."""
    assert isinstance(model, MegatronModule)
    return model.sharded_state_dict(metadata={**content, "dp_cp_group": groups.dp_cp})


def _pieces(entry: ShardedBase, data: Tensor) -> list[ShardedTensor]:
    """The tensors of the checkpoint that hold a parameter, as views of `data`: gate and up lie apart there."""
    assert isinstance(entry, (ShardedTensor, ShardedTensorFactory))
    state = {"": dataclasses.replace(entry, data=data)}
    apply_factories(state)
    return [_with_all_axes(piece) for piece in nested_values(state)]


def _written_pieces(entry: ShardedBase, data: Tensor, before_experts: bool) -> list[ShardedTensor]:
    """Those to write: the norm before a mixture of experts under both of its names."""
    pieces = _pieces(entry, data)
    if before_experts:
        pieces += [dataclasses.replace(piece, key=other_name(piece.key)) for piece in pieces]
    return pieces


def _with_all_axes(piece: ShardedTensor) -> ShardedTensor:
    """The same place in the checkpoint, the layer's axis (size 1) made one of the data's own.

    Megatron turns a piece whose data lacks the axis into a torch ShardedTensor, which needs all layers at once.
    """
    assert piece.data is not None
    shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return dataclasses.replace(piece, data=piece.data.view(shape), local_shape=shape, prepend_axis_num=0)


class _Pieces:
    """Every piece of some parameters.

    Attributes:
        state: the pieces, without data, under names of no meaning.
    """

    def __init__(self, entries: Mapping[str, ShardedBase], norms_before_experts: Collection[str]) -> None:
        self._entries = entries
        self._norms_before_experts = norms_before_experts
        self.state: dict[str, ShardedTensor] = {}
        self._parameter_of: dict[tuple[Any, ...], tuple[int, str]] = {}
        for position, (name, entry) in enumerate(entries.items()):
            for index, piece in enumerate(self.of(name, entry.data)):
                self.state[f"{name}.{index}"] = piece
                self._parameter_of[_place(piece)] = (position, name)

    def of(self, name: str, data: Tensor) -> list[ShardedTensor]:
        """The pieces of one parameter, as views of `data`."""
        return _written_pieces(self._entries[name], data, name in self._norms_before_experts)

    def parameter_of(self, item: WriteItem) -> tuple[int, str]:
        """Position and name of the parameter in which a piece to be written lies."""
        return self._parameter_of[_place(item)]


def _place(piece: ShardedTensor | WriteItem) -> tuple[Any, ...]:
    """Where in the checkpoint: the key of the whole tensor and the offsets in it."""
    if isinstance(piece, ShardedTensor):
        return (piece.key, *piece.global_offset)
    assert piece.index.offset is not None
    return (piece.index.fqn, *piece.index.offset)


class _StreamingSave(TorchDistSaveShardedStrategy):
    """Megatron's format through torch's writer; Megatron's own writer first collects all that a rank writes."""

    def __init__(self, weights: _Pieces, read: Reader) -> None:
        super().__init__()
        self._weights = weights
        self._read = read

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: str) -> None:
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        torch_checkpoint.save(
            mcore_to_pyt_state_dict(flat),
            storage_writer=_StreamingWriter(checkpoint_dir),
            planner=_LazyPlanner(self._weights, self._read),
        )


class _StreamingWriter(torch_checkpoint.FileSystemWriter):
    """One file a rank, one tensor in memory; torch's own keeps every tensor until the file is closed."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        results = []
        if plan.items:
            with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
                settings = (name, self.serialization_format)
                for item in plan.items:  # the data gets no name: it would live while the next is read
                    results.append(
                        _write_item(self.transforms, stream, planner.resolve_data(item), item, *settings)
                    )
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _LazyPlanner(MCoreSavePlanner):
    """Reads a parameter when its turn to be written comes; parameters in the model's order."""

    def __init__(self, weights: _Pieces, read: Reader) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._weights = weights
        self._read = read
        self._current = ""
        self._data_of: dict[tuple[Any, ...], Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = dataclasses.replace(plan, items=sorted(plan.items, key=self._position))
        return self.plan

    def _position(self, item: WriteItem) -> int:
        return -1 if item.type == WriteItemType.BYTE_IO else self._weights.parameter_of(item)[0]

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        _, name = self._weights.parameter_of(write_item)
        if self._current != name:
            self._data_of.clear()  # let go of one before reading the next
            pieces = self._weights.of(name, self._read(name))
            self._current, self._data_of = name, {_place(piece): piece.data for piece in pieces}
        data = self._data_of.pop(_place(write_item))
        alone = data.is_contiguous() and data.untyped_storage().nbytes() == data.nbytes
        return data if alone else data.clone()  # a view would be stored with all that it is a view of


class StoredWeights:
    """The weights of a checkpoint saved at any layout, read one parameter at a time and without collectives.

    Args:
        path: of the checkpoint, an iteration's or release folder.
        model: whole, on the meta device: names, shapes and how Megatron stores them.

    Raises:
        ValueError: checkpoint and model differ, with lists of what is missing, left over or of another shape.
    """

    def __init__(self, path: Path, model: torch.nn.Module, groups: Any) -> None:
        self._path = path
        CachedMetadataFileSystemReader.clear_metadata_cache()  # it would not see a checkpoint written anew
        self._strategy = TorchDistLoadShardedStrategy(cache_metadata=True)
        content = dist_checkpointing.load_content_metadata(str(path)) or {}
        entries = _entries(model, groups, content)
        self._parameters = dict(model.named_parameters())
        self._entries = {name: entries[name] for name in self._parameters}
        stored = self._strategy.load_tensors_metadata(path)
        use_stored_names(self._entries, stored)
        self._check(stored)

    def _check(self, stored: Mapping[str, ShardedTensor]) -> None:
        needed = {
            piece.key: piece for entry in self._entries.values() for piece in _pieces(entry, entry.data)
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

    def read(self, name: str) -> Tensor:
        """The value of a parameter on the CPU. ValueError when its bytes are damaged."""
        parameter = self._parameters[name]
        value = torch.empty(parameter.shape, dtype=parameter.dtype)
        pieces = _pieces(self._entries[name], value)
        try:
            self._strategy.load({str(index): piece for index, piece in enumerate(pieces)}, self._path)
        except DAMAGE as error:
            raise ValueError(
                f"--load {self._path}: {name} cannot be read ({cause_of(error)}); copy the checkpoint again"
            ) from error
        return value


def stored_layout(folder: Path) -> tuple[torch.dtype, int]:
    """Dtype of the weights in a checkpoint, and its number of vocabulary rows with padding.

    Raises:
        ValueError: it holds no GPT model.
    """
    stored = dist_checkpointing.load_tensors_metadata(str(folder)).get("embedding.word_embeddings.weight")
    if stored is None:
        raise ValueError(f"{folder} holds no GPT model: it has no embedding.word_embeddings.weight")
    return stored.dtype, stored.global_shape[0]
