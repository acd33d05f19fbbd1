"""Parts of layers that Megatron's own specifications lack, for families that bring a specification.

They work with Megatron's local modules and with TransformerEngine's. They have never run on a GPU.

Shapes: S tokens of this rank, B micro-batch, H hidden size, A heads of this rank, D head width, W = A D.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_fdd.host.patches.norms import RMSNorm


def stock_layer(config: GPTModelConfig) -> ModuleSpec:
    """Make Megatron's own specification of a dense layer, whose parts the caller may change.

    Raises:
        ValueError: `--transformer-impl` is neither local nor transformer_engine.
    """
    check_modules(config)
    return default_layer_spec(config, 0)


def check_modules(config: GPTModelConfig) -> None:
    """Refuse modules, by ValueError, with which these parts have not been written."""
    impl = config.transformer.transformer_impl
    if impl not in ("local", "transformer_engine"):
        raise ValueError(
            f"--transformer-impl {impl}: not with layers of a family's own; use local or transformer_engine"
        )


def stock_block(config: GPTModelConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Make Megatron's own specification of all layers of a chunk with experts, whose parts the caller may change.

    Raises:
        ValueError: as `stock_layer`.
    """
    check_modules(config)
    return default_layer_spec(config, vp_stage)


def let_biased_experts_train(block: TransformerBlockSubmodules) -> None:
    """Let local experts with biases train. Megatron's MLP adds the bias in place, to a view that autograd forbids."""
    for layer in block.layer_specs:
        experts = layer.submodules.mlp.keywords["submodules"].experts
        if issubclass(experts.func, SequentialMLP):
            parts = experts.keywords["submodules"]
            parts.linear_fc2 = _with_own_output(parts.linear_fc2)


@functools.cache
def _with_own_output(linear: type[nn.Module]) -> type[nn.Module]:
    """Make a subclass of `linear` whose output is no view."""

    class OwnOutputRow(linear):  # type: ignore[valid-type, misc]
        """A row-parallel matrix, [tokens, inputs] -> [tokens, H]."""

        def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
            output_NH, bias_H = super().forward(input_)
            return output_NH.clone(), bias_H

    return OwnOutputRow


def mlp_parts(layer: ModuleSpec) -> MLPSubmodules:
    """Return the parts of a dense layer's MLP, which the caller may change."""
    return layer.submodules.mlp.keywords["submodules"]


def put_norms_behind(layer: ModuleSpec, config: GPTModelConfig) -> None:
    """Put a norm on the output of attention, and one on that of the MLP, before each is added to the residual.

    Their names are `self_attention.linear_proj.norm` and `mlp.linear_fc2.norm`.
    """
    attention, mlp = layer.submodules.self_attention.submodules, mlp_parts(layer)
    norm = backend_of(config.transformer).layer_norm(rms_norm=config.transformer.normalization == "RMSNorm")
    attention.linear_proj = _with_norm(attention.linear_proj, norm)
    mlp.linear_fc2 = _with_norm(mlp.linear_fc2, norm)


def drop_norms_before(layer: ModuleSpec, config: GPTModelConfig) -> None:
    """Remove the norms before attention and before the MLP, also those inside the matrices that follow them."""
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = IdentityOp
    parts.self_attention.submodules.linear_qkv = backend_of(config.transformer).column_parallel_linear()
    mlp_parts(layer).linear_fc1 = backend_of(config.transformer).column_parallel_linear()
    parts.sharded_state_dict_keys_map = {}


def backend_of(config: TransformerConfig) -> BackendSpecProvider:
    """Return what provides the modules that `--transformer-impl` names."""
    return LocalSpecProvider() if config.transformer_impl == "local" else TESpecProvider()


@functools.cache
def _with_norm(linear: type[nn.Module], norm: Any) -> type[nn.Module]:
    """Make a subclass of `linear`, a row-parallel matrix, that norms its output."""

    class NormedRow(linear):  # type: ignore[valid-type, misc]
        """A row-parallel matrix and a norm, [S, B, inputs of this rank] -> [S, B, H]. Collectives: the matrix's."""

        def __init__(
            self, input_size: int, output_size: int, *, config: TransformerConfig, **keywords: Any
        ) -> None:
            if keywords["bias"]:
                raise ValueError(
                    "a norm behind a matrix with a bias, which Megatron adds later: use no biases"
                )
            super().__init__(input_size, output_size, config=config, **keywords)
            self.norm = norm(config=config, hidden_size=output_size, eps=config.layernorm_epsilon)

        def forward(self, input_: Tensor) -> tuple[Tensor, None]:
            output_SBH, _ = super().forward(input_)
            return self.norm(output_SBH), None

    return NormedRow


class NormOverHeads(RMSNorm):
    """RMSNorm over all heads of a token's query, or key.

    Every rank has the whole weight and uses the part of its heads. Megatron sums the gradient over the tensor-parallel
    group, as it does for any `q_layernorm` and `k_layernorm`.

    Args:
        width: of all heads of all ranks.
        group: the tensor-parallel ranks, which share the heads evenly.
    """

    def __init__(self, config: TransformerConfig, width: int, group: ProcessGroup) -> None:
        super().__init__(config, width, config.layernorm_epsilon)
        self._group = group

    def forward(self, x_SBAD: Tensor) -> Tensor:
        """Return the normed x_SBAD, in its dtype and shape.

        Collectives over the tensor-parallel group: one all-reduce [S, B, 1] forward, one backward.
        """
        x32_SBW = x_SBAD.flatten(2).float()
        squares_SB1 = x32_SBW.square().sum(-1, keepdim=True)
        squares_SB1 = reduce_from_tensor_model_parallel_region(squares_SB1, group=self._group)
        # The heads of all ranks are scaled by the sum, so its gradient is the sum over all ranks.
        squares_SB1 = copy_to_tensor_model_parallel_region(squares_SB1, group=self._group)
        inverse_rms = torch.rsqrt(squares_SB1 / self.hidden_size + self.eps)
        gain_W = self.gain.chunk(self._group.size())[self._group.rank()]
        return self.scaled(x32_SBW, inverse_rms, gain_W, x_SBAD.dtype).view_as(x_SBAD)


class NormOverHeadsAttention(SelfAttention):
    """Self-attention with `NormOverHeads` of queries and of keys.

    Raises:
        ValueError: more tensor-parallel ranks than key heads to share among them.
    """

    def __init__(self, config: TransformerConfig, *arguments: Any, **keywords: Any) -> None:
        super().__init__(config, *arguments, **keywords)
        groups, group = config.num_query_groups, self.pg_collection.tp
        if groups is not None and groups % group.size():
            raise ValueError(
                f"--tensor-model-parallel-size {group.size()}: attention that normalises all {groups} key heads at "
                "once has each on one rank; use a size that divides them"
            )
        self.q_layernorm = NormOverHeads(config, self.query_projection_size, group)
        self.k_layernorm = NormOverHeads(config, self.kv_projection_size, group)


class WindowRotaryAttention(SelfAttention):
    """Self-attention whose rotary base on layers with a sliding window is `config.window_rotary_base`, without scaling.

    The scaling that Megatron's arguments describe, YaRN with its factor among it, is that of the other layers.
    """

    def __init__(
        self, config: TransformerConfig, submodules: Any, layer_number: int, *arguments: Any, **keywords: Any
    ) -> None:
        super().__init__(config, submodules, layer_number, *arguments, **keywords)
        self._rotary: RotaryEmbedding | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            assert config.kv_channels is not None
            self._rotary = RotaryEmbedding(
                config.kv_channels,
                rotary_percent=1.0,
                rotary_interleaved=config.rotary_interleaved,
                rotary_base=config.window_rotary_base,
                use_cpu_initialization=config.use_cpu_initialization,
                cp_group=self.pg_collection.cp,
            )
            self._yarn_concentration_factor = 1.0

    def forward(
        self,
        hidden_states: Tensor,
        *arguments: Any,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **keywords: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Run Megatron's forward pass with this layer's angles.

        Args:
            rotary_pos_emb: the model's angles, [S, 1, 1, D]; for packed sequences [longest sequence, 1, 1, D].
        """
        if self._rotary is not None and rotary_pos_emb is not None:
            packed = packed_seq_params is not None
            length = len(rotary_pos_emb) * (1 if packed else self.pg_collection.cp.size())
            rotary_pos_emb = self._rotary(length, packed_seq=packed, cp_group=self.pg_collection.cp)
        return super().forward(
            hidden_states,
            *arguments,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **keywords,
        )
