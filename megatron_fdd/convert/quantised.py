"""Tensors that a model folder stores as codes and scales, by method of quantisation.

A method is an entry of `DEQUANTISERS` (convert/quantisation_methods.py), under the `quant_method` of config.json's
`quantization_config`. It finds the tensors of a folder that belong together; everything else reads their values and
does not know how they are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_fdd.convert.families.family import slice_name
from megatron_fdd.convert.stored_tensor import StoredTensor
from megatron_fdd.host.buffers import Buffers

FIELD = "quantization_config"
VALUES = Buffers()
"""The memory of values, one after the other."""


@dataclass(frozen=True, slots=True)
class Quantised:
    """One tensor that others store.

    Attributes:
        parts: names of the stored tensors: first the codes, then what else is needed, such as scales.
        shape, dtype: of the value, where nobody asks for another dtype.
        value: (the parts, in this order, as they are stored; dtype) -> the value.
        codes: (the value, the other parts) -> the codes; the inverse of `value`, bit for bit, for values that no
            training has changed.
    """

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    value: Callable[[Sequence[Tensor], torch.dtype], Tensor]
    codes: Callable[[Tensor, Sequence[Tensor]], Tensor]

    def apart(self, name: str) -> dict[str, Quantised]:
        """Return the tensors along dim 0 of value and parts, as `slice_name` names them."""
        count, *shape = self.shape
        return {
            slice_name(name, index): replace(
                self, parts=tuple(slice_name(part, index) for part in self.parts), shape=tuple(shape)
            )
            for index in range(count)
        }


class Dequantiser(Protocol):
    """A method of quantisation."""

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse a `quantization_config` that is not understood, with a ValueError that names the field."""

    def find(self, tensors: Mapping[str, StoredTensor], settings: Mapping[str, Any]) -> dict[str, Quantised]:
        """Return the quantised tensors among those of a folder, by the name that the value has in a table.

        Raises:
            ValueError: parts are missing, or do not fit each other; the message names them.
        """
