"""What a store holds: which teacher's features, of which blocks, in which form. Written once, compared ever after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_fdd.data.store.whole_file import give_name, sync_folder, unfinished
from megatron_fdd.host.json_file import read_json, read_record, write_json

STORE_FILE = "store.json"
# A folder of counts of runs' units (`counted.py`).
RUNS = "runs"
FORMAT, VERSION = "fdd-features", 1
TapForm = Literal["float32", "bf16", "fp8", "int8"]
# Fields that are hashes, in words.
_HASHES = {
    "weights": "the weights",
    "final_norm": "the final norm",
    "architecture": "the architecture",
}
_MAKE_NEW = "another folder, or make this store with this version's fdd teach"


@dataclass(frozen=True, slots=True)
class StoreIdentity:
    """The identity of a store. Two producers of one store have the same one.

    Attributes:
        engine: what ran the teacher: "megatron", "transformers" or "vllm".
        teacher: its name, for people; a moved folder is the same teacher, so that it is not compared.
        weights: hash of all weights (vllm: of a part of each): each engine has its own, which does not depend on files
            and layout.
        final_norm: SHA-256 of the final norm's weight in float32, as a lens file has it.
        architecture: hash of the teacher's configuration.
        num_layers, hidden_size: of the teacher.
        vocab_size: rows of its head, without padding.
        blocks: whose outputs are stored, 1-based, increasing; the last one is the teacher's last block.
        form: how a hidden state is packed (`step/teacher/tap_format.py`).
        token_bytes: bytes of one packed hidden state.
        ran: what decides the numbers further: dtype, attention, quantisation, as they really were.
    """

    engine: str
    teacher: str
    weights: str
    final_norm: str
    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    blocks: list[int]
    form: TapForm
    token_bytes: int
    ran: dict[str, str]

    @property
    def digest(self) -> str:
        """The hash that every segment carries, so that none of another store is taken for one of this."""
        compared = {name: value for name, value in dataclasses.asdict(self).items() if name != "teacher"}
        return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()[:16]

    def difference(self, other: StoreIdentity, unknown: Container[str] = ()) -> str | None:
        """Return the first field in which two identities differ, in words; None if they are the same.

        Args:
            unknown: fields that nobody knows yet.
        """
        for field in dataclasses.fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if field.name != "teacher" and field.name not in unknown and here != there:
                name = field.name
                if name in _HASHES:
                    return f"{_HASHES[name]} of {self.teacher} there, and of {other.teacher} here"
                if isinstance(here, dict):
                    name = next(key for key in sorted({*here, *there}) if here.get(key) != there.get(key))
                    here, there = here.get(name), there.get(name)
                return f"{name} {_short(here)} there, and {_short(there)} here"
        return None


def read_identity(store: str | Path, flag: str) -> StoreIdentity:
    """Read the identity of a store.

    Args:
        flag: what named the store, for messages.

    Raises:
        ValueError: there is no store, or another version made it.
    """
    path = Path(store) / STORE_FILE
    if not path.is_file():
        what = "the folder holds no store" if Path(store).is_dir() else "there is no such folder"
        raise ValueError(f"{flag} {store}: {what} (no {STORE_FILE}); make one with fdd teach --store {store}")
    values = read_json(path)
    if values.pop("format", None) != FORMAT:
        raise ValueError(f"{flag} {store}: {STORE_FILE} is not of a store of features; give {_MAKE_NEW}")
    version = values.pop("version", None)
    if version != VERSION:
        raise ValueError(
            f"{flag} {store}: has the format version {version!r}, and this version of the package reads {VERSION}; "
            f"give {_MAKE_NEW}"
        )
    try:
        identity = read_record(StoreIdentity, values)
        _check(identity)
    except ValueError as error:
        raise ValueError(
            f"{flag} {store}: {STORE_FILE} is damaged ({error}); copy the file again, or make the store anew"
        ) from error
    return identity


def write_identity(store: Path, identity: StoreIdentity) -> None:
    """Make a store, or join one that another producer has made.

    Raises:
        ValueError: a store of something else is there, or the folder cannot be written.
    """
    _check(identity)
    path = store / STORE_FILE
    values: dict[str, Any] = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(identity)}
    if not path.exists():
        with unfinished(store, path) as place:
            write_json(place, values)
            with place.open("rb") as file:
                os.fsync(file.fileno())
            give_name(place, path)
            sync_folder(store)
    check_same(store, identity)


def check_same(store: Path, identity: StoreIdentity, unknown: Container[str] = ()) -> None:
    """Refuse to add features to a store of something else.

    Args:
        unknown: fields of the identity that nobody knows yet.

    Raises:
        ValueError: names the first difference; or there is no store.
    """
    difference = read_identity(store, "--store").difference(identity, unknown)
    if difference is not None:
        raise ValueError(
            f"--store {store}: holds the features of something else: {difference}. One store has one teacher, one "
            "choice of blocks and one form: give another folder"
        )


def _check(identity: StoreIdentity) -> None:
    """Refuse an identity that no store can have."""
    blocks = identity.blocks
    if not blocks or blocks != sorted(set(blocks)) or blocks[0] < 1 or blocks[-1] != identity.num_layers:
        raise ValueError(f"blocks {blocks} must increase, and end with the last block, {identity.num_layers}")
    for name in ("hidden_size", "vocab_size", "token_bytes"):
        if getattr(identity, name) < 1:
            raise ValueError(f"{name} {getattr(identity, name)} must be at least 1")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 400 else f"{text[:400]}..."
