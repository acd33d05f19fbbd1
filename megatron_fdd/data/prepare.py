"""Raw files to prepared sets: a progress bar, all or nothing on disk."""

from __future__ import annotations

import glob
import logging
import os
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass

from tqdm import tqdm

from megatron_fdd.data.documents import JsonKeys, input_bytes, read_documents
from megatron_fdd.data.encode import Encoder, EncodeSettings
from megatron_fdd.data.megatron_tokenizer import identify, load_tokenizer, text_tokenizer
from megatron_fdd.data.prepared import SetKind, SetWriter, commit
from megatron_fdd.data.workers import encode_in_order, useful_workers

logger = logging.getLogger(__name__)

SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """What to prepare, and where to.

    Attributes:
        split: shares of train, valid and (optionally) test documents; empty for one set.
        separator: where a document of a text file ends (`documents.read_documents`).
        workers: processes that tokenise, at most; fewer where there is little to do (`workers.useful_workers`).
        overwrite: replace sets that are there.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    encode: EncodeSettings
    separator: str = "file"
    split: tuple[float, ...] = ()
    workers: int = 1
    overwrite: bool = False

    def check(self) -> None:
        """Refuse what cannot work, before a file is written.

        Raises:
            ValueError: names the value, the bound and the remedy.
        """
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers}: at least 1")
        if self.split and not (2 <= len(self.split) <= 3 and min(self.split) > 0):
            raise ValueError(
                f"--split {','.join(map(str, self.split))}: give 2 or 3 positive shares (train, valid, "
                "test), for example 95,5; without --split there is one set"
            )
        if self.encode.seq_length is not None and self.encode.seq_length < 1:
            raise ValueError(f"--seq-length {self.encode.seq_length}: at least 1")
        if self.encode.seq_length is not None and self.encode.format != "instruction":
            raise ValueError(
                "--seq-length truncates instructions; plain text is cut into samples during training"
            )
        if self.encode.template is not None and self.encode.format != "instruction":
            raise ValueError(f"--template {self.encode.template} is for instructions; these files are text")
        if self.encode.template is not None and self.encode.keys != JsonKeys():
            raise ValueError(
                f"--template {self.encode.template} finds the fields by the layout of a record: leave out "
                "--prompt-key, --response-key and --json-key, or rename the fields"
            )
        if not os.path.basename(self.output_prefix):
            raise ValueError(f"--output-prefix {self.output_prefix} is a folder; add a name for the files")
        there = [prefix for prefix in self.prefixes() if os.path.exists(prefix + ".idx")]
        if there and not self.overwrite:
            raise ValueError(
                f"{', '.join(there)}: a prepared set is there already; give another --output-prefix, or --overwrite "
                "to replace it (not while a training reads it)"
            )

    def prefixes(self) -> list[str]:
        """The set or sets to write."""
        if not self.split:
            return [self.output_prefix]
        return [f"{self.output_prefix}_{name}" for name in SPLIT_NAMES[: len(self.split)]]


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written. `skipped`: empty documents, and instructions in which nothing is learned."""

    prefixes: tuple[str, ...]
    documents: int
    tokens: int
    skipped: int
    truncated: int
    seconds: float


class _Shares:
    """Deals documents to the sets so that after each of them the counts are as near the shares as can be.

    Depends on nothing but the order, so any number of workers gives the same sets, and every stretch of the
    corpus is in all of them.
    """

    def __init__(self, shares: tuple[float, ...]) -> None:
        total = sum(shares) or 1.0
        self._shares = [share / total for share in shares] or [1.0]
        self._dealt = [0] * len(self._shares)

    def next(self) -> int:
        number = sum(self._dealt) + 1
        debts = [share * number - dealt for share, dealt in zip(self._shares, self._dealt, strict=True)]
        part = debts.index(max(debts))
        self._dealt[part] += 1
        return part


def prepare(settings: PrepareSettings) -> Summary:
    """Encode all inputs and write the set or sets; on any error nothing is left that looks whole.

    Raises:
        ValueError: malformed input (file and line), missing files or tokenizer, a set without a document.
    """
    started = time.monotonic()
    settings.check()
    total_bytes = input_bytes(settings.inputs)
    folder = os.path.dirname(os.path.abspath(settings.output_prefix))
    _make_folder(folder, settings.output_prefix)
    tokenizer = load_tokenizer(settings.encode.tokenizer)
    encoder = Encoder(settings.encode, text_tokenizer(tokenizer))
    scratch_name = f".{os.path.basename(settings.output_prefix)}.partial-"
    for leftover in glob.glob(os.path.join(glob.escape(folder), glob.escape(scratch_name) + "*")):
        logger.warning("%s is left from a run that was interrupted (or still runs); delete it", leftover)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=scratch_name, dir=folder))
        bar = stack.enter_context(
            tqdm(total=total_bytes, unit="B", unit_scale=True, desc="preparing", disable=None)
        )
        kind: SetKind = "instruction" if settings.encode.format == "instruction" else "text"
        identity = identify(tokenizer)
        writers = [SetWriter(prefix, scratch, kind, identity) for prefix in settings.prefixes()]
        skipped = _write_all(settings, encoder, writers, bar)
        _check_documents(writers, skipped)
        commit(writers)
    return Summary(
        prefixes=tuple(writer.prefix for writer in writers),
        documents=sum(writer.documents for writer in writers),
        tokens=sum(writer.tokens for writer in writers),
        skipped=skipped,
        truncated=sum(writer.truncated for writer in writers),
        seconds=time.monotonic() - started,
    )


def _make_folder(folder: str, prefix: str) -> None:
    """Make the folder of a prefix, and see that files can be made in it."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output-prefix {prefix}: cannot be written ({error.strerror})") from error


def _write_all(settings: PrepareSettings, encoder: Encoder, writers: list[SetWriter], bar: tqdm) -> int:
    """Feed the writers; returns how many documents were skipped."""
    documents = read_documents(settings.inputs, settings.encode.format, settings.separator)
    shares = _Shares(settings.split)
    workers = useful_workers(settings.workers, settings.inputs)
    skipped = 0
    for num_bytes, encoded_documents in encode_in_order(documents, encoder, workers):
        for encoded in encoded_documents:
            if encoded is None:
                skipped += 1
            else:
                writers[shares.next()].add(encoded)
        bar.update(num_bytes)
    return skipped


def _check_documents(writers: list[SetWriter], skipped: int) -> None:
    for writer in writers:
        if writer.documents == 0:
            others = sum(other.documents for other in writers)
            raise ValueError(
                f"no document for {writer.prefix} ({others} for the other sets, {skipped} skipped as empty "
                "or without anything to learn): give more documents, a larger share in --split, or "
                "another --document-separator"
            )
