"""A layer whose attention and MLP read one norm side by side, and a LayerNorm without a bias.

They work with Megatron's local modules and with TransformerEngine's. They have never run on a GPU.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor

from megatron_fdd.host.layer_parts import drop_norms_before
from megatron_fdd.host.patches.norms import BiasFreeLayerNorm


class ParallelLayer(TransformerLayer):
    """x + attention(norm(x)) + mlp(norm(x))."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Any = None,
        **_others: Any,
    ) -> tuple[Tensor, None]:
        """Return the layer's output [S, B, H], and no context."""
        normed = self.input_layernorm(hidden_states)
        attention = self.self_attention(
            normed,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        mlp = self.mlp(normed)
        output = hidden_states.float() if self.config.fp32_residual_connection else hidden_states
        with self.bias_dropout_add_exec_handler():
            for branch, add in ((attention, self.self_attn_bda), (mlp, self.mlp_bda)):
                output = add(self.training, self.config.bias_dropout_fusion)(
                    branch, output, self.hidden_dropout
                )
        return make_viewless_tensor(output, requires_grad=output.requires_grad, keep_graph=True), None


def make_parallel(layer: ModuleSpec, config: GPTModelConfig) -> None:
    """Let attention and MLP of a dense layer read one LayerNorm without a bias."""
    drop_norms_before(layer, config)
    layer.module = ParallelLayer
    layer.submodules.input_layernorm = BiasFreeLayerNorm
    layer.submodules.pre_mlp_layernorm = IdentityOp
