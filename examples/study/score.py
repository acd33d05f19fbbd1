"""Scores of the study's trained students: every run without a score gets one JSON file beside its checkpoint.

Texts are cut as in training; cross-entropy and KL(teacher || student) are those of `megatron_fdd.evaluate`, for the
student exported to Hugging Face. A run of the learning-rate scan is scored on validation stories, any other run on
test stories, so that nothing is chosen on test stories. The inner layers are scored too, through each model's final
norm and head, whatever the student was trained with: the KL of the predictions for each pair of blocks ("trajectory"),
and from the second pair on one minus the cosine of their change ("delta").

    python examples/study/score.py --work runs/study --teacher TEACHER
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch; a run of the study may use the other core

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from megatron_fdd import convert
from megatron_fdd.config.values import parse_layer_pairs
from megatron_fdd.evaluate.perplexity import (
    PerplexityScore,
    cut_windows,
    read_texts,
    score_models,
    unigram_cross_entropy,
)

# The most predictions to score, in windows spread over a text; then the same for inner layers, on the test text.
NUM_TOKENS = {"train": None, "validation": 16384, "test": 32768}
NUM_INNER_TOKENS = 8192
GROUP = 16  # students that are scored in one pass of the teacher
NAME = re.compile(r"(thin|shallow)-([a-z][a-z0-9-]*?)-([0-9][0-9.e-]*)-([0-9]+)")


def load(folder: Path) -> PreTrainedModel:
    """Load a Hugging Face folder in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def read_windows(work: Path, teacher: Path, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tokens of each text (also train), [windows, length + 1], with documents separated as in training."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    if not settings["append_eod"]:
        tokenizer.eos_token = None  # the token before a story ends the story before it
    return {
        name: cut_windows(read_texts(work / f"text/{name}.jsonl"), tokenizer, settings["seq_length"], limit)
        for name, limit in NUM_TOKENS.items()
    }


def unscored(work: Path) -> list[Path]:
    """Return the folders of finished trainings without scores."""
    finished = work.glob("runs/*/latest_checkpointed_iteration.txt")
    return sorted(file.parent for file in finished if not (file.parent / "score.json").exists())


def exported(run: Path, teacher: Path) -> PreTrainedModel:
    """Return the student of a run; export it if that is not done yet."""
    if not (run / "student-hf").exists():
        convert.mcore_to_hf(run, run / "student-hf", hf_config=teacher, tokenizer=teacher)
    return load(run / "student-hf")


def log_probs_at(model: PreTrainedModel, inputs: Tensor, blocks: list[int]) -> Iterator[Tensor]:
    """Yield the lens of each block (1-based, not the last), float32 [sequences, length, vocabulary]."""
    states = model(inputs, use_cache=False, output_hidden_states=True).hidden_states
    for block in blocks:
        yield model.lm_head(model.model.norm(states[block])).log_softmax(-1)


@torch.inference_mode()
def inner_terms(
    teacher: PreTrainedModel, student: PreTrainedModel, pairs: tuple[tuple[int, int], ...], windows: Tensor
) -> dict[str, float]:
    """Return token means of trajectory and delta, with names such as "trajectory s2:t3", as in a metrics file."""
    sums: dict[str, float] = {}
    for batch in windows[:, :-1].split(32):
        before: list[Tensor] = []
        lenses = zip(
            log_probs_at(student, batch, [ours for ours, _ in pairs]),
            log_probs_at(teacher, batch, [theirs for _, theirs in pairs]),
            strict=True,
        )
        for (ours, theirs), (student_y, teacher_y) in zip(pairs, lenses, strict=True):
            terms = {"trajectory": (teacher_y.exp() * (teacher_y - student_y)).sum(-1)}
            if before:
                terms["delta"] = 1 - cosine_similarity(teacher_y - before[1], student_y - before[0], dim=-1)
            before = [student_y, teacher_y]
            for term, values in terms.items():
                name = f"{term} s{ours}:t{theirs}"
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
    count = windows[:, :-1].numel()
    return {name: total / count for name, total in sums.items()}


def as_json(score: PerplexityScore) -> dict[str, float]:
    return {"cross_entropy": score.cross_entropy, "kl_to_teacher": score.kl_to_teacher}


def describe(run: Path) -> dict[str, Any]:
    """Return student, method, rate and seed, from the folder's name.

    Raises:
        ValueError: one_run.sh has not made this folder.
    """
    match = NAME.fullmatch(run.name)
    if match is None:
        raise ValueError(f"{run} is not named STUDENT-METHOD-RATE-SEED")
    student, method, rate, seed = match.groups()
    return {"student": student, "method": method, "rate": rate, "seed": int(seed)}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a file that appears only when it is complete."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


class Scorer:
    """The scoring of a study's runs and references on its texts."""

    def __init__(self, work: Path, teacher: Path) -> None:
        self.settings = json.loads((work / "settings.json").read_text(encoding="utf-8"))
        self.windows = read_windows(work, teacher, self.settings)
        self.work, self.teacher_folder, self.teacher = work, teacher, load(teacher)

    def inner(self, student_name: str, student: PreTrainedModel) -> dict[str, float]:
        """Compute `inner_terms` on a part of the test stories."""
        windows = self.windows["test"]
        some = windows[:: max(1, windows[:, 1:].numel() // NUM_INNER_TOKENS)]
        pairs = parse_layer_pairs(self.settings[f"{student_name}_pairs"])
        assert pairs is not None
        return inner_terms(self.teacher, student, pairs, some)

    def score_runs(self, runs: list[Path]) -> None:
        """Write the score of each run."""
        found = {run: describe(run) for run in runs}
        scan = [run for run in runs if found[run]["seed"] == self.settings["scan_seed"]]
        for text, group in (("validation", scan), ("test", [run for run in runs if run not in scan])):
            students = {run.name: exported(run, self.teacher_folder) for run in group}
            scores = score_models(self.teacher, students, self.windows[text]) if students else {}
            for run in group:
                found[run][text] = as_json(scores[run.name])
                if text == "test":
                    found[run]["inner"] = self.inner(found[run]["student"], students[run.name])
                write_json(run / "score.json", found[run])

    def score_references(self) -> None:
        """Score what the students are compared with: the teacher, word frequencies, the untrained shallow student."""
        test, start = self.windows["test"], load(self.work / "shallow-hf")
        scores = score_models(self.teacher, {"teacher": self.teacher, "shallow": start}, test)
        vocab_size = self.teacher.config.vocab_size
        references = {
            "teacher": as_json(scores["teacher"]),
            "shallow untrained": as_json(scores["shallow"]) | {"inner": self.inner("shallow", start)},
            "unigram": {"cross_entropy": unigram_cross_entropy(self.windows["train"], test, vocab_size)},
            "tokens": {name: part[:, 1:].numel() for name, part in self.windows.items()},
        }
        write_json(self.work / "references.json", references)


def main() -> int:
    """Parse the command line and score whatever has no score; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, required=True, help="WORK of run.sh")
    parser.add_argument("--teacher", type=Path, required=True, help="Hugging Face folder")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    runs = unscored(arguments.work)
    try:
        scorer = Scorer(arguments.work, arguments.teacher)
        if not (arguments.work / "references.json").exists():
            scorer.score_references()
        with tqdm(total=len(runs), desc="scoring", unit="run") as bar:
            for first in range(0, len(runs), GROUP):
                scorer.score_runs(runs[first : first + GROUP])
                bar.update(len(runs[first : first + GROUP]))
    except (ValueError, OSError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
