"""Which types of transformers can be a teacher: each is built small, and the engine looks for its parts.

    python -m benchmarks.teacher_types          # writes docs/teacher-types.md; about four minutes on one core

The weights are random, and the logits that head and norm give are compared with the model's own.
"""

from __future__ import annotations

import gc
import platform
import re
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from benchmarks.tiny_teachers import tiny_config, tiny_model
from megatron_fdd.teach.hf_parts import Parts, find_parts
from megatron_fdd.teach.hf_teacher import check_alone

PAGE = Path(__file__).parents[1] / "docs/teacher-types.md"
PACKAGES = ("transformers", "torch", "accelerate")
YES, NO, NOT_BUILT = "yes", "no", "not built"
_LONGEST = 220
_HEAD = """# Which types of transformers can be a teacher

`fdd teach --engine transformers` takes any causal language model whose logits are a linear head of one norm of the last
layer's output, times a constant, behind a soft cap if it has one. It finds these parts by running the model, and
compares what they give with the model's own logits before it stores anything.

The tables are the result of `python -m benchmarks.teacher_types`: each type of a causal language model in transformers
is built from a small config with random weights, in float32, and the engine looks for its parts. They say what the code
of a type is like, not that a published model of it was run. In bfloat16, the default of `--dtype`, the parts were found
in all that have them in float32{narrow}.

A config of an encoder and a decoder is refused; a decoder that was trained alone may teach (its `is_encoder_decoder` is
false).

Made with {packages}, on CPUs. There are {total} types:
{yes} can be a teacher, {no} cannot, {not_built} were not built small.

## What was found

In the column of the norm, `1 + w` means that the weight is stored without its 1, and `no weight` that there is none;
epsilon is that of the small config. A *soft cap* c makes a logit z to c tanh(z / c).
"""
_REST = """
## What is refused, or was not built

A type that was not built is not refused: its config has sizes of other names, or needs a package.
"""
_REMEDY = re.compile(r": (choose|give) another .*|; (choose|set|give) .*")


class Row(NamedTuple):
    """A type, and what was found."""

    name: str
    layers: str
    norm: str
    constant: str
    beside: str
    verdict: str
    why: str


def judge(name: str) -> Row:
    """Build a type and look for its parts."""
    try:
        model = tiny_model(name)
    except Exception as error:  # a config refuses a size, a package is missing
        return Row(name, "", "", "", "", NOT_BUILT, f"{type(error).__name__}: {_line(error)}")
    try:
        check_alone(tiny_config(name), "--teacher")
        parts = find_parts(model)
    except ValueError as error:
        return Row(name, "", "", "", "", NO, _line(error))
    words = [] if parts.extras.bias_V is None else ["bias"]
    words += [] if parts.cap is None else [f"soft cap {parts.cap:g}"]
    constant, why = f"{parts.constant:.6g}", ""
    try:
        find_parts(model.bfloat16())
    except ValueError as error:
        why = _line(error)  # in bfloat16 alone
    return Row(name, f"`{parts.layers_name}`", _norm(parts), constant, ", ".join(words), YES, why)


def page(rows: Sequence[Row]) -> str:
    """Return the page with the tables."""
    counts = Counter(row.verdict for row in rows)
    narrow = ", ".join(row.name for row in rows if row.why and row.verdict == YES)
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    text = _HEAD.format(
        narrow=narrow and f", but for {narrow}",
        packages=f"{packages} and Python {platform.python_version()}",
        total=len(rows),
        yes=counts[YES],
        no=counts[NO],
        not_built=counts[NOT_BUILT],
    )
    found = [row[:5] for row in rows if row.verdict == YES]
    others = [(row.name, row.verdict, row.why) for row in rows if row.verdict in (NO, NOT_BUILT)]
    first = _table(("type", "layers", "norm", "constant", "of the head"), found)
    return "\n".join((text, *first, _REST, *_table(("type", "verdict", "why"), others), ""))


def _norm(parts: Parts) -> str:
    """Describe a norm in a cell."""
    norm = parts.norm
    kind = {"rms": "RMSNorm", "layer": "LayerNorm"}[norm.kind]
    shifted = bool((parts.raw_weight_T != norm.weight_T).any())
    words = ["no weight"] if not parts.weight_name else ["1 + w"] if shifted else []
    words += ["bias"] if norm.bias_T is not None else []
    return f"`{parts.norm_name}`, {', '.join((kind, *words))}, {norm.epsilon:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def _line(error: Exception) -> str:
    """Return what an error says, in one line of a table."""
    text = " ".join(str(error).split()).replace("`", "").removeprefix("--teacher: ")
    text = _REMEDY.sub("", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def main() -> None:
    """Judge the named types and print them; without names judge all, and write the page."""
    logging.set_verbosity(logging.CRITICAL)
    warnings.filterwarnings("ignore")
    names = sys.argv[1:]
    rows = []
    for name in tqdm(names or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), unit="type", disable=None):
        rows.append(judge(name))
        gc.collect()
    if names:
        print(*rows, sep="\n")
    else:
        PAGE.write_text(page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
