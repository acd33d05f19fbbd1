"""The engine `vllm`: units go to vLLM as token ids, its files are compared and become units of the store.

S tokens, L stored blocks, T the teacher's width, P packed width in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.identity import StoreIdentity
from megatron_fdd.data.store.lens import StoredLens
from megatron_fdd.data.store.segment import Bytes
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.hf_teacher import DTYPES
from megatron_fdd.teach.vllm.agreement import agree, told
from megatron_fdd.teach.vllm.checks import Expected
from megatron_fdd.teach.vllm.source import Answer, Source

# Places of a unit that are compared: in the first unit of each batch, and in that which the lens is compared on.
_PLACES, _LENS_PLACES = 16, 128


class VllmEngine:
    """A teacher that vLLM runs; this process has its lens alone.

    Args:
        lens: norm and head of the teacher's files, not yet compared with the engine's logits.
        expected: what each file must have.
    """

    replica, num_replicas, writes = 0, 1, True

    def __init__(self, identity: StoreIdentity, source: Source, lens: StoredLens, expected: Expected) -> None:
        self.identity = identity
        self._source, self._lens, self._expected = source, lens, expected
        self._format = TapFormat(DTYPES[identity.ran["dtype"]], identity.form)

    @torch.no_grad()
    def lens(self, units: Sequence[Ids]) -> StoredLens:
        """Return the lens; what `Engine.lens` says. Collectives: none."""
        # The first token of a text is predicted from nothing.
        texts = [ids if len(ids) > 1 else np.tile(ids, 2) for ids in units]
        errors: list[float] = []

        def compare(answer: Answer) -> Bytes:
            self._expected.check_order(answer.states_SLT)
            errors.append(self._error(answer, _LENS_PLACES))
            return self._packed(answer)

        self._source.ask(texts, self._expected, range(len(texts)), compare)
        return replace(self._lens, error=max(errors))

    @torch.no_grad()
    def states(self, units: Sequence[Ids]) -> list[Bytes]:
        """Run some units; what `Engine.states` says. The first one with two tokens is compared. Collectives: none."""
        compared = [number for number, ids in enumerate(units) if len(ids) > 1][:1]
        return self._source.ask(units, self._expected, compared, self._finish)

    def _finish(self, answer: Answer) -> Bytes:
        if answer.logprobs is not None:
            self._error(answer, _PLACES)
        return self._packed(answer)

    def _error(self, answer: Answer, most: int) -> float:
        assert answer.logprobs is not None
        said = told(answer.ids, answer.logprobs, most)
        expected = self._expected
        return agree(self._lens, answer.states_SLT, said, expected.blocks, expected.source)

    def _packed(self, answer: Answer) -> Bytes:
        """Pack a unit's states: uint8 [L, S, P]."""
        packed = self._format.pack(answer.states_SLT.transpose(0, 1).contiguous()).contiguous()
        return np.ascontiguousarray(packed.view(torch.uint8).numpy())
