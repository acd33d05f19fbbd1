"""The engine `transformers`: any causal language model of the installed transformers, tapped by hooks.

Shape letters: B rows, S sequence, T the teacher's width, P packed width in bytes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.identity import StoreIdentity
from megatron_fdd.data.store.lens import StoredLens
from megatron_fdd.data.store.segment import Bytes
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.hf_parts import Parts
from megatron_fdd.teach.hf_run import handed_on, input_device, run_without_head, tapped
from megatron_fdd.teach.hf_teacher import DTYPES
from megatron_fdd.teach.soundness import check_place, check_states


class TransformersEngine:
    """A model of transformers in this process, on the devices of its device map.

    A row is one unit, padded on the right, without a mask: a causal model does not look at what follows.

    Args:
        model: in evaluation mode.
        row_limits: lengths of a row on both sides of which all its states differ; a batch keeps to one side.

    """

    replica, num_replicas, writes = 0, 1, True

    def __init__(
        self, identity: StoreIdentity, model: Any, parts: Parts, row_limits: Sequence[int] = ()
    ) -> None:
        assert not any(module.training for module in model.modules())
        self.identity = identity
        self._model, self._parts, self._limits = model, parts, sorted(row_limits)
        self._layers = [parts.layers[block - 1] for block in identity.blocks]
        self._dtype = DTYPES[identity.ran["dtype"]]
        self._format = TapFormat(self._dtype, identity.form)

    @torch.no_grad()
    def states(self, units: Sequence[Ids]) -> list[Bytes]:
        """Run some units; what `Engine.states` says. Collectives: none."""
        found: dict[int, Bytes] = {}

        def side(number: int) -> int:
            return bisect_left(self._limits, len(units[number]))

        for _, numbers in groupby(sorted(range(len(units)), key=side), key=side):
            rows = list(numbers)
            found |= zip(rows, self._run([units[row] for row in rows]), strict=True)
        return [found[number] for number in range(len(units))]

    @torch.no_grad()
    def lens(self, units: Sequence[Ids]) -> StoredLens:
        """Return the lens; what `Engine.lens` says. Collectives: none."""
        error, parts = 0.0, self._parts
        for ids in units:
            row_BS = torch.from_numpy(ids[None].astype(np.int64))
            row_BS = row_BS.to(input_device(self._model))
            with tapped(parts.layers[-1:]) as taps:
                run_without_head(self._model, row_BS)
            inner = [block for block in self.identity.blocks if block < len(parts.layers)]
            with handed_on([parts.layers[block] for block in inner]) as given:
                logits = self._model(input_ids=row_BS).logits
            error = max(error, parts.check_error(taps[0].to(self._dtype), logits))
            self._check_places(ids, dict(zip(inner, given, strict=True)) | {len(parts.layers): taps[0]})
        return StoredLens(parts.folded_norm, parts.head_VT.cpu(), error, parts.extras)

    def _run(self, units: Sequence[Ids]) -> list[Bytes]:
        """Run one batch; return each unit's packed states [T, S, P]."""
        lengths = [len(ids) for ids in units]
        rows = np.zeros((len(units), max(lengths)), np.int64)
        for row, ids in enumerate(units):
            rows[row, : len(ids)] = ids
        with tapped(self._layers) as taps:
            run_without_head(self._model, torch.from_numpy(rows).to(input_device(self._model)))
        assert len(taps) == len(self._layers), "find_parts saw each layer run once"
        packed = [self._format.pack(tap_BST.to(self._dtype)).contiguous() for tap_BST in taps]
        is_token_SB = torch.arange(rows.shape[1])[:, None] < torch.tensor(lengths)
        for tap_BST in taps:
            check_states(tap_BST.transpose(0, 1), is_token_SB.to(tap_BST.device))
        stacked = np.stack([each_BSP.view(torch.uint8).cpu().numpy() for each_BSP in packed])
        return [np.ascontiguousarray(stacked[:, row, :length]) for row, length in enumerate(lengths)]

    def _check_places(self, ids: Ids, wanted: Mapping[int, Tensor]) -> None:
        """Refuse states that would be stored of a unit, and are not what the model hands on behind each block."""
        [states] = self.states([ids])
        width = self.identity.hidden_size
        for row, block in enumerate(self.identity.blocks):
            wanted_ST = self._format.unpack(self._format.pack(wanted[block][0].to(self._dtype)), width)
            packed = torch.from_numpy(states[row]).view(self._format.packed_dtype)
            check_place(self._format.unpack(packed, width), wanted_ST.cpu(), block)
