"""Does a student's own text help? KL to the teacher on its own text after rounds on that, and on given text.

    python -m benchmarks.own_text --teacher-hf DIR --stories FILE --folder runs/own-text

The teacher is a small Llama (benchmarks/LOG.md: stories260K of karpathy/tinyllamas, 5 layers), the stories are a text
with a line <|endoftext|> between them. A prompt is a story's first paragraph, the given answer its next 64 tokens at
most. Three of the teacher's layers first learn on given text; then examples/on-policy/run.sh trains this student for
three rounds with OWN_FRACTION 1, 0.5 and 0, with each seed: same prompts, steps and records. A seed draws
which prompts are held out, the order of the others, and the student's answers. An interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks import lines
from benchmarks.measure import RESULTS, origin

ROOT = Path(__file__).parents[1]
SEPARATOR = "<|endoftext|>"
NEW_TOKENS, PROMPT_TOKENS = 64, 128
# The share of a round's records that have the student's own answers, and the name of such a run.
FRACTIONS = {1.0: "own", 0.5: "half", 0.0: "given"}
SIZE = {"rounds": 3, "steps": 50, "batch": 8, "warm_up_steps": 200, "held_out": 200, "lr": "1e-3"}
SMOKE = {"rounds": 1, "steps": 1, "batch": 4, "warm_up_steps": 1, "held_out": 4, "lr": "1e-3"}


def write_prompts(stories: Path, teacher: Path, out: Path) -> int:
    """Write a record of each story whose first paragraph ends within `PROMPT_TOKENS`; return their number."""
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    records = []
    for story in stories.read_text(encoding="utf-8").split(f"\n{SEPARATOR}\n"):
        first, _, rest = story.strip().partition("\n")
        rest = rest.strip()
        if not rest or len(tokenizer(first)["input_ids"]) > PROMPT_TOKENS - 2:
            continue
        answer = tokenizer.decode(tokenizer(rest, add_special_tokens=False)["input_ids"][:NEW_TOKENS]).strip()
        records.append({"prompt": first + "\n", "response": answer})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return len(records)


def run(
    work: Path, teacher: Path, student: Path, prompts: Path, size: dict[str, Any], **knobs: object
) -> Path:
    """Run the recipe to its end; return its WORK.

    Raises:
        RuntimeError: it failed; its log is beside WORK.
    """
    given = {
        "SET_UP": 0,
        "WORK": work,
        "TEACHER_HF": teacher,
        "STUDENT_HF": student,
        "PROMPTS": prompts,
        "TEMPLATE": "none",
        "RANKS": 1,
        "PRECISION_FLAGS": "",
        "MICRO_BATCH": size["batch"],
        "GLOBAL_BATCH": size["batch"],
        "STEPS": size["steps"],
        "ROUNDS": size["rounds"],
        "HELD_OUT": size["held_out"],
        "LEARNING_RATE": size["lr"],
        "SEQ_LENGTH": PROMPT_TOKENS + NEW_TOKENS,
        "MAX_NEW_TOKENS": NEW_TOKENS,
        "LAYER_FLAGS": "--fdd-layer-pairs 1:1,2:3",
        "TEACH_FLAGS": f"--engine transformers --teacher {teacher} --dtype float32",
        "GENERATE_FLAGS": "--threads 1 --batch-size 100",
        "OMP_NUM_THREADS": 1,
        **knobs,
    }
    log = work.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        environment = os.environ | {name: str(value) for name, value in given.items()}
        done = subprocess.run(
            ["bash", str(ROOT / "examples/on-policy/run.sh")],
            env=environment,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"{log} ends with status {done.returncode}")
    return work


def measured(work: Path, student: int) -> dict[str, Any]:
    """Return what the recipe measured of a student, by the number of rounds behind it."""
    found: dict[str, Any] = json.loads((work / f"student-{student}/measured.json").read_text())
    return found


def learned_tokens(work: Path, rounds: int) -> int:
    """Return how many tokens were learned in all rounds."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from megatron_fdd.data.prepared import mask_prefix

    total = 0
    for number in range(1, rounds + 1):
        masks = IndexedDataset(mask_prefix(str(work / f"round-{number}/data/text")))
        total += sum(int(masks[row][1:].sum()) for row in range(len(masks)))
    return total


def compare(own: Sequence[float], given: Sequence[float]) -> str:
    """Return the difference of two kinds of runs in words, seed by seed."""
    differences = [one - other for one, other in zip(own, given, strict=True)]
    lower = sum(difference < 0 for difference in differences)
    mean = statistics.mean(differences)
    return f"less the one of given text: mean {mean:+.4f}, lower with {lower} of {len(differences)} seeds"


def main(argv: Sequence[str]) -> int:
    """Run all, print the table, and append it to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teacher-hf", type=Path, required=True)
    parser.add_argument("--stories", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--smoke", action="store_true", help="a step of everything, to see it work")
    args = parser.parse_args(argv)
    size = SMOKE if args.smoke else SIZE
    folder, teacher = args.folder.resolve(), args.teacher_hf.resolve()
    prompts, cut = folder / "prompts.jsonl", folder / "cut-hf"
    count = write_prompts(args.stories, teacher, prompts)
    if not cut.exists():
        words = [
            "tools/init_student.py",
            "--no-score",
            "--hf-model",
            str(teacher),
            "--layers",
            "0,2,4",
            "--hf-out",
            str(cut),
        ]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
    warm_up = size | {"rounds": 1, "steps": size["warm_up_steps"]}
    start = (
        run(folder / "start", teacher, cut, prompts, warm_up, OWN_FRACTION=0, SEED=100, MEASURE=0)
        / "student-1/hf"
    )

    def one(seed: int, fraction: float) -> Path:
        work = folder / f"{FRACTIONS[fraction]}-{seed}"
        return run(work, teacher, start, prompts, size, OWN_FRACTION=f"{fraction:g}", SEED=seed)

    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = [(seed, fraction) for seed in args.seeds for fraction in FRACTIONS]
        works = dict(zip(tasks, pool.map(lambda task: one(*task), tasks), strict=True))
    print(
        f"{count} prompts. KL to the teacher, nats a token, on own text of the prompts held out (on given text):"
    )
    last: dict[float, list[float]] = {fraction: [] for fraction in FRACTIONS}
    for (seed, fraction), work in works.items():
        found = [measured(work, number) for number in range(size["rounds"] + 1)]
        kls = [(each["own"]["kl"], each["given"]["kl"]) for each in found]
        tokens = learned_tokens(work, size["rounds"])
        shown = "  ".join(f"{own:.4f} ({other:.4f})" for own, other in kls)
        print(f"seed {seed}, {FRACTIONS[fraction]:>5} text, {tokens} tokens learned: {shown}")
        last[fraction].append(kls[-1][0])
        case = {"seed": seed, "own_fraction": fraction, "learned_tokens": tokens, "kl_own_and_given": kls}
        if not args.smoke:
            lines.write(RESULTS, "benchmark", {**origin(), "benchmark": "own text", "size": size, **case})
    for fraction in (1.0, 0.5):
        print(f"{FRACTIONS[fraction]}: {compare(last[fraction], last[0.0])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
