"""As `tests.harness.plain_rank_image`, and it remembers what every name of Megatron was before any of ours ran.

Megatron's final norm is another than its other local ones here, as beside apex.
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
