"""Multi-latent attention, as DeepSeek's models have it: low-rank queries, keys and values, with norms in between.

It works with Megatron's local modules and with TransformerEngine's. It has never run on a GPU.

Shapes: S tokens of this rank, B micro-batch, A heads of this rank, L width of the keys' and values' latent, R width of
the rotated part of a key, which all heads share.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor, nn

from megatron_fdd.host.layer_parts import backend_of, stock_block

LATENT_NORM_EPSILON = 1e-6
"""That of the norms between the two matrices, whatever the model's other norms have."""


def latent_layers(config: GPTModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Make Megatron's layers of a chunk with experts, with `LatentAttention`; MLPs and experts stay Megatron's.

    Raises:
        ValueError: `--transformer-impl` is neither local nor transformer_engine.
    """
    block = stock_block(config, vp_stage)
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        attention.module = LatentAttention
        if config.transformer.transformer_impl == "local":
            attention.submodules.core_attention = of_any_width(
                backend_of(config.transformer).core_attention()
            )
            # TransformerEngine has this norm inside the matrix of a dense layer.
            layer.submodules.sharded_state_dict_keys_map = {
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"
            }
    return block


@functools.cache
def of_any_width(core: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of `core`, a local core attention, whose values may have another width than queries and keys."""

    class AnyWidth(core):  # type: ignore[valid-type, misc]
        """Core attention, [S, B, A, Q], [S, B, A, Q], [S, B, A, V] -> [S, B, A V]."""

        def __init__(
            self, *arguments: Any, k_channels: int = 0, v_channels: int = 0, **keywords: Any
        ) -> None:
            super().__init__(*arguments, **keywords)

        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, *arguments: Any, **keywords: Any
        ) -> Tensor:
            # Multi-latent attention pads the values of packed documents.
            self.hidden_size_per_partition = query.shape[-2] * value.shape[-1]
            return super().forward(query, key, value, *arguments, **keywords)

    return AnyWidth


class LatentAttention(MLASelfAttention):
    """Megatron's multi-latent attention, with the norms, the rotation and the gradients of DeepSeek's.

    Megatron 0.19.2 gives the norms between the matrices the epsilon of all norms; it puts a norm in front of a query
    matrix that has no latent (with TransformerEngine); and it leaves out, on several tensor-parallel ranks without
    sequence parallelism or with local modules, the sum over ranks of the gradient of the key's rotated part.
    """

    def _resolve_qk_norm_config(
        self, submodules: MLASelfAttentionSubmodules
    ) -> dict[str, ModuleSpec | type | LayerNormBuilder]:
        config = self.config
        linear = backend_of(config).column_parallel_linear()
        norm = backend_of(config).layer_norm(rms_norm=config.normalization == "RMSNorm", for_qk=True)
        has_latent = config.q_lora_rank is not None
        own = functools.partial(_latent_norm, norm)
        return {
            # Megatron would cut it over the ranks of the process, not of this model.
            "linear_q_proj": IdentityOp
            if has_latent
            else ModuleSpec(linear, {"tp_group": self.pg_collection.tp}),
            "linear_q_up_proj": linear if has_latent else IdentityOp,
            "linear_kv_up_proj": linear,
            "q_layernorm": own,
            "kv_layernorm": own,
        }

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents of queries [S, B, rank of queries] and of keys and values [S, B, L + R].

        Collectives over the tensor-parallel group: with local modules all-gathers of both; without sequence
        parallelism an all-reduce [S, B, R] backward.
        """
        query, key_value = super()._qkv_down_projection(hidden_states)
        latent, rotated = self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim
        group = self.pg_collection.tp
        if key_value.shape[-1] != latent + rotated:
            key_value = gather_from_tensor_model_parallel_region(key_value, group=group)
            if self.config.sequence_parallel:
                key_value = scatter_to_sequence_parallel_region(key_value, group=group)
        if group.size() > 1 and not self.config.sequence_parallel:
            # Each rank has the gradient of its own heads alone.
            latent_SBL, key_SBR = key_value.split([latent, rotated], dim=-1)
            key_SBR = copy_to_tensor_model_parallel_region(key_SBR, group=group)
            key_value = torch.cat([latent_SBL, key_SBR], dim=-1)
        return query, key_value


def _latent_norm(
    norm: LayerNormBuilder, *, config: TransformerConfig, hidden_size: int, eps: float
) -> nn.Module:
    return norm(config=config, hidden_size=hidden_size, eps=LATENT_NORM_EPSILON)
