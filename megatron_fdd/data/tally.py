"""What preparing saw: counts of documents and notes, and what was refused, by reason, with the first places of each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_fdd.data.encode import EncodedDocument
from megatron_fdd.data.refusals import Reason, Refusal

# How many places of each reason a summary names.
PLACES = 3
_COUNTED = ("documents", "samples", "tokens", "learned", "truncated")


@dataclass(slots=True)
class Tally:
    """Adds up documents.

    Attributes:
        documents: records that gave a sample.
        samples, tokens, learned: of them.
        truncated: samples whose end was cut off.
        lengths: of samples, in tokens: how many have at most so many, a power of two, and more than half of it.
        notes: see `chat` and `encode`.
        refused: how many, by reason.
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
        """One more document."""
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
        """As JSON, for `from_state`."""
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
        """What `state` gave. ValueError, KeyError or TypeError where it is none."""
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
        """For `PREFIX.prepared.json`, and the report."""
        return {
            **{name: getattr(self, name) for name in _COUNTED},
            "lengths": {str(length): count for length, count in sorted(self.lengths.items())},
            "notes": dict(self.notes),
            "refused": {reason.title: count for reason, count in self.refused.items()},
        }
