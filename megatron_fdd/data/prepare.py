"""Preparation of raw files: prepared sets on disk, all or nothing, with a progress bar."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from megatron.core.tokenizers.text.text_tokenizer import MegatronTokenizerText

from megatron_fdd.data.chat import ANSWERS
from megatron_fdd.data.chat_template import ChatTemplate
from megatron_fdd.data.dealing import Shares
from megatron_fdd.data.documents import JsonKeys, input_bytes, read_documents
from megatron_fdd.data.encode import EMPTY_DOCUMENTS, Encoded, Encoder, EncodeSettings
from megatron_fdd.data.megatron_tokenizer import identify, load_tokenizer, text_tokenizer
from megatron_fdd.data.parts import Done, Parts
from megatron_fdd.data.prepared import SetKind, check_replaceable, written_files
from megatron_fdd.data.show import page
from megatron_fdd.data.summary import refusal_lines, summary_lines
from megatron_fdd.data.tally import Tally
from megatron_fdd.data.tokenizer import TextTokenizer, generation_stops
from megatron_fdd.data.tokenizer_identity import TokenizerStamp
from megatron_fdd.data.workers import encode_in_order, useful_workers
from megatron_fdd.host.bar import Bar
from megatron_fdd.host.disk import make_folder, regular_file, writing

SPLIT_NAMES = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class PrepareSettings:
    """What to prepare, and where to write it.

    Attributes:
        split: shares of train, valid and (optionally) test documents; empty for one set.
        separator: where a document of a text file ends (`documents.read_documents`).
        workers: at most so many processes tokenise; fewer if there is little to do (`workers.useful_workers`).
        overwrite: replace sets that exist.
        skip_refused: continue after a refused record, and count it.
        show: how many samples to write to a page beside the set, for people.
    """

    inputs: tuple[str, ...]
    output_prefix: str
    encode: EncodeSettings
    separator: str = "file"
    split: tuple[float, ...] = ()
    workers: int = 1
    overwrite: bool = False
    skip_refused: bool = False
    show: int = 0

    def check(self) -> None:
        """Refuse settings that cannot work, before any file is written.

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
            raise ValueError(
                f"--template {self.encode.template} is for instructions; these files are plain text"
            )
        if self.encode.template is not None and self.encode.keys != JsonKeys():
            raise ValueError(
                f"--template {self.encode.template} finds the fields by the layout of a record: leave out "
                "--prompt-key, --response-key and --json-key, or rename the fields"
            )
        if not os.path.basename(self.output_prefix):
            raise ValueError(f"--output-prefix {self.output_prefix} is a folder; add a name for the files")
        read = {os.path.realpath(path): path for path in self.inputs}
        for prefix in self.prefixes():
            check_replaceable(prefix)
            for path in written_files(prefix):
                if os.path.realpath(path) in read:
                    raise ValueError(f"--output-prefix {prefix}: {path} is an input; give another prefix")
        if self.show:
            regular_file("--show", samples_page(self.output_prefix))
        there = [prefix for prefix in self.prefixes() if os.path.exists(prefix + ".idx")]
        if there and not self.overwrite:
            raise ValueError(
                f"{', '.join(there)}: a prepared set exists already; give another --output-prefix, or --overwrite "
                "to replace it (not while a training reads it)"
            )

    def prefixes(self) -> list[str]:
        """Return the prefixes of the set or sets to write."""
        if not self.split:
            return [self.output_prefix]
        return [f"{self.output_prefix}_{name}" for name in SPLIT_NAMES[: len(self.split)]]


@dataclass(frozen=True, slots=True)
class Summary:
    """What was written, and what was left out.

    Attributes:
        template: the template of the conversations; None if there was no conversation.
        eod: the token that ends documents; None if none was added.
    """

    prefixes: tuple[str, ...]
    tally: Tally
    template: ChatTemplate | None
    eod: str | None
    seconds: float

    def lines(self) -> list[str]:
        """Return lines for people; the first one has the sets and the time."""
        counts, *more = summary_lines(self.tally, self.template)
        if self.eod is not None:
            more.insert(0, f"documents end with {self.eod} (--eod-token)")
        return [
            f"{', '.join(self.prefixes)}: {counts} in {self.seconds:.1f} s",
            *(f"  {line}" for line in more),
        ]


def prepare(settings: PrepareSettings) -> Summary:
    """Encode all inputs and write the set or sets; after an error nothing is left that looks whole.

    If a run with the same settings and inputs was cut off, this one continues from its last whole part (`parts`),
    which loses about a minute of its work at most.

    Raises:
        ValueError: malformed input (names file and line), missing files or tokenizer, a set without a document.
    """
    started = time.monotonic()
    settings.check()
    total_bytes = input_bytes(settings.inputs)
    folder = os.path.dirname(os.path.abspath(settings.output_prefix))
    make_folder("--output-prefix", settings.output_prefix, folder)
    tokenizer = load_tokenizer(settings.encode.tokenizer)
    encoder = _encoder(settings, tokenizer)
    kind: SetKind = "instruction" if settings.encode.format == "instruction" else "text"
    identity = identify(tokenizer)
    name = os.path.basename(settings.output_prefix)
    with (
        writing("--output-prefix", settings.output_prefix),
        Parts(settings.prefixes(), name, kind, identity, _fingerprint(settings, identity)) as parts,
        writing("--output-prefix", settings.output_prefix),  # tells the room before there is more again
    ):
        done = parts.done
        bar = Bar(total=total_bytes, desc="preparing", unit="B", initial=done.num_bytes)
        with bar:
            _write_all(settings, encoder, parts, bar)
        _check_documents(settings, done)
        has_chats = done.tally.notes[ANSWERS] > 0
        template = encoder.tokenizer.chat(settings.encode.chat) if has_chats else None
        parts.commit(_preparation(settings, done.tally, template))
    if settings.show:
        tokenizer_of_text, first, _ = look(settings)
        text = page(tokenizer_of_text, first, f"Samples of {settings.output_prefix}")
        with writing("--output-prefix", settings.output_prefix):
            samples_page(settings.output_prefix).write_text(text, encoding="utf-8")
    adds_eod = settings.encode.append_eod or (kind == "instruction" and template is None)
    return Summary(
        tuple(settings.prefixes()),
        done.tally,
        template,
        identity.eod_token if adds_eod else None,
        time.monotonic() - started,
    )


def _fingerprint(settings: PrepareSettings, identity: TokenizerStamp) -> str | None:
    """Return a hash of all that decides what is in the sets; None for inputs that cannot be read again (pipes)."""
    if not all(os.path.isfile(path) for path in settings.inputs):
        return None
    files = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in settings.inputs]
    decisive = (settings.encode, settings.separator, settings.split, identity, files)
    return hashlib.sha256(repr(decisive).encode("utf-8", "surrogatepass")).hexdigest()


def _preparation(settings: PrepareSettings, tally: Tally, template: ChatTemplate | None) -> dict[str, object]:
    """Return what `P.prepared.json` stores about the run that made it."""
    seen = {"seq_length": settings.encode.seq_length, **tally.as_json()}
    if template is None:
        return seen
    chat = settings.encode.chat
    return seen | {
        "chat": {
            "template_sha256": hashlib.sha256(repr(template.text).encode()).hexdigest(),
            "kwargs": dict(chat.variables),
            "date": str(template.date) if template.uses_date else None,
            "turns": chat.turns,
            "allowed": sorted(chat.allowed),
        }
    }


def look(settings: PrepareSettings) -> tuple[TextTokenizer, list[Encoded], Tally]:
    """Encode the first `show` samples; return their tokenizer, the samples and the tally.

    Nothing is written to a file.

    Raises:
        ValueError: as in `prepare`, for the documents that were read.
    """
    encoder = _encoder(settings, load_tokenizer(settings.encode.tokenizer))
    first: list[Encoded] = []
    tally = Tally()
    for document in read_documents(settings.inputs, settings.encode.format, settings.separator):
        encoded = encoder(document)
        if encoded.refusal is not None and not settings.skip_refused:
            raise encoded.refusal
        tally.add(encoded)
        first += encoded.samples
        if len(first) >= settings.show:
            break
    if tally.refused and not first:
        raise ValueError("\n".join(["nothing is left to show", *refusal_lines(tally)]))
    return encoder.tokenizer, first[: settings.show], tally


def _encoder(settings: PrepareSettings, tokenizer: MegatronTokenizerText) -> Encoder:
    stops = generation_stops(settings.encode.tokenizer.tokenizer_model)
    return Encoder(settings.encode, text_tokenizer(tokenizer, stops))


def samples_page(prefix: str) -> Path:
    """Return the path of a set's page of samples."""
    return Path(prefix + ".samples.html")


def _write_all(settings: PrepareSettings, encoder: Encoder, parts: Parts, bar: Bar) -> None:
    """Write all documents that are not written yet.

    All samples of a record go to one set, so that no conversation is in both training and validation.

    Raises:
        Refusal: a record was refused, and refused records are not skipped.
    """
    done = parts.done
    documents = read_documents(settings.inputs, settings.encode.format, settings.separator)
    shares = Shares(settings.split, done.dealt)
    workers = useful_workers(settings.workers, settings.inputs)
    for num_bytes, encoded_documents in encode_in_order(
        islice(documents, done.documents, None), encoder, workers, past_refusals=settings.skip_refused
    ):
        for encoded in encoded_documents:
            if encoded.refusal is not None and not settings.skip_refused:
                raise encoded.refusal
            done.tally.add(encoded)
            if encoded.samples:
                writer = parts.writers[shares.next()]
                for sample in encoded.samples:
                    writer.add(sample)
        bar.update(num_bytes)
        done.documents += len(encoded_documents)
        done.num_bytes += num_bytes
        if parts.is_due():
            parts.keep()


def _check_documents(settings: PrepareSettings, done: Done) -> None:
    """Refuse to write a set without a document."""
    for prefix, count in zip(settings.prefixes(), done.dealt, strict=True):
        if count == 0:
            if done.tally.refused and not done.tally.documents:
                raise ValueError("\n".join(["nothing is left to write", *refusal_lines(done.tally)]))
            raise ValueError(
                f"no document for {prefix} ({done.tally.documents} for the other sets, "
                f"{done.tally.notes[EMPTY_DOCUMENTS]} empty, {done.tally.refused.total()} refused): give more "
                "documents, a larger share in --split, or another --document-separator"
            )
