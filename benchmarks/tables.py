"""Markdown tables from lines of results: those of docs/performance.md, and the page of a run on a GPU.

    python -m benchmarks.tables runs/gpu/results.jsonl
    python -m benchmarks.tables runs/gpu/results.jsonl --page     # and how each section ended

This file needs only Python.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import lines
from benchmarks.lines import Line

# The most that the objective may cost on a GPU, as a multiple of its matrix products.
OBJECTIVE_BAR = 1.5
NO_FIGURES = "Toy sizes on a CPU: no measurement."


def page(found: Sequence[Line], title: str) -> str:
    """Return everything that is known: machine, how the sections ended, tables."""
    parts = [f"# {title}", *machines(found), sections(found), tables(found)]
    return "\n\n".join(part for part in parts if part) + "\n"


def tables(found: Sequence[Line]) -> str:
    """Return every table for which there are lines; no table has rows of two devices."""
    losses, whole_steps = _of(found, "loss"), _of(found, "step")
    parts = [loss_table(group, _last_run(rows)) for (_, group), rows in _groups(losses, "group").items()]
    parts.append(bar(losses))
    parts += [steps(flags, _last_run(rows)) for (_, flags), rows in _groups(whole_steps, "flags").items()]
    for kind, make in (("layout", layouts), ("curve", curves), ("ending", endings)):
        parts += [make(device, _last_of_each(rows)) for (device,), rows in _groups(_of(found, kind)).items()]
    return "\n\n".join(part for part in parts if part)


def machines(found: Sequence[Line]) -> list[str]:
    """Return a paragraph for each machine in the lines."""
    told = {}
    for line in _of(found, "machine"):
        words = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
        told[f"{line['machine']}; {line.get('more', '')}; Python {line['python']}, {words}."] = line
    return [f"{line['date']}: {text}" + is_toy([line]) for text, line in told.items()]


def sections(found: Sequence[Line]) -> str:
    """Return how each section ended, and what its log says about that."""
    last = {line["name"]: line for line in _of(found, "section")}
    if not last:
        return ""
    rows = [
        (name, line["ending"], line["why"], f"{line['seconds']:.0f}" if "seconds" in line else "")
        for name, line in last.items()
    ]
    text = table(("section", "ended", "why", "seconds"), rows, "llll")
    told = {name: line["told"] for name, line in last.items() if line.get("told")}
    return "\n\n".join([text, *(f"{name}:\n\n```\n{chr(10).join(said)}\n```" for name, said in told.items())])


def loss_table(group: str, rows: Sequence[Line]) -> str:
    """Return the table of one group of `benchmarks.interleaved`."""
    cells = []
    for row in rows:
        if "error" in row:
            cells.append((row["row"], row["error"], "", "", ""))
            continue
        ratio = f"{row['ratio']:.2f} ± {row['ratio_spread'] / 2:.2f}" if "ratio" in row else ""
        rate = f"{row['rate'] / 1e12:.4g} T{row['unit']}" if "rate" in row else ""
        cells.append((row["row"], f"{1000 * row['seconds']:.4g}", ratio, f"{row['peak_mib']:.0f}", rate))
    size = rows[0]["size"]
    shape = (
        f"{size['tokens']:,} tokens, widths {size['teacher_width']}/{size['student_width']}, {size['dtype']}; "
        f"vocabulary {size['vocab']:,} unless a row says otherwise; {rows[0]['machine']}; median of "
        f"{max(row.get('rounds', 0) for row in rows)} rounds{is_toy(rows)}"
    )
    return f"{shape}:\n\n" + table((group, "ms", "x floor", "MiB", "rate"), cells, "lrrrr")


def bar(losses: Sequence[Line]) -> str:
    """Return whether the objective is within its bar, on a GPU, as a sentence."""
    found = [row for row in losses if row["group"].startswith("objective") and row["device"] != "cpu"]
    ratio = next((row["ratio"] for row in _last_run(found) if "ratio" in row), None)
    if ratio is None:
        return ""
    word = "met" if ratio <= OBJECTIVE_BAR else "missed"
    return f"Objective over its products: {ratio:.2f}; at most {OBJECTIVE_BAR} is the bar: {word}."


def steps(flags: str, rows: Sequence[Line]) -> str:
    """Return the table of one run's whole training steps, and the parts of profiled ones."""
    base = next((row["seconds"] for row in rows if row["objective"] == "logit KD"), None)
    cells = []
    for row in rows:
        ratio = f"{row['seconds'] / base:.2f}" if base else ""
        loss = ", ".join(f"{name} {value:.4g}" for name, value in row["losses"].items())
        seconds = f"{row['seconds']:.4g} (spread {row['spread']:.0%})"
        cells.append((row["objective"], seconds, ratio, f"{row['whole_mib']:.0f}", loss))
    size = rows[0]["size"]
    shape = (
        f"A step of {size['seq_length'] * size['micro_batch_size'] * size['micro_batches']:,} tokens, "
        f"{size['teacher_layers']} x {size['teacher_width']} -> {size['student_layers']} x "
        f"{size['student_width']}, vocabulary {size['vocab_size']:,}, `{flags}`; {rows[0]['machine']}"
        f"{is_toy(rows)}:"
    )
    parts = [shape, table(("a step", "seconds", "x KD", "whole MiB", "losses"), cells, "lrrrl")]
    if watched := [row for row in rows if row["parts"]]:
        names = list(watched[0]["parts"])
        cells = [(row["objective"], *(f"{row['parts'][name]:.4g}" for name in names)) for row in watched]
        parts.append(table(("seconds of one step, watched", *names), cells, "l" + "r" * len(names)))
    return "\n\n".join(parts)


def layouts(device: str, found: Sequence[Line]) -> str:
    """Return the table of steps at several layouts against float64."""
    rows = [
        (
            line["name"],
            line["ranks"],
            "bf16" if line["bf16"] else "float32",
            line["ending"],
            *_small(line, "terms", "gradients"),
        )
        for line in found
    ]
    heads = (f"layout on {device}", "ranks", "in", "ended", "terms off by", "gradients off by")
    return table(heads, rows, "lrllrr")


def curves(device: str, found: Sequence[Line]) -> str:
    """Return the table of small trainings, each beside another."""
    rows = [
        (line["name"], line["beside"], line["ending"], line["steps"], *_small(line, "farthest", "tolerance"))
        for line in found
    ]
    heads = (f"training on {device}", "beside", "ended", "steps", "farthest apart", "allowed")
    return table(heads, rows, "lllrrr")


def endings(device: str, found: Sequence[Line]) -> str:
    """Return how small trainings end when a rank ends."""
    rows = [(line["name"], line["ending"], line["seconds"], line["left"], line["said"]) for line in found]
    heads = (f"when, on {device}", "the test", "seconds to the end", "processes left", "messages")
    return table(heads, rows, "llrrr")


def _small(line: Line, *names: str) -> list[str]:
    """Return numbers far below 1, where they are known."""
    return [f"{line[name]:.1e}" if name in line else "" for name in names]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], sides: str) -> str:
    """Return a Markdown table; "" without rows."""
    rows = list(rows)
    if not rows:
        return ""
    rule = ["--:" if side == "r" else "---" for side in sides]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (heads, rule, *rows))


def is_toy(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a remark if the rows were measured at a toy size."""
    return f" ({NO_FIGURES})" if any(row.get("device") == "cpu" for row in rows) else ""


def _of(found: Sequence[Line], kind: str) -> list[Line]:
    return [line for line in found if line.get("kind") == kind]


def _groups(found: Sequence[Line], *keys: str) -> dict[tuple[str, ...], list[Line]]:
    """Return the lines by device and by these keys."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for line in found:
        groups.setdefault(tuple(line[key] for key in ("device", *keys)), []).append(line)
    return groups


def _last_run(rows: Sequence[Line]) -> list[Line]:
    """Return the rows of the last run: a process dates all its rows alike.

    Earlier runs may have been cut off.
    """
    return [row for row in rows if row["date"] == rows[-1]["date"]]


def _last_of_each(found: Sequence[Line]) -> list[Line]:
    """Return the last line of each name."""
    return list({line["name"]: line for line in found}.values())


def main(argv: Sequence[str]) -> int:
    """Print the tables or the page; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("lines", type=Path, metavar="FILE", help="lines of JSON")
    parser.add_argument("--page", action="store_true", help="with the machine and how each section ended")
    args = parser.parse_args(argv)
    found = lines.read(args.lines) if args.lines.is_file() else []
    if not found:
        parser.error(f"{args.lines}: no lines of results")
    text = page(found, f"Results of {args.lines}") if args.page else tables(found)
    if not text:
        parser.error(
            f"{args.lines}: no lines that a table is made of (no losses, steps, layouts or trainings)"
        )
    print(text)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    sys.exit(main(sys.argv[1:]))
