"""Places of parameters in a checkpoint: Megatron stores some in several pieces, and one under two names."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from megatron_fdd.convert.families.transforms import joined
from megatron_fdd.host.checkpoint import EXTRA_STATE
from megatron_fdd.host.weight_names import other_name


def tensors_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model that a checkpoint holds, by name: first the parameters, then the kept buffers."""
    kept = model.state_dict(keep_vars=True)  # this also makes the biases of routers float32 again
    return dict(model.named_parameters()) | {name: b for name, b in model.named_buffers() if name in kept}


def is_before_experts(name: str, parameters: Collection[str]) -> bool:
    """Whether a parameter belongs to the norm before a mixture of experts; `parameters` are all the model's names."""
    layer, norm, _ = name.partition("pre_mlp_layernorm.")
    return bool(norm) and f"{layer}mlp.router.weight" in parameters


def entries_of(model: torch.nn.Module, groups: Any, content: Mapping[str, Any]) -> dict[str, ShardedBase]:
    """Return Megatron's description of how it stores the model: one entry for each parameter, under its name."""
    assert isinstance(model, MegatronModule)
    return model.sharded_state_dict(metadata={**content, "dp_cp_group": groups.dp_cp})


def norm_states(parameters: Mapping[str, ShardedBase]) -> dict[str, ShardedObject]:
    """Make the empty objects that TransformerEngine's norms look for in a checkpoint, if they are separate modules.

    Megatron's local matrices store such objects too, but its local norms do not.

    Args:
        parameters: every entry of a model, by the name of its parameter.

    Returns:
        The objects by their places in the checkpoint. The object of a norm before experts has TransformerEngine's name.
    """
    found = {}
    for name, entry in parameters.items():
        key = other_name(entry.key) if is_before_experts(name, parameters) else entry.key
        if not key.endswith("norm.weight"):
            continue
        assert isinstance(entry, ShardedTensor)
        axes = entry.prepend_axis_num  # the axis of the layers, if there is one
        shape, offset = entry.global_shape[:axes] or (1,), entry.global_offset[:axes] or (0,)
        state = ShardedObject(key.removesuffix("weight") + EXTRA_STATE, None, shape, offset)
        found[state.unique_key] = state
    return found


def pieces_of(entry: ShardedBase, data: Tensor) -> list[ShardedTensor]:
    """Return the checkpoint's tensors that hold a parameter, as views of `data`: gate and up are stored apart."""
    assert isinstance(entry, (ShardedTensor, ShardedTensorFactory))
    dtype = {"dtype": data.dtype} if isinstance(entry, ShardedTensor) else {}
    state = {"": dataclasses.replace(entry, data=data, **dtype)}
    apply_factories(state)
    return [_with_all_axes(piece) for piece in nested_values(state)]


def are_blocks(pieces: Sequence[ShardedTensor]) -> bool:
    """Whether pieces follow one another in dim 0 of the parameter of which they are views."""
    starts = itertools.accumulate((math.prod(piece.local_shape) for piece in pieces), initial=0)
    return all(
        piece.data is not None and piece.data.is_contiguous() and piece.data.storage_offset() == start
        for piece, start in zip(pieces, starts, strict=False)
    )


def blocks_of(value: Tensor, pieces: Sequence[ShardedTensor], data: Sequence[Tensor]) -> list[Tensor]:
    """Return the value of a parameter in blocks that follow one another in dim 0.

    Args:
        value: has its shape and dtype; no data.
        pieces: of `value`.
        data: of each piece.
    """
    if are_blocks(pieces):
        shape = value.shape if len(data) == 1 else (-1, *value.shape[1:])
        return [block.view(shape) for block in data]
    whole = torch.empty_like(value, device="cpu")
    for piece, block in zip(pieces, data, strict=True):
        assert piece.data is not None
        whole.as_strided(piece.data.shape, piece.data.stride(), piece.data.storage_offset()).copy_(block)
    return [whole]


def _with_all_axes(piece: ShardedTensor) -> ShardedTensor:
    """Return the same place in the checkpoint, with the layer's axis (size 1) as an axis of the data.

    Megatron turns a piece whose data lacks the axis into a torch ShardedTensor, which needs all layers at once.
    """
    assert piece.data is not None
    shape = (1,) * piece.prepend_axis_num + tuple(piece.local_shape)
    return dataclasses.replace(piece, data=piece.data.view(shape), local_shape=shape, prepend_axis_num=0)


class Pieces:
    """The pieces in which some parameters are written.

    Attributes:
        state: the pieces, without data, under names without meaning.
    """

    def __init__(self, entries: Mapping[str, ShardedBase], norms_before_experts: Collection[str]) -> None:
        self._entries = entries
        self._norms_before_experts = norms_before_experts
        self.state: dict[str, ShardedTensor] = {}
        self._parameter_of: dict[tuple[Any, ...], tuple[int, str]] = {}
        for position, (name, entry) in enumerate(entries.items()):
            for index, piece in enumerate(self.of(name, [entry.data])):
                self.state[f"{name}.{index}"] = piece
                self._parameter_of[place_of(piece)] = (position, name)

    def of(self, name: str, blocks: Sequence[Tensor]) -> list[ShardedTensor]:
        """Return the pieces of one parameter; a norm before experts is under both of its names.

        Args:
            blocks: its value, in blocks that follow one another in dim 0. The pieces are views of them.
        """
        pieces = self._of_blocks(self._entries[name], blocks)
        if name in self._norms_before_experts:
            pieces += [dataclasses.replace(piece, key=other_name(piece.key)) for piece in pieces]
        return pieces

    @staticmethod
    def _of_blocks(entry: ShardedBase, blocks: Sequence[Tensor]) -> list[ShardedTensor]:
        if len(blocks) > 1:
            rows = sum(len(block) for block in blocks)
            pieces = pieces_of(entry, blocks[0].new_empty((rows, *blocks[0].shape[1:]), device="meta"))
            sizes = [math.prod(piece.local_shape) for piece in pieces]
            if are_blocks(pieces) and sizes == [block.numel() for block in blocks]:
                return [
                    dataclasses.replace(piece, data=block.view(piece.local_shape))
                    for piece, block in zip(pieces, blocks, strict=True)
                ]
        return pieces_of(entry, joined(blocks))

    def parameter_of(self, item: WriteItem) -> tuple[int, str]:
        """Return the position and the name of the parameter that contains a piece to be written."""
        return self._parameter_of[place_of(item)]


def place_of(piece: ShardedTensor | WriteItem) -> tuple[Any, ...]:
    """Return a piece's place in the checkpoint: the key of the whole tensor and the offsets in it."""
    if isinstance(piece, ShardedTensor):
        return (piece.key, *piece.global_offset)
    assert piece.index.offset is not None
    return (piece.index.fqn, *piece.index.offset)
