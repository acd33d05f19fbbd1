"""Files that hold all experts of a layer in two tensors, where the published ones have three for each expert.

transformers 5 computes with such tensors, and other programs write them as they stand in memory; it itself writes the
published names.
"""

from __future__ import annotations

import dataclasses
import re

from megatron_fdd.convert.families.decoder_shape import Dialect
from megatron_fdd.convert.families.expert_naming import StackedNaming
from megatron_fdd.convert.families.family import StoredFolder

_GATE_UP, _DOWN = "experts.gate_up_proj", "experts.down_proj"
_NAME = re.compile(rf"(model\.layers\.\d+\.(\w+)\.){re.escape(_GATE_UP)}")


def as_joined(dialect: Dialect, folder: StoredFolder) -> Dialect | None:
    """Return the dialect with joined experts if the files have them; None if they have the published names.

    An expert's matrices may be [out, in] or [in, out]: the shapes tell it, for gate and up or else for down.
    """
    naming = dialect.experts
    if naming is None or naming.stacked is not None:
        return None
    found = next(filter(None, map(_NAME.fullmatch, folder.names)), None)
    if found is None:
        return None
    before, block = found.groups()
    hidden, width = folder.config.get("hidden_size"), folder.config.get(naming.width_field)
    first, second = (folder.shape(before + name)[1:] for name in (_GATE_UP, _DOWN))
    is_transposed = first[::-1] != first and first[0] == hidden
    if first[::-1] == first:  # as many inputs as outputs
        is_transposed = second[::-1] != second and second[0] == width
    stacked = StackedNaming(_GATE_UP, _DOWN, is_transposed=is_transposed)
    return dataclasses.replace(dialect, experts=dataclasses.replace(naming, block=block, stacked=stacked))
