"""Students, their teacher and the unigram model side by side: scores, samples, a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_fdd.evaluate.perplexity import (
    Score,
    continue_text,
    cut_windows,
    read_documents,
    score_models,
    unigram_cross_entropy,
)

TEACHER = "teacher"


@dataclass(frozen=True, slots=True)
class Text:
    """What the models are compared on.

    Attributes:
        validation: JSONL file that is scored.
        training: JSONL file whose word frequencies are the unigram model.
        length: tokens in a window.
        max_tokens: scored tokens at most.
        prompt: what every model continues.
        num_sample_tokens: how far.
    """

    validation: Path
    training: Path
    length: int = 128
    max_tokens: int = 8192
    prompt: str = "The Python language"
    num_sample_tokens: int = 40


@dataclass(frozen=True, slots=True)
class Comparison:
    """Scores and samples by model name; the teacher is among them as "teacher"."""

    num_tokens: int
    prompt: str
    scores: dict[str, Score]
    samples: dict[str, str]
    unigram_cross_entropy: float

    def table(self) -> str:
        """For people, models in the order in which they were given."""
        width = max(len(name) for name in [*self.scores, "unigram model"])
        lines = [
            f"{'':{width}}  perplexity  cross-entropy  KL(teacher || model)   ({self.num_tokens} tokens)"
        ]
        for name, score in self.scores.items():
            lines.append(
                f"{name:{width}}  {score.perplexity:10.1f}  {score.cross_entropy:13.3f}"
                f"  {score.kl_to_teacher:20.3f}"
            )
        unigram = Score(self.unigram_cross_entropy, float("nan"))
        lines.append(f"{'unigram model':{width}}  {unigram.perplexity:10.1f}  {unigram.cross_entropy:13.3f}")
        lines += ["", f"Each continues {self.prompt!r}:"]
        lines += [f"{name:{width}}  {sample!r}" for name, sample in self.samples.items()]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """The same as plain values, for files."""
        return asdict(self)


def compare(teacher_folder: Path, student_folders: Mapping[str, Path], text: Text) -> Comparison:
    """Load every model in float32 and compare them on `text`, with the teacher's tokenizer.

    Raises:
        ValueError: a student called "teacher"; a vocabulary that is not the teacher's; too little text.
    """
    if TEACHER in student_folders:
        raise ValueError(f"{TEACHER!r} is the teacher's own name: give the student another")
    tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
    folders = {**student_folders, TEACHER: teacher_folder}
    models = {
        name: AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
        for name, folder in folders.items()
    }
    teacher = models[TEACHER]
    windows = cut_windows(read_documents(text.validation), tokenizer, text.length, text.max_tokens)
    training_windows = cut_windows(read_documents(text.training), tokenizer, text.length)
    return Comparison(
        num_tokens=windows[:, 1:].numel(),
        prompt=text.prompt,
        scores=score_models(teacher, models, windows),
        samples={
            name: continue_text(model, tokenizer, text.prompt, text.num_sample_tokens)
            for name, model in models.items()
        },
        unigram_cross_entropy=unigram_cross_entropy(training_windows, windows, teacher.config.vocab_size),
    )
