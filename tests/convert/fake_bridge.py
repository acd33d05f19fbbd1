"""A stand-in for the package megatron.bridge, with the calls and signatures of 0.6.2, for GLM-4.5 only.

It describes the model with Megatron's local modules, so that no TransformerEngine is needed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file
from torch import Tensor

from megatron_fdd.convert.families.family import WeightRow
from megatron_fdd.convert.families.transforms import GroupedQkv, Stacked


@dataclass
class Provider(TransformerConfig):
    """A stand-in for GPTModelProvider: it has fields beside Megatron's, and derives values only in `finalize`."""

    vocab_size: int = 0
    seq_length: int = 1024
    share_embeddings_and_output_weights: bool = True
    position_embedding_type: str = "learned_absolute"
    rotary_base: float = 10000
    rotary_percent: float = 1.0
    rope_scaling: bool = False
    rope_scaling_factor: float = 1.0
    seq_len_interpolation_factor: float | None = None

    def __post_init__(self) -> None:
        pass

    def finalize(self) -> None:
        TransformerConfig.__post_init__(self)


Rows = list[tuple[str, Tensor]]


class AutoBridge:
    """A stand-in for AutoBridge, for one model type. A test can replace its attributes to make it fail.

    Attributes:
        describe: a change to the provider.
        garble: a change to (Megatron's name, value) while loading; None leaves the parameter out.
        lists: a change to the exported tensors.
    """

    describe: Callable[[Provider], None] = staticmethod(lambda provider: None)
    garble: Callable[[str, Tensor], Tensor | None] = staticmethod(lambda name, value: value)
    lists: Callable[[Rows], Rows] = staticmethod(lambda rows: rows)

    def __init__(self, hf_config: Any) -> None:
        self.hf_config = hf_config

    @classmethod
    def from_hf_config(cls, config: Any) -> AutoBridge:
        return cls(config)

    def to_megatron_provider(self, load_weights: bool = True, hf_path: str | Path | None = None) -> Provider:
        assert not load_weights
        hf = self.hf_config
        sparse = hf.num_hidden_layers - hf.first_k_dense_replace
        rope = hf.rope_parameters
        provider = Provider(
            num_layers=hf.num_hidden_layers,
            mtp_num_layers=hf.num_nextn_predict_layers or None,
            hidden_size=hf.hidden_size,
            num_attention_heads=hf.num_attention_heads,
            num_query_groups=hf.num_key_value_heads,
            kv_channels=hf.head_dim,
            ffn_hidden_size=hf.intermediate_size,
            layernorm_epsilon=hf.rms_norm_eps,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            num_moe_experts=hf.n_routed_experts,
            moe_router_topk=hf.num_experts_per_tok,
            moe_ffn_hidden_size=hf.moe_intermediate_size,
            moe_shared_expert_intermediate_size=hf.moe_intermediate_size,
            moe_layer_freq=[0] * hf.first_k_dense_replace + [1] * sparse,
            moe_router_num_groups=hf.n_group,
            moe_router_group_topk=hf.topk_group,
            moe_router_topk_scaling_factor=hf.routed_scaling_factor,
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_dtype="fp32",
            moe_aux_loss_coeff=0.001,
            moe_router_load_balancing_type="seq_aux_loss",
            moe_permute_fusion=True,  # needs TransformerEngine, and does not describe the model
            transformer_impl="local",
            vocab_size=hf.vocab_size,
            seq_length=hf.max_position_embeddings,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=rope["rope_theta"],
            rotary_percent=rope["partial_rotary_factor"],
        )
        type(self).describe(provider)
        return provider

    def load_hf_weights(
        self,
        model: list[torch.nn.Module],
        hf_path: str | Path | None = None,
        allowed_mismatched_params: list[str] | None = None,
    ) -> None:
        assert hf_path is not None
        stored, targets = load_file(Path(hf_path) / "model.safetensors"), model[0].state_dict(keep_vars=True)
        for row in self._rows():
            value = type(self).garble(row.mcore, row.transform.join([stored[name] for name in row.sources]))
            if value is not None:
                targets[row.mcore].detach().copy_(value)

    def export_hf_weights(
        self,
        model: list[torch.nn.Module],
        cpu: bool = False,
        show_progress: bool = True,
        conversion_tasks: Any = None,
        merge_adapter_weights: bool = True,
        weight_dtype: torch.dtype | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        sources = model[0].state_dict(keep_vars=True)
        parts: Rows = []
        for row in self._rows():
            parts += zip(row.sources, row.transform.split(sources[row.mcore]), strict=True)
        yield from type(self).lists(parts)

    def _rows(self) -> list[WeightRow]:
        hf = self.hf_config
        rows = [
            WeightRow("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
            WeightRow("output_layer.weight", ("lm_head.weight",)),
            WeightRow("decoder.final_layernorm.weight", ("model.norm.weight",)),
        ]
        for layer in range(hf.num_hidden_layers):
            rows += self._layer(layer, f"decoder.layers.{layer}.", f"model.layers.{layer}.")
        return rows

    def _layer(self, layer: int, own: str, theirs: str) -> list[WeightRow]:
        hf = self.hf_config
        qkv = GroupedQkv(hf.num_attention_heads // hf.num_key_value_heads, hf.head_dim)
        queries = tuple(f"{theirs}self_attn.{one}_proj.weight" for one in "qkv")
        rows = [
            WeightRow(f"{own}input_layernorm.weight", (f"{theirs}input_layernorm.weight",)),
            WeightRow(f"{own}self_attention.linear_qkv.weight", queries, qkv),
            WeightRow(f"{own}self_attention.linear_proj.weight", (f"{theirs}self_attn.o_proj.weight",)),
            WeightRow(f"{own}pre_mlp_layernorm.weight", (f"{theirs}post_attention_layernorm.weight",)),
        ]
        if layer < hf.first_k_dense_replace:
            return rows + _mlp(f"{own}mlp.", f"{theirs}mlp.")
        bias = WeightRow(f"{own}mlp.router.expert_bias", (f"{theirs}mlp.gate.e_score_correction_bias",))
        rows += [WeightRow(f"{own}mlp.router.weight", (f"{theirs}mlp.gate.weight",)), bias]
        rows += _mlp(f"{own}mlp.shared_experts.", f"{theirs}mlp.shared_experts.")
        for one in range(hf.n_routed_experts):
            rows += _mlp(f"{own}mlp.experts.local_experts.{one}.", f"{theirs}mlp.experts.{one}.")
        return rows


def _mlp(own: str, theirs: str) -> list[WeightRow]:
    gate_and_up = (f"{theirs}gate_proj.weight", f"{theirs}up_proj.weight")
    return [
        WeightRow(f"{own}linear_fc1.weight", gate_and_up, Stacked(2)),
        WeightRow(f"{own}linear_fc2.weight", (f"{theirs}down_proj.weight",)),
    ]


@contextlib.contextmanager
def installed(
    requirement: str = "transformers>=5.8", version: str = "0.6.2", **faults: Any
) -> Iterator[None]:
    """Let `from megatron.bridge import AutoBridge` find the stand-in, with `faults` as its attributes."""
    module = ModuleType("megatron.bridge")
    attributes = {name: staticmethod(fault) for name, fault in faults.items()}
    module.AutoBridge = type("AutoBridge", (AutoBridge,), attributes)  # type: ignore[attr-defined]
    versions = {"megatron-bridge": version, "transformers": transformers.__version__}
    with (
        mock.patch.object(importlib.metadata, "version", versions.__getitem__),
        mock.patch.dict(sys.modules, {"megatron.bridge": module}),
        mock.patch.object(importlib.metadata, "requires", return_value=[requirement, "torch>=2.6"]),
    ):
        yield
