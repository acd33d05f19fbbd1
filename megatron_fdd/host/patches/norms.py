"""Norms for Megatron's local modules: torch's own refuse sequence parallelism and zero-centred weights.

With them, `--transformer-impl local` runs without apex and TransformerEngine, on GPUs and in a rehearsal. RMSNorm
also serves beside apex, whose fused norm is a LayerNorm.

Shapes: ... any leading dims, H hidden (or head) size. Statistics in float32, output in the input's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor, nn

from megatron_fdd.host.patches.table import replace, replaced


class _Norm(nn.Module):
    """The parts that both norms share: their weight, and the mark by which Megatron sums its gradient over ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.hidden_size = hidden_size
        self.zero_centered = config.layernorm_zero_centered_gamma
        self.weight = self._parameter(config, 0.0 if self.zero_centered else 1.0)

    def _parameter(self, config: TransformerConfig, value: float) -> nn.Parameter:
        parameter = nn.Parameter(torch.full((self.hidden_size,), value, dtype=config.params_dtype))
        # With sequence parallelism every rank sees only its own tokens.
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return parameter

    @property
    def gain(self) -> Tensor:
        """The factor of each dimension: the weight, or 1 + weight in float32 (other dtypes would round it)."""
        return self.weight.float() + 1 if self.zero_centered else self.weight


class RMSNorm(_Norm):
    """x / sqrt(mean(x^2) + eps) * gain.

    The result is rounded to the input's dtype before the gain, as in Llama, and with zero-centred weights after it, as
    in Gemma.
    """

    def forward(self, x_H: Tensor) -> Tensor:
        """Return the normed x_H, [..., H], in its dtype."""
        x32_H = x_H.float()
        inverse_rms = torch.rsqrt(x32_H.square().mean(-1, keepdim=True) + self.eps)
        return self.scaled(x32_H, inverse_rms, self.gain, x_H.dtype)

    def scaled(self, x32_H: Tensor, inverse_rms: Tensor, gain_H: Tensor, dtype: torch.dtype) -> Tensor:
        """Return x times its inverse RMS and the gain, in `dtype`."""
        normed_H = x32_H * inverse_rms
        if not self.zero_centered:
            normed_H = normed_H.to(dtype)
        return (normed_H * gain_H).to(dtype)


class LayerNorm(_Norm):
    """(x - mean) / sqrt(variance + eps) * gain + bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(config, hidden_size, eps)
        self.bias = self._parameter(config, 0.0)

    def forward(self, x_H: Tensor) -> Tensor:
        """Return the normed x_H, [..., H], in its dtype."""
        shape = (self.hidden_size,)
        out_H = nn.functional.layer_norm(x_H.float(), shape, self.gain.float(), self.bias.float(), self.eps)
        return out_H.to(x_H.dtype)


class BiasFreeLayerNorm(_Norm):
    """(x - mean) / sqrt(variance + eps) * gain."""

    def forward(self, x_H: Tensor) -> Tensor:
        """Return the normed x_H, [..., H], in its dtype."""
        shape = (self.hidden_size,)
        return nn.functional.layer_norm(x_H.float(), shape, self.gain.float(), None, self.eps).to(x_H.dtype)


def build_norm(
    _cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: object
) -> RMSNorm | LayerNorm:
    """Return the norm that `config.normalization` names; stands in for `WrappedTorchNorm.__new__`.

    Raises:
        ValueError: the normalization is neither RMSNorm nor LayerNorm.
    """
    norms: dict[str, type[RMSNorm] | type[LayerNorm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
    if config.normalization not in norms:
        raise ValueError(
            f"--normalization {config.normalization}: local modules have only {', '.join(norms)}"
        )
    return norms[config.normalization](config, hidden_size, eps)


def install_norms() -> None:
    """Make `build_norm` build every norm that Megatron would leave to torch, and the final norm, from now on.

    The constructor is replaced because all of Megatron's specs share it; each imports the class by name. Only for a
    process whose models all have local modules.
    """
    for target, stand_in in _stand_ins().items():
        replace(target, stand_in)


@contextmanager
def plain_norms() -> Iterator[None]:
    """Apply `install_norms` while a model of local modules is built, in a process with other models."""
    with replaced(_stand_ins()):
        yield


def _stand_ins() -> dict[str, Any]:
    return {
        "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__": build_norm,
        # Beside apex or TransformerEngine this would be their norm.
        "megatron.core.transformer.transformer_block.LayerNormImpl": WrappedTorchNorm,
    }
