"""The rank image `tests.harness.plain_rank_image`, with a record of all Megatron's names before our code runs.

Here Megatron's final norm differs from its other local norms, as it does with apex.
"""

from __future__ import annotations

import importlib
from unittest.mock import patch

from megatron.core.transformer import transformer_block

from tests.entry import megatron_names

MODULES = (
    "megatron.training.training",
    "megatron.training.models.gpt",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
)

for module in MODULES:
    importlib.import_module(module)
transformer_block.LayerNormImpl = type("NormOfApex", (), {})
megatron_names.remember()

from megatron_fdd.host import rehearsal  # noqa: E402

with patch("megatron_fdd.host.patches.norms.install_norms"):
    rehearsal.start()
