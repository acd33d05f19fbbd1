"""All layers of a chunk, each kind changed by a family, with the final norm; and scaled branches.

They work with Megatron's local modules and with TransformerEngine's. They have never run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.training.models.gpt import GPTModelConfig
from torch import Tensor, nn

from megatron_fdd.host.layer_parts import backend_of, stock_block, stock_layer
from megatron_fdd.host.layer_specs import final_norm_factor


def changed_block(
    config: GPTModelConfig,
    vp_stage: int | None,
    change: Callable[[ModuleSpec], None],
    *,
    norm: type[nn.Module] | None = None,
) -> TransformerBlockSubmodules:
    """Make Megatron's own layers of a chunk, with experts or without, and its final norm.

    The final norm multiplies with `config.transformer.final_norm_factor`, if a family has set it.

    Args:
        change: called once for each specification of a layer, to change its parts.
        norm: the final norm; None: that of Megatron's arguments.

    Raises:
        ValueError: as `stock_layer`.
    """
    if config.transformer.num_moe_experts is None:
        layers = [stock_layer(config)] * get_num_layers_to_build(config.transformer, vp_stage)
    else:
        layers = stock_block(config, vp_stage).layer_specs
    for layer in {id(each): each for each in layers}.values():
        change(layer)
    own = norm or backend_of(config.transformer).layer_norm(
        rms_norm=config.transformer.normalization == "RMSNorm"
    )
    return TransformerBlockSubmodules(
        layer_specs=layers, layer_norm=_times(own, final_norm_factor(config.transformer))
    )


def _times(norm: Any, factor: float) -> Any:
    """Make what builds `norm` with an output that is multiplied by a factor; its parameters keep their names."""
    if factor == 1.0:
        return norm

    def build(**keywords: Any) -> nn.Module:
        module: nn.Module = norm(**keywords)
        module.register_forward_hook(lambda _module, _inputs, output: output * factor)
        return module

    return build


def scale_branches(layer: ModuleSpec, factor: float) -> None:
    """Multiply what attention and MLP add to the residual by a factor."""

    def scaled(training: bool, fused: bool) -> Callable[..., Tensor]:
        add = get_bias_dropout_add(training, fused)

        def add_scaled(
            output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, probability: float
        ) -> Tensor:
            output, bias = output_with_bias
            return add((output * factor, None if bias is None else bias * factor), residual, probability)

        return add_scaled

    layer.submodules.self_attn_bda = layer.submodules.mlp_bda = scaled
