"""Attention for the `local` transformer under context parallelism and on packed sequences, which Megatron's refuses.

Shapes: S query rows of this rank, L key rows, B micro-batch, A heads of this rank, D head width. Packed sequences
have no B.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fdd.host.patches.table import replace


class ContextAttention(DotProductAttention):
    """Megatron's attention, given all keys and values of the sequence and a mask of what may be seen.

    Context-parallel ranks hold the sequence in Megatron's zig-zag: of 2 C equal pieces, rank r has pieces r and 2 C
    - 1 - r.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **keywords: Any) -> None:
        whole = copy.copy(config)
        whole.context_parallel_size = 1  # Megatron's constructor refuses more
        super().__init__(whole, *arguments, **keywords)
        self.config = config
        # The softmax would apply its own window in place of the mask.
        self._window = self.scale_mask_softmax.window_size
        self.scale_mask_softmax.window_size = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *arguments: Any,
        packed_seq_params: PackedSeqParams | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Return [S, B, A D] ([S, A D] when packed) for query [S, B, A, D], key and value [S, B, groups, D].

        Args:
            attention_mask: None for causal attention; bool [B, 1, S, L], true where attention is forbidden.

        Collectives over the context-parallel group: forward one all-gather each of key and value, backward one
        reduce-scatter each.
        """
        if packed_seq_params is not None:
            query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
        places_S = places_L = torch.arange(len(query), device=query.device)
        if self.config.context_parallel_size > 1:
            key, value = self._gather(key), self._gather(value)
            places_S = self._places(len(query), query.device)
            places_L = torch.arange(len(key), device=query.device)
        forbidden_SL = (places_L > places_S[:, None]) | self._outside_window(places_S[:, None], places_L)
        if packed_seq_params is not None:
            # Where a place equals a boundary, a document begins there.
            starts = packed_seq_params.cu_seqlens_q[1:].contiguous()
            document_L = torch.bucketize(places_L, starts, right=True)
            forbidden_SL |= document_L != torch.bucketize(places_S, starts, right=True)[:, None]
        mask = forbidden_SL if attention_mask is None else attention_mask | forbidden_SL
        output = super().forward(
            query, key, value, mask.expand(query.shape[1], 1, -1, -1), *arguments, **keywords
        )
        return output.squeeze(1) if packed_seq_params is not None else output

    def _gather(self, shard: Tensor) -> Tensor:
        """Return all rows of the sequence in order, from this rank's rows."""
        group = self.pg_collection.cp
        rows = gather_from_sequence_parallel_region(shard.contiguous(), group=group)
        pieces = rows.chunk(2 * group.size())
        # The order of the gathered pieces is 0, 2C-1, 1, 2C-2, ...
        return torch.cat([*pieces[0::2], *reversed(pieces[1::2])])

    def _places(self, rows: int, device: torch.device) -> Tensor:
        """Return the places of this rank's rows in the sequence."""
        group, half = self.pg_collection.cp, rows // 2
        first = torch.arange(half, device=device)
        last_piece = 2 * group.size() - 1 - group.rank()
        return torch.cat([first + group.rank() * half, first + last_piece * half])

    def _outside_window(self, query_place: Tensor, key_place: Tensor) -> Tensor:
        """Return where a key lies outside a query's sliding window (keys to the left, keys to the right)."""
        if self._window is None:
            return torch.zeros_like(query_place > key_place)
        left, right = self._window
        return (key_place < query_place - left) | (key_place > query_place + right)


def install_attention() -> None:
    """Give every `local` layer that Megatron specifies from now on this attention."""
    replace("megatron.core.models.backends.LocalSpecProvider.core_attention", lambda _self: ContextAttention)
