"""Imported for what it does: other packages do not mention on import that CUDA, TransformerEngine and apex are missing.

Nobody can do anything about it where a model is converted or data prepared, or where a CPU rehearses. A real training
imports Megatron before it imports this, so that its log has the warnings.
"""

from __future__ import annotations

import logging
import warnings

for message in (
    ".*Apex is not installed",
    ".*Transformer Engine and Apex are not installed",
    "Only transformer-engine>=.* supports",
    "Could not determine rank from torch.distributed",
):
    warnings.filterwarnings("ignore", message=message)
# It tells of every file of token ids that it opens.
logging.getLogger("megatron.core.datasets.indexed_dataset").setLevel(logging.WARNING)
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: "No CUDA runtime is found" not in str(record.msg)
)
