"""The parts of the pages that are made from the code: flags, families, the picture of modules, tables of Megatron.

python docs/generate.py      # writes them between their marks; tests/test_docs.py tests that they are up to date
"""

from __future__ import annotations

import argparse
import ast
import graphlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_fdd.config import add_fdd_args
from megatron_fdd.convert.families import FAMILIES, MULTIMODAL
from megatron_fdd.convert.families.family import Family
from megatron_fdd.convert.families.multimodal import Multimodal
from megatron_fdd.doctor.seam_table import SEAMS
from megatron_fdd.host.patches.table import PATCHES, REHEARSAL_PATCHES, Patch

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "megatron_fdd"
MARK = "<!-- {}: made by docs/generate.py -->"
# What each room of the package is: the boxes of the picture.
ROOMS = {
    "cli": "the command fdd",
    "doctor": "the check of a machine",
    "distill": "the entry point",
    "teach": "a teacher's features, computed once for a store",
    "plan": "all that is decided before a process group exists",
    "step": "all that runs inside a training step, and the teacher",
    "convert": "Hugging Face and Megatron",
    "evaluate": "exported students, the report",
    "losses": "what is minimised; no Megatron",
    "data": "raw files to batches",
    "ops": "the fused mathematics; torch alone",
    "host": "Megatron's state, its patches, CPUs, the terminal",
    "config": "the flags",
}


def main() -> None:
    """Rewrite every page that has a generated part."""
    for name in sorted({page for page, _ in PARTS}):
        path = DOCS / name
        path.write_text(filled(name, path.read_text(encoding="utf-8")), encoding="utf-8")


def filled(name: str, text: str) -> str:
    """The page `name`, whose text this is, with its parts as the code has them now.

    Raises:
        ValueError: the page lacks a part's marks.
    """
    for (page, part), made in PARTS.items():
        if page == name:
            marks = re.search(rf"{MARK.format(part)}(.*?)<!-- end of {part} -->", text, re.DOTALL)
            if marks is None:
                raise ValueError(
                    f"docs/{name}: no marks {MARK.format(part)} ... <!-- end of {part} -->; put them back"
                )
            text = f"{text[: marks.start(1)]}\n\n{made()}\n\n{text[marks.end(1) :]}"
    return text


def flags_table() -> str:
    """One row a flag, in the order of --help."""
    parser = add_fdd_args(argparse.ArgumentParser(add_help=False))
    return _table(("flag", "default", ""), map(_flag, parser._actions))


def _flag(action: argparse.Action) -> tuple[str, str, str]:
    argument = f" {action.metavar}" if action.metavar else ""
    values = ", ".join(f"`{value}`" for value in action.choices or ())
    text = re.sub(r" \(%\(default\)s[^()]*\)$", "", action.help or "").replace("%%", "%").replace("|", r"\|")
    text = re.sub(r"(?<!\S)(--[a-z][\w-]*[a-z0-9])", r"`\1`", text)
    name = f"`{action.option_strings[0]}{argument}`"
    return name, _default(action.default), f"{values + ': ' if values else ''}{text}"


def _default(value: object) -> str:
    """Nothing for None, `off` for False."""
    if value is None:
        return ""
    if value is False:
        return "off"
    return f"{value:g}" if isinstance(value, int | float) else f"`{value}`"


def picture() -> str:
    """Rooms and the imports between them as Mermaid; an import that follows from others is left out."""
    lines = [f'    {name}["<b>{name}</b>: {meaning}"]' for name, meaning in ROOMS.items()]
    lines += [f"    {start} --> {end}" for start, end in sorted(necessary(set(imports_between_rooms())))]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


def imports_between_rooms() -> Iterator[tuple[str, str]]:
    """(room, room that a file of it imports from).

    Raises:
        ValueError: a room that `ROOMS` does not know.
    """
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if own == "__init__":
            continue
        own = "cli" if own == "__main__" else own
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                package, _, rest = name.partition(".")
                room = rest.split(".")[0]
                if package != PACKAGE.name or room in (own, "__version__"):
                    continue
                if not {own, room} <= ROOMS.keys():
                    raise ValueError(f"{own} imports {name}: add its room to ROOMS in docs/generate.py")
                yield own, room


def necessary(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Without those that another way, of two arrows or more, leads along.

    Raises:
        graphlib.CycleError: the arrows make a circle; it is named.
    """
    targets = {start: {end for begin, end in arrows if begin == start} for start, _ in arrows}
    graphlib.TopologicalSorter(targets).prepare()

    def reachable(start: str) -> set[str]:
        ends = targets.get(start, set())
        return ends.union(*(reachable(end) for end in ends))

    return {
        (start, end)
        for start, end in arrows
        if not any(end in reachable(middle) for middle in targets[start])
    }


def family_table() -> str:
    """One row a family of models."""
    families = [(each, each) for each in FAMILIES.values()]
    multimodal = [(each, FAMILIES[each.texts[0]]) for each in MULTIMODAL.values()]
    rows = sorted([*families, *multimodal], key=lambda row: row[0].model_type)
    head = ("model type", "models", "layers", "over ranks", "refused or lost, and why")
    return _table(
        head, ((f"`{own.model_type}`", own.models, *_family(text), _limits(own)) for own, text in rows)
    )


def _family(family: Family) -> tuple[str, str]:
    """Whose layers a family of text models has, and over what a run can share them."""
    axes = "all, EP" if "num_experts" not in family.fixed else "all"
    return "Megatron's" if family.layer_spec is None else "its own", axes


def _limits(family: Family | Multimodal) -> str:
    left_out = ""
    if isinstance(family, Family) and family.left_out is not None:
        left_out = f"{family.left_out.what}, unless it is kept"
    return "; ".join(each for each in (left_out, family.limits) if each) or "-"


def dense_table() -> str:
    """One row a type of mixtures of experts."""
    dense = {name: each.dense for name, each in sorted(FAMILIES.items()) if each.dense}
    rows = (
        (f"`{name}`", "-", each) if isinstance(each, str) else (f"`{name}`", f"`{each.model_type}`", "")
        for name, each in dense.items()
    )
    return _table(("mixture of experts", "dense student", "why there is none"), rows)


def seam_table() -> str:
    """One row a name of Megatron that `fdd doctor` looks at."""
    rows = (
        (
            f"`{_short(seam.name)}` ({', '.join(f'`{name}`' for name in seam.parameters) or 'none'})",
            seam.purpose,
            ", ".join(f"`{path}`" for path in seam.where),
            seam.breaks,
        )
        for seam in SEAMS
    )
    return _table(("seam", "what for", "where", "what breaks without it"), rows)


def patch_table(patches: Iterable[Patch]) -> str:
    """One row a name of Megatron that is replaced."""
    rows = (
        (f"`{_short(patch.target)}`", patch.when, patch.why, patch.until, f"`{patch.installed_by}`")
        for patch in patches
    )
    return _table(("name", "when", "why", "until", "installed by"), rows)


def _short(name: str) -> str:
    return name.removeprefix("megatron.")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in rows)])


# (page, part): what writes it.
PARTS = {
    ("flags.md", "flags"): flags_table,
    ("conversion.md", "families"): family_table,
    ("conversion.md", "dense"): dense_table,
    ("architecture.md", "modules"): picture,
    ("megatron.md", "seams"): seam_table,
    ("megatron.md", "patches"): lambda: patch_table(PATCHES),
    ("megatron.md", "rehearsal patches"): lambda: patch_table(REHEARSAL_PATCHES),
}

if __name__ == "__main__":
    main()
