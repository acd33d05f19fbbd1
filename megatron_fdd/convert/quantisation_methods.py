"""The methods of quantisation that are read, by the `quant_method` of config.json's `quantization_config`."""

from __future__ import annotations

from typing import Any

from megatron_fdd.convert.families.family import refuse_field
from megatron_fdd.convert.fp8 import BlockFp8
from megatron_fdd.convert.mxfp4 import MicroscaledFp4
from megatron_fdd.convert.quantised import FIELD, Dequantiser

DEQUANTISERS: dict[str, Dequantiser] = {"fp8": BlockFp8(), "mxfp4": MicroscaledFp4()}


def dequantiser_of(settings: Any) -> Dequantiser:
    """Return the method that a `quantization_config` names.

    Raises:
        ValueError: there is none, or it does not read this.
    """
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if not isinstance(method, str) or method not in DEQUANTISERS:
        known = ", ".join(sorted(DEQUANTISERS))
        refuse_field(
            FIELD,
            settings if method is None else {"quant_method": method},
            f"which is not read here (methods that are: {known}); give the model in bfloat16, or take it as a teacher "
            "with fdd teach --engine transformers",
        )
    found = DEQUANTISERS[method]
    found.check(settings)
    return found
