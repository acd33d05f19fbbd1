"""How vLLM must be started for a teacher: the same arguments for a server and in this process."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONNECTOR = "ExampleHiddenStatesConnector"
# The folder of a command that is only shown.
ANY_FOLDER = Path("/dev/shm/hidden-states")


@dataclass(frozen=True, slots=True)
class VllmSettings:
    """What vLLM is told.

    Attributes:
        teacher: the Hugging Face folder.
        blocks: whose outputs it gives, 1-based, increasing: its ids of layers are the same numbers.
        folder: where it writes a file a request.
        longest: tokens of the longest unit.
        positions: the longest row of the model.
        dtype: what it computes in.
    """

    teacher: Path
    blocks: Sequence[int]
    folder: Path
    longest: int
    positions: float
    dtype: str

    @property
    def max_model_len(self) -> int:
        """Tokens of a request: a unit, and the one token that vLLM must generate."""
        return self.longest + 1

    @property
    def is_long(self) -> bool:
        """Whether a unit as long as the model's limit leaves no room for that token, which vLLM must be told."""
        return self.max_model_len > self.positions

    @property
    def speculative_config(self) -> dict[str, Any]:
        """The method that gives hidden states, in the place of a draft model."""
        ids = {"eagle_aux_hidden_state_layer_ids": list(self.blocks)}
        return {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": ids},
        }

    @property
    def kv_transfer_config(self) -> dict[str, Any]:
        """The connector that writes them."""
        return {
            "kv_connector": CONNECTOR,
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(self.folder)},
        }

    def command(self, port: int) -> str:
        """Return the command that starts a server, for a shell; how many GPUs it gets is left to its reader."""
        words = [
            *("vllm", "serve", str(self.teacher), "--port", str(port), "--dtype", self.dtype),
            *("--max-model-len", str(self.max_model_len), "--no-enable-prefix-caching"),
            *("--speculative-config", json.dumps(self.speculative_config)),
            *("--kv-transfer-config", json.dumps(self.kv_transfer_config)),
        ]
        return f"{'VLLM_ALLOW_LONG_MAX_MODEL_LEN=1 ' if self.is_long else ''}{shlex.join(words)}"
