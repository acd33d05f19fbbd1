"""What one command asks for: models, instruction files, texts, and how models are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_fdd.data.documents import input_bytes
from megatron_fdd.evaluate.data_file import DataFile
from megatron_fdd.evaluate.generation import GenerationSettings
from megatron_fdd.evaluate.models import NamedModel, Placement
from megatron_fdd.evaluate.rouge import scorer


@dataclass(frozen=True, slots=True)
class Text:
    """What models are scored on, and what they continue.

    Attributes:
        validation: JSONL file that is scored.
        training: JSONL file whose word frequencies are the unigram model.
        length: tokens in a window.
        max_tokens: scored tokens at most.
        prompts: what every model continues, greedily.
        num_sample_tokens: how far.
    """

    validation: Path | None = None
    training: Path | None = None
    length: int = 128
    max_tokens: int = 8192
    prompts: tuple[str, ...] = ()
    num_sample_tokens: int = 40

    def check(self) -> None:
        """Refuse before a model is loaded.

        Raises:
            ValueError: a file that is missing, a value without a meaning.
        """
        if self.training is not None and self.validation is None:
            raise ValueError("--training-text is for the unigram model on --validation-text: give that too")
        input_bytes([str(path) for path in (self.validation, self.training) if path is not None])
        sizes = {
            "length": self.length,
            "max-tokens": self.max_tokens,
            "sample-tokens": self.num_sample_tokens,
        }
        for flag, size in sizes.items():
            if size < 1:
                raise ValueError(f"--{flag} {size}: at least 1")

        if self.validation is not None and self.max_tokens < self.length:
            raise ValueError(
                f"--max-tokens {self.max_tokens}: less than one window of --length {self.length}; raise it or shorten "
                "that"
            )

    @property
    def is_asked(self) -> bool:
        return self.validation is not None or bool(self.prompts)

    def check_length(self, positions: float, prompt_lengths: list[int]) -> None:
        """Refuse what one of the models has no positions for.

        Raises:
            ValueError: names lengths and flags.
        """
        if self.validation is not None and self.length > positions:
            raise ValueError(
                f"--length {self.length}: a model has {positions} positions; give as many or fewer"
            )
        longest = max(prompt_lengths, default=0)
        if self.prompts and longest + self.num_sample_tokens > positions:
            raise ValueError(
                f"--prompt has {longest} tokens and --sample-tokens is {self.num_sample_tokens}: more than a model's "
                f"{positions} positions"
            )


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that an evaluation is asked to do.

    Attributes:
        models: the teacher, where there is one, comes last.
        has_teacher: whether the others are measured by their distance to the last model.
        batch_size: prompts that are answered at once.
        out: the folder with one folder per model.
    """

    models: tuple[NamedModel, ...]
    has_teacher: bool
    data: tuple[DataFile, ...]
    text: Text
    generation: GenerationSettings
    placement: Placement
    batch_size: int
    out: Path

    @property
    def teacher(self) -> NamedModel | None:
        return self.models[-1] if self.has_teacher else None

    def check(self) -> None:
        """Refuse before a model is loaded.

        Raises:
            ValueError: nothing to do, names that are not unique, values without a meaning, missing files.
        """
        if not self.data and not self.text.is_asked:
            raise ValueError("nothing to evaluate: give --data, --validation-text or --prompt")
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: at least 1")
        self.text.check()
        self.generation.check()
        if self.data:
            scorer()
        named = {"model": [m.name for m in self.models], "data file": [d.name for d in self.data]}
        for kind, names in named.items():
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise ValueError(f"two {kind}s are called {doubled[0]!r}: tell them apart with NAME=PATH")
        for model in self.models:
            model.check()
            if (self.out / model.name).resolve() == model.folder.resolve():
                raise ValueError(
                    f"--out {self.out}: the results would go into the model's own folder {model.folder}; give another"
                )
        self._check_vocabularies()

    def _check_vocabularies(self) -> None:
        if self.teacher is None or not self.text.is_asked:
            return
        theirs, their_words = self.teacher.config().vocab_size, self.teacher.words()
        for model in self.models:
            ours = model.config().vocab_size
            if ours != theirs:
                raise ValueError(
                    f"{model.name} has {ours} words and the teacher {theirs}: they are compared word by word and need "
                    "the same vocabulary"
                )
            words = model.words()
            for index in sorted(words.keys() & their_words.keys()):
                if words[index] != their_words[index]:
                    raise ValueError(
                        f"{model.name} and the teacher have different tokenizers, so a KL would compare different "
                        f"words (at {index}: {words[index]!r} / {their_words[index]!r}); "
                        "leave --teacher or the model out"
                    )
