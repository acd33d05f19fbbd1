"""The study's tables and figure, made from its scores, and the learning rate of each method.

    python examples/study/table.py --work runs/study                 runs -> WORK/results.json, tables.md, study.png
    python examples/study/table.py --work runs/study --rate thin fdd the learning rate that the scan chose
    python examples/study/table.py                                   the committed results.json -> docs/study.md

Differences are paired: each is between two runs with one seed, which saw the same text in the same order. A difference
counts if the 95 % interval of its mean over the seeds (Student's t) does not contain 0; else the table says "none".
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"

METHODS = {
    "ce": "cross-entropy alone",
    "kd": "logit KD",
    "kd-ce": "logit KD + cross-entropy",
    "kd-trajectory": "logit KD + trajectory",
    "kd-delta": "logit KD + delta",
    "fdd": "FDD: logit KD + trajectory + delta",
    "fdd-centred": "FDD, `--fdd-delta centred`",
    "fdd-no-norm": "FDD, `--fdd-lens-norm none`",
    "fdd-live-head": "FDD, `--fdd-lens-head live`",
    "fdd-fp8-taps": "FDD, `--fdd-tap-dtype fp8`",
    "fdd-fading": "FDD, alpha and beta falling to 0",
    "fdd-store-float32": "FDD, stored features, float32",
    "fdd-store-bf16": "FDD, stored features of a teacher in bf16",
    "fdd-store-fp8": "FDD, stored features, fp8",
    "fdd-store-int8": "FDD, stored features, int8",
}
STUDENTS = {
    "thin": "Thin student, from scratch",
    "shallow": "Shallow student, made of layers of the teacher",
}
# Student's t, 97.5 % quantile, by degrees of freedom.
T_QUANTILE = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Run = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference of one method from another, over the seeds that both were trained with."""

    mean: float
    half_width: float

    @property
    def counts(self) -> bool:
        return abs(self.mean) > self.half_width

    def __str__(self) -> str:
        found = f"{self.mean:+.4f} ± {self.half_width:.4f}"
        return (f"**{found}**" if self.counts else f"none ({found})").replace("-", "−")


@dataclass(frozen=True, slots=True)
class Results:
    """The content of `results.json`."""

    settings: dict[str, Any]
    references: dict[str, Any]
    runs: list[Run]

    def of(self, student: str, method: str) -> dict[int, Run]:
        """Return the study's runs of a cell by seed, at the method's rate, without the runs of the scan."""
        if not self.scan(student, method):
            return {}
        rate = self.best_rate(student, method)
        return {
            run["seed"]: run
            for run in self.runs
            if (run["student"], run["method"]) == (student, method)
            and run["seed"] != self.settings["scan_seed"]
            and run["rate"] == rate
        }

    def scan(self, student: str, method: str) -> dict[str, Run]:
        """Return the scan's runs of a method by learning rate, smallest first."""
        found = [
            run
            for run in self.runs
            if (run["student"], run["method"], run["seed"]) == (student, method, self.settings["scan_seed"])
        ]
        return {run["rate"]: run for run in sorted(found, key=lambda run: float(run["rate"]))}

    def best_rate(self, student: str, method: str) -> str:
        """Return the rate with the best score on validation stories.

        Raises:
            ValueError: the scan has no run of the method.
        """
        scan = self.scan(student, method)
        if not scan:
            raise ValueError(f"no learning rate was tried for {student} {method}: see METHODS in run.sh")
        return min(scan, key=lambda rate: scan[rate]["validation"][metric_of(method)])

    def methods(self, student: str) -> list[str]:
        """Return the methods that were trained, in the order of `METHODS`."""
        return [method for method in METHODS if self.of(student, method)]

    def difference(self, student: str, pair: tuple[str, str], metric: str) -> Difference | None:
        """Return first method minus second, on test stories; None with fewer than two common seeds."""
        ours, theirs = (self.of(student, method) for method in pair)
        values = [
            ours[seed]["test"][metric] - theirs[seed]["test"][metric] for seed in ours if seed in theirs
        ]
        if len(values) < 2:
            return None
        quantile = T_QUANTILE[min(len(values) - 1, len(T_QUANTILE) - 1)]
        half_width = quantile * statistics.stdev(values) / math.sqrt(len(values))
        return Difference(statistics.mean(values), half_width)


def metric_of(method: str) -> str:
    """Return the score that chooses a method's learning rate; with cross-entropy alone the teacher plays no part."""
    return "cross_entropy" if method == "ce" else "kl_to_teacher"


def spread(values: Iterable[float]) -> str:
    """Write mean ± standard deviation."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def markdown(header: list[str], rows: list[list[str]]) -> list[str]:
    """Write a table with the first column to the left and the others to the right."""
    rule = "|---|" + "--:|" * (len(header) - 1)
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(row)} |" for row in rows), ""]


def main_table(results: Results, student: str) -> list[str]:
    """Write the table of all methods and their differences from logit KD."""
    rows = []
    for method in results.methods(student):
        runs = results.of(student, method)
        row = [METHODS[method], str(len(runs))]
        for metric in ("kl_to_teacher", "cross_entropy"):
            row.append(spread(run["test"][metric] for run in runs.values()))
            difference = results.difference(student, (method, "kd"), metric)
            row.append("" if method == "kd" or difference is None else str(difference))
        rows.append(row)
    header = ["", "seeds", "KL(teacher ‖ student)", "less logit KD's", "cross-entropy", "less logit KD's"]
    references = results.references
    if student == "shallow":
        start = references["shallow untrained"]
        rows.insert(
            0, ["untrained", "", f"{start['kl_to_teacher']:.4f}", "", f"{start['cross_entropy']:.4f}", ""]
        )
    return markdown(header, rows)


def variants_table(results: Results) -> list[str]:
    """Write the table of FDD and its variants, which shows what supports a default and what does not."""
    trained = set(results.methods("thin")) | set(results.methods("shallow"))
    pairs = [(method, "fdd") for method in METHODS if method in trained - {"ce", "kd", "kd-ce", "fdd"}]
    rows = []
    for pair in pairs:
        row = [f"{METHODS[pair[0]]}, less FDD"]
        for student in STUDENTS:
            difference = results.difference(student, pair, "kl_to_teacher")
            row.append("" if difference is None else str(difference))
        rows.append(row)
    return markdown(["KL(teacher ‖ student)", *STUDENTS], rows)


def inner_table(results: Results, student: str) -> list[str]:
    """Write the table of trajectory and delta on test stories, for any method, as means over the seeds."""
    rows = []
    untrained = {"untrained": [results.references["shallow untrained"]]} if student == "shallow" else {}
    trained = {
        METHODS[method]: list(results.of(student, method).values()) for method in results.methods(student)
    }
    names: list[str] = []
    for label, runs in (untrained | trained).items():
        names = names or list(runs[0]["inner"])
        names.sort(key=lambda name: name.startswith("delta"))
        rows.append(
            [label, *(f"{statistics.mean(run['inner'][name] for run in runs):.3f}" for name in names)]
        )
    return markdown(["", *names], rows)


def scan_table(results: Results) -> list[str]:
    """Write the table of the validation score of each rate, with the chosen one in bold."""
    rows = []
    for student in STUDENTS:
        for method in METHODS:
            scan = results.scan(student, method)
            if not scan:
                continue
            best = results.best_rate(student, method)
            cells = [
                f"{'**' if rate == best else ''}{rate}: {run['validation'][metric_of(method)]:.4f}"
                f"{'**' if rate == best else ''}"
                for rate, run in scan.items()
            ]
            rows.append([f"{student}, {method}", ", ".join(cells)])
    return markdown(
        ["", "learning rate: validation score (cross-entropy for ce, else KL to the teacher)"], rows
    )


def tables(results: Results) -> str:
    """Write all tables, as in docs/study.md."""
    settings, references = results.settings, results.references
    step = settings["batch"] * settings["seq_length"]
    teacher, unigram = references["teacher"], references["unigram"]
    lines = [
        f"A run: {settings['train_iters']} steps of {step:,} tokens, {settings['train_iters'] * step:,} tokens. "
        f"The training text has {references['tokens']['train']:,}. Scored are {references['tokens']['test']:,} tokens "
        f"of test stories. Cross-entropy there: the teacher {teacher['cross_entropy']:.4f}, word frequencies alone "
        f"{unigram['cross_entropy']:.4f} nats per token.",
        "",
    ]
    for student, title in STUDENTS.items():
        if results.methods(student):
            lines += [f"### {title}", "", *main_table(results, student)]
    lines += ["### Variants against FDD", "", *variants_table(results)]
    for student, title in STUDENTS.items():
        if results.methods(student):
            lines += [f"### Inner layers: {title[0].lower()}{title[1:]}", "", *inner_table(results, student)]
    lines += ["### Learning rates", "", *scan_table(results)]
    return "\n".join(lines)


def rewrite(document: str, generated: str) -> str:
    """Return the document with `generated` between its two marks.

    Raises:
        ValueError: a mark is missing.
    """
    if BEGIN not in document or END not in document:
        raise ValueError(f"docs/study.md needs the lines {BEGIN} and {END}")
    return f"{document.partition(BEGIN)[0]}{BEGIN}\n\n{generated}\n{END}{document.partition(END)[2]}"


def read_work(work: Path) -> Results:
    """Read settings, references and scores of a study's runs, with numbers to 6 decimals."""

    def read(path: Path) -> dict[str, Any]:
        return json.loads(path.read_text(encoding="utf-8"), parse_float=lambda text: round(float(text), 6))

    runs = [read(path) for path in work.glob("runs/*/score.json")]
    runs.sort(key=lambda run: (run["student"], list(METHODS).index(run["method"]), run["rate"], run["seed"]))
    return Results(read(work / "settings.json"), read(work / "references.json"), runs)


def write_results(results: Results, path: Path) -> None:
    """Write each run as one line, so that differences between two studies are easy to read."""
    runs = ",\n".join(json.dumps(run) for run in results.runs)
    head = json.dumps({"settings": results.settings, "references": results.references})[1:-1]
    path.write_text(f'{{{head},\n"runs": [\n{runs}\n]}}\n', encoding="utf-8")


def _draw(results: Results, out: Path) -> None:
    import plot  # here, because matplotlib takes a second and --rate does not need it

    plot.draw(results, out)


def publish(results: Results) -> None:
    """Write docs/study.md and docs/study.png from these results."""
    document = DOCS / "study.md"
    document.write_text(rewrite(document.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")
    _draw(results, DOCS / "study.png")


def main() -> int:
    """Parse the command line and do what it says; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--work", type=Path, help="WORK of run.sh")
    parser.add_argument("--rate", nargs=2, metavar=("STUDENT", "METHOD"), help="print its learning rate")
    parser.add_argument("--publish", action="store_true", help="replace the committed results and tables too")
    arguments = parser.parse_args()
    try:
        if arguments.work is None:
            publish(Results(**json.loads((HERE / "results.json").read_text(encoding="utf-8"))))
            return 0
        results = read_work(arguments.work)
        if arguments.rate:
            print(results.best_rate(*arguments.rate))
            return 0
    except (ValueError, OSError) as error:
        print(f"study: error: {error}", file=sys.stderr)
        return 1
    write_results(results, arguments.work / "results.json")
    (arguments.work / "tables.md").write_text(tables(results) + "\n", encoding="utf-8")
    _draw(results, arguments.work / "study.png")
    if arguments.publish:
        write_results(results, HERE / "results.json")
        publish(results)
    print(tables(results))
    print(f"study: {arguments.work}/results.json, tables.md, study.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
