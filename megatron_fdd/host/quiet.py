"""A switch, turned on by importing it: no messages on import about missing CUDA, TransformerEngine and apex.

These messages help nobody where a model is converted, data is prepared, or a CPU rehearses. A real training run
imports Megatron before it imports this module, so its log has the warnings.
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
# This logger reports every file of token ids that is opened.
logging.getLogger("megatron.core.datasets.indexed_dataset").setLevel(logging.WARNING)
logging.getLogger("torch.utils.cpp_extension").addFilter(
    lambda record: "No CUDA runtime is found" not in str(record.msg)
)
