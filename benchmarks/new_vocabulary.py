"""What a new vocabulary costs a student, with which first rows, and what 200 steps of distillation win back.

    python -m benchmarks.new_vocabulary --smol DIR --stories DIR --gpt2 DIR --text FILE --work DIR

SmolLM2-135M-Instruct (examples/quickstart/teacher.py; byte-level tokens) and stories260K (docs/study.md; SentencePiece)
get each other's vocabulary, and both get GPT-2's, by `fdd student --vocabulary-of`. All are scored in bits a byte on
test stories and on `fdd student`'s own sample, with each kind of first rows in `FIRST_ROWS`. Then each of the two is
distilled for 200 steps from the other, whose vocabulary it has now (KL of the logits and cross-entropy, weight 1 each).
The control is the same model with its own vocabulary, trained for as many steps on about as many bytes of the same
stories, on cross-entropy alone: no teacher has its vocabulary but itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import logging

from megatron_fdd.convert import replace_vocabulary
from megatron_fdd.convert.new_vocabulary import NewVocabulary
from megatron_fdd.evaluate.bits import SAMPLE, compare_bits
from megatron_fdd.evaluate.models import Placement
from megatron_fdd.evaluate.perplexity import read_texts

logging.disable_progress_bar()
FLOAT32 = Placement("cpu", "float32")
WEIGHTS = "model.safetensors"
KEPT_ENDS = "\n<|endoftext|>\n"
TEST_STORIES = 24
# Other first rows are looked at where more than this part of them is made of pieces.
_MANY = 0.01


def _shrunk(pieces_PH: Tensor, mean_H: Tensor, share: float) -> Tensor:
    return (1 - share) * pieces_PH.mean(0) + share * mean_H


def _weighted(pieces_PH: Tensor, weights: Tensor) -> Tensor:
    return (pieces_PH * (weights / weights.sum())[:, None]).sum(0)


def _of_norm(row_H: Tensor, pieces_PH: Tensor) -> Tensor:
    return row_H * pieces_PH.norm(dim=1).mean() / row_H.norm()


def _rising(pieces_PH: Tensor) -> Tensor:
    return torch.arange(1.0, len(pieces_PH) + 1)


# A new row, from the rows of its old pieces [P, H] and the mean of all old rows [H].
OURS = "halfway from the mean of the pieces to that of all rows"
FIRST_ROWS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    OURS: lambda pieces, mean: _shrunk(pieces, mean, 0.5),
    "mean of the pieces": lambda pieces, mean: pieces.mean(0),
    "three quarters of the way": lambda pieces, mean: _shrunk(pieces, mean, 0.75),
    "mean of the pieces, with their norm": lambda pieces, mean: _of_norm(pieces.mean(0), pieces),
    "later pieces count more": lambda pieces, mean: _weighted(pieces, _rising(pieces)),
    "earlier pieces count more": lambda pieces, mean: _weighted(pieces, _rising(pieces).flip(0)),
    "last piece": lambda pieces, mean: pieces[-1],
    "first piece": lambda pieces, mean: pieces[0],
    "mean of all rows": lambda pieces, mean: mean,
}


@dataclass(frozen=True)
class Exchange:
    """A student, the model whose vocabulary it gets, and its training.

    Attributes:
        rates: learning rates of the distillation and of the control; none: no training.
        batch: sequences a step.
        lengths: tokens of a sequence with the new and with the own vocabulary, about the same bytes.
    """

    name: str
    student: Path
    teacher: Path
    rates: tuple[float, float] | None = None
    batch: int = 0
    lengths: tuple[int, int] = (0, 0)


def run(log: Path, *words: object) -> None:
    """Run a command of this package, its output in a log. SystemExit if it fails."""
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    command = [sys.executable, "-m", *map(str, words)]
    with log.open("a") as file:
        file.write(f"{shlex.join(command)}\n")
        file.flush()
        status = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False
        ).returncode
    if status:
        raise SystemExit(f"failed: {shlex.join(command)}\n{''.join(log.read_text().splitlines(True)[-20:])}")


def write_first_rows(
    source: Path,
    swapped: Path,
    vocabulary: NewVocabulary,
    make: Callable[[Tensor, Tensor], Tensor],
    out: Path,
) -> None:
    """Write a copy of a model with a new vocabulary, whose rows of several pieces are made in another way."""
    shutil.copytree(swapped, out)
    old, new = load_file(source / WEIGHTS), load_file(swapped / WEIGHTS)
    for name, rows_WH in new.items():
        if rows_WH.shape != old[name].shape:
            mean_H = old[name].float().mean(0)
            for number, origin in enumerate(vocabulary.origins):
                if len(origin) > 1:
                    rows_WH[number] = make(old[name][list(origin)].float(), mean_H)
    save_file(new, out / WEIGHTS, metadata={"format": "pt"})


def train(
    work: Path, model: Path, teacher: Path, text: Path, args: argparse.Namespace, flags: Sequence[str]
) -> Path:
    """Train a model with its own tokenizer; return the folder of the exported model."""
    work.mkdir(parents=True)
    log, out = work / "log.txt", work / "hf"
    tokenizer = [
        "--tokenizer-type",
        "HuggingFaceTokenizer",
        "--tokenizer-model",
        str(work / "start/tokenizer"),
    ]
    run(log, "megatron_fdd", "import", "--hf-model", model, "--save", work / "start")
    run(log, "megatron_fdd", "import", "--hf-model", teacher, "--save", work / "teacher")
    run(
        log,
        "megatron_fdd",
        "prepare",
        "--input",
        text,
        "--output-prefix",
        work / "text",
        *tokenizer,
        "--append-eod",
    )
    began = time.monotonic()
    run(
        log, "megatron_fdd.distill", "--pretrained-checkpoint", work / "start", "--use-checkpoint-args",
        "--teacher-load", work / "teacher", "--train-data-path", work / "text", *tokenizer,
        "--fdd-alpha", 0, "--fdd-beta", 0, "--fdd-ce-weight", 1,
        "--train-iters", args.steps,
        "--min-lr", 0, "--lr-decay-style", "cosine", "--lr-warmup-iters", args.steps // 10,
        "--weight-decay", 0, "--adam-beta2", 0.95, "--clip-grad", 1.0, "--hidden-dropout", 0, "--attention-dropout", 0,
        "--eval-interval", args.steps, "--eval-iters", 0, "--seed", 1, "--log-interval", 10,
        "--save", work / "run", "--save-interval", args.steps, "--no-save-optim", *flags,
    )  # fmt: skip
    print(f"    {args.steps} steps: {time.monotonic() - began:.0f} s", flush=True)
    run(log, "megatron_fdd", "export", "--load", work / "run", "--hf-out", out)
    return out


def exchange(case: Exchange, args: argparse.Namespace) -> None:
    """Make, train and score the models of one exchange; print the bits a byte of all."""
    work = args.work / case.name.replace(" ", "-")
    swapped = work / OURS
    began = time.monotonic()
    vocabulary = replace_vocabulary(case.student, case.teacher, swapped)
    print(
        f"\n{case.name}: {len(vocabulary.origins):,} rows, {vocabulary.num_kept:,} kept, {vocabulary.num_cut:,} of "
        f"pieces, {vocabulary.num_without:,} without; {time.monotonic() - began:.1f} s",
        flush=True,
    )
    models = {"own vocabulary": case.student, OURS: swapped}
    others = list(FIRST_ROWS.items())[1:] if vocabulary.num_cut > _MANY * len(vocabulary.origins) else ()
    for name, make in others:
        models[name] = work / name
        write_first_rows(case.student, swapped, vocabulary, make, models[name])
    if case.rates and args.steps:
        batch = ["--micro-batch-size", str(case.batch), "--global-batch-size", str(case.batch)]
        rates, lengths = [["--lr", str(rate)] for rate in case.rates], map(str, case.lengths)
        each = [[*batch, *rate, "--seq-length", length] for rate, length in zip(rates, lengths, strict=True)]
        for start in args.trained:
            out = train(work / f"distilled {start}", models[start], case.teacher, args.train, args, each[0])
            models[f"{start}, {args.steps} steps of distillation"] = out
        flags = [*each[1], "--fdd-kd-weight", "0"]
        out = train(work / "control", case.student, case.student, args.train, args, flags)
        models[f"own vocabulary, {args.steps} steps"] = out
        models["teacher"] = case.teacher
    columns = {"stories": args.test, "sample": [SAMPLE]}
    scores = {label: compare_bits(list(models.values()), texts, FLOAT32) for label, texts in columns.items()}
    print(f"    {'bits a byte of':<60}{'stories':>9}{'sample':>9}")
    for index, name in enumerate(models):
        print(
            f"    {name:<60}{''.join(f'{scores[label][index].bits:9.3f}' for label in columns)}", flush=True
        )


def parsed() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smol", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--stories", type=Path, required=True, help="stories260K")
    parser.add_argument("--gpt2", type=Path, required=True, help="a folder with GPT-2's tokenizer.json")
    parser.add_argument("--text", type=Path, required=True, help="stories, a line <|endoftext|> between them")
    parser.add_argument("--work", type=Path, required=True, help="new folder for models")
    parser.add_argument("--steps", type=int, default=200, help="of training; 0: none (%(default)s)")
    parser.add_argument("--only", nargs="*", help="names of exchanges")
    parser.add_argument(
        "--trained",
        nargs="*",
        default=[OURS],
        choices=FIRST_ROWS,
        help="first rows to train from",
    )
    return parser.parse_args()


def main() -> int:
    """Measure and print; return the exit status."""
    args = parsed()
    args.work.mkdir(parents=True)
    stories = [story.strip() for story in args.text.read_text().split(KEPT_ENDS)[:-1]]
    args.train, test = args.work / "train.jsonl", args.work / "test.jsonl"
    for path, part in ((args.train, stories[TEST_STORIES:]), (test, stories[:TEST_STORIES])):
        path.write_text("".join(json.dumps({"text": story}) + "\n" for story in part))
    args.test = read_texts(test)
    cases = [
        Exchange("stories260K with SmolLM2's", args.stories, args.smol, (1e-2, 1e-3), 2, (128, 256)),
        Exchange("SmolLM2 with stories260K's", args.smol, args.stories, (1e-4, 1e-4), 1, (128, 64)),
        Exchange("SmolLM2 with GPT-2's", args.smol, args.gpt2),
        Exchange("stories260K with GPT-2's", args.stories, args.gpt2),
    ]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for case in cases:
        if not args.only or case.name in args.only:
            exchange(case, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
