"""The request of one command: models, instruction files, texts, and how models are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_fdd.data.tokenizer_identity import compare
from megatron_fdd.evaluate.data_file import DataFile
from megatron_fdd.evaluate.harness import HarnessTasks
from megatron_fdd.evaluate.models import NamedModel, Placement
from megatron_fdd.evaluate.rouge import scorer
from megatron_fdd.evaluate.settings import GenerationSettings, Text
from megatron_fdd.host.console import complain


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that an evaluation is asked to do.

    Attributes:
        models: all models; the teacher, if there is one, comes last.
        has_teacher: true if the last model is the teacher, to which the others' distance is measured.
        batch_size: how many prompts are answered at once.
        out: the folder with one folder per model.
        tasks: those of lm-evaluation-harness.
    """

    models: tuple[NamedModel, ...]
    has_teacher: bool
    data: tuple[DataFile, ...]
    text: Text
    generation: GenerationSettings
    placement: Placement
    batch_size: int
    out: Path
    tasks: HarnessTasks = HarnessTasks()

    @property
    def teacher(self) -> NamedModel | None:
        """The teacher; None without one."""
        return self.models[-1] if self.has_teacher else None

    def check(self) -> None:
        """Refuse a request that cannot work, before a model is loaded.

        Raises:
            ValueError: there is nothing to do, names are not unique, values have no meaning, or files are missing.
        """
        if not self.data and not self.text.is_asked and not self.tasks.names:
            raise ValueError("nothing to evaluate: give --data, --validation-text, --prompt or --lm-eval")
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
        self.tasks.check()

    def _check_vocabularies(self) -> None:
        """Refuse models that cannot be compared with the teacher word by word."""
        if self.teacher is None or not self.text.is_asked:
            return
        theirs, identity = self.teacher.config().vocab_size, self.teacher.identity()
        for model in self.models:
            ours = model.config().vocab_size
            if ours != theirs:
                raise ValueError(
                    f"{model.name} has {ours} words and the teacher {theirs}: they are compared word by word and need "
                    "the same vocabulary"
                )
            its = model.identity()
            if model is self.teacher or identity is None or its is None:
                continue
            found = compare(identity, its, ("the teacher", model.name))
            if found.difference is not None:
                raise ValueError(
                    f"{model.name} and the teacher have different tokenizers, so a KL would compare different "
                    f"words: {found.difference}; leave --teacher or the model out"
                )
            for remark in found.remarks:
                complain(f"warning: the tokenizers of {model.name} and the teacher: {remark}")
