"""One set of toy checkpoints and prepared data for all tests of the entry point."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_fdd import convert
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.convert import toys
from tests.entry.command import COMMON
from tests.harness.ranks import Layout, run_on_ranks

TEACHER = {"num_hidden_layers": 6}
STUDENT = {
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}

# The student as flags of Megatron.
SCRATCH = (
    "--num-layers 4 --hidden-size 32 --ffn-hidden-size 44 --num-attention-heads 4 --kv-channels 8 "
    "--group-query-attention --num-query-groups 2 --max-position-embeddings 64 --position-embedding-type rope "
    "--normalization RMSNorm --swiglu --disable-bias-linear --untie-embeddings-and-output-weights"
).split()


@dataclass(frozen=True)
class Toys:
    """Folders of the toy set: models in Hugging Face's format and as Megatron checkpoints, and prepared text."""

    root: Path

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def tokenizer(self) -> Path:
        return self.teacher / "tokenizer"

    @property
    def data(self) -> Path:
        return self.root / "text"

    def command(self, *more: object) -> list[str]:
        """Return the flags of a distillation run; `more` override them."""
        return [*COMMON, *_words("--load", self.student, *self._teacher, *self._text, *more)]

    def mock_command(self, *more: object) -> list[str]:
        """Return flags as `command` does, with made-up data, so that no data set refuses another tokenizer first."""
        flags = (
            "--mock-data",
            "--tokenizer-type",
            "HuggingFaceTokenizer",
            "--tokenizer-model",
            self.tokenizer,
        )
        return [*COMMON, *_words("--load", self.student, *self._teacher, *flags, *more)]

    def saving_command(self, folder: Path, *more: object) -> list[str]:
        """Return flags as `command` does; checkpoints and `metrics.jsonl` go to `folder`."""
        places = ("--save", folder, "--fdd-metrics-file", folder / "metrics.jsonl", "--save-interval", 2)
        return self.command(*places, *more)

    @property
    def _teacher(self) -> tuple[object, ...]:
        return "--teacher-load", self.teacher

    @property
    def _text(self) -> tuple[object, ...]:
        tokenizer = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", self.tokenizer)
        return "--data-path", self.data, "--split", "80,20,0", *tokenizer


def _words(*flags: object) -> list[str]:
    return [str(flag) for flag in flags]


def make_checkpoint(root: Path, name: str, changes: dict[str, object]) -> None:
    """Make, on one rank, a random Llama as `root/name-hf`, converted to `root/name`."""
    toys.make_llama(root / f"{name}-hf", **changes)
    convert.hf_to_mcore(root / f"{name}-hf", root / name)


def write_text(path: Path) -> None:
    rng = random.Random(3)
    words = "the quick brown fox jumps over lazy dog a student follows its teacher gradient descent".split()
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=rng.randint(8, 30))) for _ in range(200)))


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """Make a teacher (6 layers, width 48) and a student (4 layers, width 32) with one tokenizer, and text for them."""
    found = Toys(tmp_path_factory.mktemp("entry"))
    for name, changes in (("teacher", TEACHER), ("student", STUDENT)):
        arguments = {"root": found.root, "name": name, "changes": changes}
        run_on_ranks(make_checkpoint, Layout(ranks=1), arguments)
    write_text(found.root / "text.txt")
    encode = EncodeSettings(TokenizerSettings("HuggingFaceTokenizer", str(found.tokenizer)), "text")
    prepare(PrepareSettings((str(found.root / "text.txt"),), str(found.data), encode, separator="blank-line"))
    return found
