"""Counts of what preparing saw: documents, notes, and refusals by reason, with the first places of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_fdd.data.encode import EncodedDocument
from megatron_fdd.data.refusals import Reason, Refusal

# How many places a summary names for each reason.
PLACES = 3
_COUNTED = ("documents", "samples", "tokens", "learned", "truncated")


@dataclass(slots=True)
class Tally:
    """Counts that add up over documents.

    Attributes:
        documents: records that gave a sample.
        samples, tokens, learned: their samples, tokens and learned tokens.
        truncated: samples whose end was cut off.
        lengths: numbers of samples by length in tokens: a key, a power of two, counts those with at most
            so many tokens and more than half of it.
        notes: counts by the notes in `chat` and `encode`.
        refused: numbers of refused records by reason.
        first: the first refusals of each reason.
    """

    documents: int = 0
    samples: int = 0
    tokens: int = 0
    learned: int = 0
    truncated: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    refused: Counter[Reason] = field(default_factory=Counter)
    first: dict[Reason, list[Refusal]] = field(default_factory=dict)

    def add(self, document: EncodedDocument) -> None:
        """Add one document."""
        if document.refusal is not None:
            reason = document.refusal.reason
            self.refused[reason] += 1
            places = self.first.setdefault(reason, [])
            if len(places) < PLACES:
                places.append(document.refusal)
        self.notes.update(document.notes)
        self.documents += bool(document.samples)
        self.samples += len(document.samples)
        for sample in document.samples:
            self.tokens += len(sample.ids)
            self.learned += len(sample.ids) if sample.loss_mask is None else int(sample.loss_mask.sum())
            self.truncated += sample.truncated
            self.lengths[1 << (len(sample.ids) - 1).bit_length()] += 1

    def state(self) -> dict[str, Any]:
        """Return JSON values for `from_state`."""
        first = [refusal for refusals in self.first.values() for refusal in refusals]
        return {
            **{name: getattr(self, name) for name in _COUNTED},
            "lengths": dict(self.lengths),
            "notes": dict(self.notes),
            "refused": {reason.name: count for reason, count in self.refused.items()},
            "first": [(refusal.where, refusal.reason.name, refusal.detail) for refusal in first],
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """Return the tally that `state` described. ValueError, KeyError or TypeError if it describes none."""
        first: dict[Reason, list[Refusal]] = {}
        for where, reason, detail in state["first"]:
            first.setdefault(Reason[reason], []).append(Refusal(where, Reason[reason], detail))
        return cls(
            **{
                **state,
                "lengths": Counter({int(length): count for length, count in state["lengths"].items()}),
                "notes": Counter(state["notes"]),
                "refused": Counter({Reason[name]: count for name, count in state["refused"].items()}),
                "first": first,
            }
        )

    def as_json(self) -> dict[str, object]:
        """Return JSON values for `PREFIX.prepared.json` and the report."""
        return {
            **{name: getattr(self, name) for name in _COUNTED},
            "lengths": {str(length): count for length, count in sorted(self.lengths.items())},
            "notes": dict(self.notes),
            "refused": {reason.title: count for reason, count in self.refused.items()},
        }
