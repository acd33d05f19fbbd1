"""Encoders that run in workers under test; this file imports nothing that a worker would not import."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass

from megatron_fdd.data import render_limits
from megatron_fdd.data.documents import RawDocument
from megatron_fdd.data.encode import EncodedDocument, Encoder


@dataclass
class Probe:
    """An encoder that does something special when it meets a certain word."""

    encoder: Encoder

    @property
    def tokenizer(self):
        return self.encoder.tokenizer

    def __call__(self, document: RawDocument) -> EncodedDocument:
        if b"wait" in document.content:
            time.sleep(3600)
        encoded = self.encoder(document)
        if b"report" in document.content:  # raises an error, which comes back with its text
            loaded = [name for name in ("torch", "megatron") if sys.modules.get(name)]
            raise ValueError(f"process {os.getpid()} of {os.getppid()} has {loaded}")
        if b"die" in document.content:
            os._exit(9)
        return encoded


@dataclass
class Hurried:
    """An encoder whose chat templates have less time."""

    encoder: Encoder
    seconds: float

    @property
    def tokenizer(self):
        return self.encoder.tokenizer

    def __call__(self, document: RawDocument) -> EncodedDocument:
        render_limits.SECONDS = self.seconds
        return self.encoder(document)
