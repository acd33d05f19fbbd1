"""The rehearsal's attention against torch's own, whole and in context-parallel parts, packed and not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from megatron_fdd.host.rehearsal.attention import ContextAttention
from tests.harness.ranks import Layout, run_on_ranks

pytestmark = pytest.mark.tier("default")

ROWS, BATCH, HEADS, GROUPS, WIDTH = 16, 2, 4, 2, 8
DOCUMENTS = torch.tensor([0, 3, 4, 11, ROWS], dtype=torch.int32)


def attention(window: tuple[int, int] | None) -> ContextAttention:
    """Return the rehearsal's attention, with a sliding window if one is given."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=WIDTH,
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        attention_dropout=0.0,
        window_size=window,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    return ContextAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)


def inputs(batch: int) -> list[Tensor]:
    """Return query, key, value and the output's gradient, in float32."""
    generator = torch.Generator().manual_seed(3)
    heads = (HEADS, GROUPS, GROUPS, HEADS)
    return [torch.randn(ROWS, batch, each, WIDTH, generator=generator) for each in heads]


def wanted(tensors: list[Tensor], forbidden: Tensor) -> list[Tensor]:
    """Return output and gradients of query, key and value, by torch, from float64."""
    leaves = [tensor.double().requires_grad_() for tensor in tensors[:3]]
    query, key, value = (leaf.permute(1, 2, 0, 3) for leaf in leaves)
    key, value = (tensor.repeat_interleave(HEADS // GROUPS, 1) for tensor in (key, value))
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=~forbidden).permute(2, 0, 1, 3)
    (output * tensors[3].double()).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def mine(tensor: Tensor) -> Tensor:
    """Return this rank's rows of [S, ...], by Megatron's own cut."""
    batch = {"tokens": tensor.transpose(0, 1)}
    group = parallel_state.get_context_parallel_group()
    return get_batch_on_this_cp_rank(batch, is_hybrid_cp=False, cp_group=group)["tokens"].transpose(0, 1)


def compare(window: tuple[int, int] | None, with_mask: bool) -> None:
    """Compare this rank's rows of output and gradients; the body on every rank."""
    places = torch.arange(ROWS)
    forbidden = places > places[:, None]
    if window is not None:
        forbidden = forbidden | (places < places[:, None] - window[0])
    mask = None
    if with_mask:
        extra = torch.rand(BATCH, 1, ROWS, ROWS, generator=torch.Generator().manual_seed(4)) > 0.7
        extra.diagonal(dim1=-2, dim2=-1).fill_(False)
        forbidden = forbidden | extra
        mask = mine(extra.permute(2, 0, 1, 3)).permute(1, 2, 0, 3)
    tensors = inputs(BATCH)
    leaves = [mine(tensor).clone().requires_grad_() for tensor in tensors[:3]]
    output = attention(window)(*leaves, mask)
    (output * mine(tensors[3]).flatten(2)).sum().backward()
    for found, whole in zip(
        [output.unflatten(2, (HEADS, WIDTH)), *(leaf.grad for leaf in leaves)],
        wanted(tensors, forbidden),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), mine(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("window", [None, (3, 0)])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_equals_torch(cp: int, window: tuple[int, int] | None, with_mask: bool) -> None:
    run_on_ranks(compare, Layout(cp=cp), {"window": window, "with_mask": with_mask})


def compare_packed() -> None:
    """Compare documents in one row; the body on one rank."""
    tensors = inputs(1)
    leaves = [tensor.squeeze(1).requires_grad_() for tensor in tensors[:3]]
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=DOCUMENTS, cu_seqlens_kv=DOCUMENTS)
    output = attention(None)(*leaves, None, packed_seq_params=packed)
    (output * tensors[3].squeeze(1).flatten(1)).sum().backward()
    places = torch.arange(ROWS)
    document = torch.repeat_interleave(torch.arange(len(DOCUMENTS) - 1), DOCUMENTS.diff())
    forbidden = (places > places[:, None]) | (document != document[:, None])
    for found, whole in zip(
        [output.unflatten(1, (HEADS, WIDTH)), *(leaf.grad for leaf in leaves)],
        wanted(tensors, forbidden),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), whole.squeeze(1), rtol=1e-5, atol=1e-5)


def test_documents_see_only_themselves() -> None:
    run_on_ranks(compare_packed, Layout())
