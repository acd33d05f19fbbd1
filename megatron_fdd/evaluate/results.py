"""One model's evaluation results, and the file that stores them: evaluation.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_fdd.evaluate.data_file import DataFile
from megatron_fdd.evaluate.models import NamedModel
from megatron_fdd.evaluate.perplexity import PerplexityScore
from megatron_fdd.evaluate.request import Request
from megatron_fdd.evaluate.rouge import SeedScores
from megatron_fdd.host.disk import regular_file, replacing

VERSION = 1


@dataclass(slots=True)
class FileResult:
    """A model's answers to one data file."""

    data: DataFile
    num_cut_prompts: int
    scores: SeedScores

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "file": str(self.data.path),
            "sha256": self.data.sha256,
            "format": self.data.layout,
            "num_examples": len(self.data.examples),
            "num_cut_prompts": self.num_cut_prompts,
            "min_answer_words": self.data.min_answer_words,
            "rouge_l": {
                "by_seed": {str(seed): value for seed, value in self.scores.by_seed.items()},
                "mean": self.scores.mean,
                "spread": self.scores.spread,
            },
        }


@dataclass(slots=True)
class TextResult:
    """A model's score on the validation text; `length` is the length of a window, in tokens."""

    file: Path
    length: int
    num_tokens: int
    score: PerplexityScore
    teacher: str | None
    unigram_cross_entropy: float | None

    def as_json(self) -> dict[str, Any]:
        """Return the result as JSON values; null for a number that is not finite."""
        return {
            "file": str(self.file),
            "length": self.length,
            "num_tokens": self.num_tokens,
            "cross_entropy": self.score.cross_entropy,
            "perplexity": self.score.perplexity if math.isfinite(self.score.perplexity) else None,
            "kl_to_teacher": None if math.isnan(self.score.kl_to_teacher) else self.score.kl_to_teacher,
            "teacher": self.teacher,
            "unigram_cross_entropy": self.unigram_cross_entropy,
        }


@dataclass(slots=True)
class Evaluation:
    """All results of one model."""

    model: NamedModel
    answers: dict[str, FileResult] = field(default_factory=dict)
    text: TextResult | None = None
    samples: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, Any] | None = None

    @property
    def mean_rouge_l(self) -> float | None:
        """Mean over the data files; None without any."""
        means = [result.scores.mean for result in self.answers.values()]
        return sum(means) / len(means) if means else None

    def place(self, request: Request) -> Path:
        """Return the path of `OUT/NAME/evaluation.json`, links followed; ValueError where no file can be."""
        return regular_file("--out", request.out / self.model.name / "evaluation.json")

    def write(self, request: Request) -> Path:
        """Write `OUT/NAME/evaluation.json` as a whole or not at all, and return its path."""
        path = self.place(request)
        content = {
            "version": VERSION,
            "model": str(self.model.folder),
            "name": self.model.name,
            "settings": {
                **asdict(request.generation),
                "seeds": list(request.generation.runs),
                "batch_size": request.batch_size,
                **asdict(request.placement),
            },
            "answers": {name: result.as_json() for name, result in self.answers.items()},
            "mean_rouge_l": self.mean_rouge_l,
            "text": self.text.as_json() if self.text else None,
            "samples": self.samples,
            "lm_eval": self.tasks,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path
