"""The text of a round: whose answers to which prompts.

    python examples/on-policy/rounds.py choose ...    # the records of a round: DIR/own.jsonl and DIR/given.jsonl
    python examples/on-policy/rounds.py mix ...       # both, with the student's answers in the place of own.jsonl's

run.sh calls them in this order, before and after the student has answered. Files are whole or not there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from prompts import Record, answer_key, counted, write_lines

from megatron_fdd.host.disk import explain


def chosen(
    records: Sequence[Record], round_number: int, count: int, own_fraction: float, seed: int
) -> tuple[list[Record], list[Record]]:
    """Return the records of a round (from 1): those that the student answers, and those with the given answer.

    All records are used before one is used again; which ones a round has does not depend on the fraction.
    """
    orders: dict[int, list[int]] = {}
    picked = []
    for place in range((round_number - 1) * count, round_number * count):
        epoch, position = divmod(place, len(records))
        if epoch not in orders:
            orders[epoch] = random.Random(f"{seed} {epoch}").sample(range(len(records)), len(records))
        picked.append(records[orders[epoch][position]])
    num_own = int(own_fraction * count + 0.5)
    return picked[:num_own], picked[num_own:]


def with_own_answers(
    records: Sequence[Record], answers: dict[int, str], *, stand_ins: bool
) -> tuple[list[Record], list[int], int]:
    """Put a student's answers, by number of the record, in the place of the given ones.

    Args:
        stand_ins: an answer that ends at once gives way to the given one, if there is one: where the student ended,
            the teacher is then heard. Without, it is left out.

    Returns:
        the records; the numbers of those whose answer ended at once; how many of these are left out.
    """
    mixed, empty = [], []
    for number, record in enumerate(records):
        answer = answers[number]
        if not answer.strip():
            empty.append(number)
            answer = record[answer_key(record)] if stand_ins else ""
        if answer.strip():
            mixed.append(record | {answer_key(record): answer})
    return mixed, empty, len(records) - len(mixed)


def read_lines(path: Path) -> list[Record]:
    """Return the objects of a file of JSON lines that this script or `fdd evaluate` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_choose(given: argparse.Namespace) -> None:
    """Write the records of one round."""
    if not 0 <= given.own_fraction <= 1:
        raise ValueError(f"OWN_FRACTION={given.own_fraction}: from 0 to 1")
    own, others = chosen(
        read_lines(given.prompts), given.round, given.records, given.own_fraction, given.seed
    )
    write_lines(given.out / "given.jsonl", others)
    write_lines(given.out / "own.jsonl", own)


def run_mix(given: argparse.Namespace) -> None:
    """Write records with the student's answers, and behind them those with given ones.

    Raises:
        ValueError: all of the student's answers end at once.
    """
    own, answers = read_lines(given.own), {}
    if own:
        _, *found = read_lines(given.answers)  # the first line holds the settings
        answers = {each["number"]: each["answer"] for each in found}
    mixed, empty, left_out = with_own_answers(own, answers, stand_ins=given.given is not None)
    if own and len(empty) == len(own):
        raise ValueError(
            f"{given.answers}: all {len(own)} answers of the student end at once, so that it has no text of its own; "
            "look at the template of the prompts (TEMPLATE) and at the student; if they are of the prompts held out, "
            "take more of those (HELD_OUT), or do without the table (MEASURE=0)"
        )
    others = read_lines(given.given) if given.given else []
    wheres = [f"{given.own}, line {number + 1}" for number in empty]
    done = f"{len(empty) - left_out} with the given one in their place, {left_out} left out"
    for line in counted(f"answers that end at once, {done}", wheres):
        print(line)
    write_lines(given.out, [*mixed, *others])
    print(f"{len(own) - len(empty)} answers of the student, {len(mixed) + len(others)} records in all")


def main() -> int:
    """Run one command; 1 and one line if something is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    choose = commands.add_parser("choose", help="write the records of a round")
    choose.set_defaults(action=run_choose)
    choose.add_argument("--prompts", type=Path, required=True, help="train.jsonl of prompts.py")
    choose.add_argument("--round", type=int, required=True, help="from 1")
    choose.add_argument("--records", type=int, required=True, help="how many a round has")
    choose.add_argument(
        "--own-fraction", type=float, required=True, help="of them with the student's answers"
    )
    choose.add_argument("--seed", type=int, required=True, help="draws the order of the prompts")
    choose.add_argument("--out", type=Path, required=True, help="folder to write to")
    mix = commands.add_parser("mix", help="join prompts and answers")
    mix.set_defaults(action=run_mix)
    mix.add_argument("--own", type=Path, required=True, help="own.jsonl")
    mix.add_argument("--answers", type=Path, required=True, help="the student's answers to it")
    mix.add_argument("--given", type=Path, help="given.jsonl")
    mix.add_argument("--out", type=Path, required=True, help="file to write")
    given = parser.parse_args()
    try:
        given.action(given)
    except (ValueError, OSError) as error:
        print(f"rounds: error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
