"""Write the parts of the pages that are made from the code: table of flags, picture of modules, tables of Megatron.

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
from megatron_fdd.doctor.seam_table import SEAMS
from megatron_fdd.patches import PATCHES, REHEARSAL_PATCHES, Patch

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "megatron_fdd"
MARK = "<!-- {}: made by docs/generate.py -->"
# What each box of the picture is, and the modules and folders in it. Every module is in one of them.
BOXES = {
    "cli": ("the command fdd, the check of a machine", "cli doctor __main__"),
    "distill": ("the entry point", "distill"),
    "plan": ("all that is decided before a process group exists", "run preflight balance dry_run"),
    "step": (
        "all that runs inside of a training step",
        "student objective sampling schedule pipeline carry attach lens_copies live_lens metrics progress",
    ),
    "teacher": ("one forward pass with taps; the frozen model's features", "teacher taps"),
    "losses": ("the terms, from features and heads", "losses lens"),
    "models": ("what a checkpoint's arguments say", "arguments experts fp8 parameters student_memory"),
    "host": (
        "Megatron's state, its patches, CPUs, the terminal",
        "topology checkpoint saving save_folder disk launch wheel stepped_adam local_norms rehearsal patches console "
        "quiet",
    ),
    "tokenizers": ("is it the same tokenizer", "tokenizer_identity json_file"),
    "settings": ("flags, and which layers are paired", "config layer_plan"),
    "ops": ("the fused mathematics", "ops"),
    "data": ("raw files to batches", "data"),
    "convert": ("Hugging Face and Megatron", "convert"),
    "evaluate": ("exported students, the report", "evaluate"),
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
    """Boxes and the imports between them as Mermaid; an import that follows from others is left out."""
    lines = [f'    {name}["{_label(name)}"]' for name in BOXES]
    lines += [f"    {start} --> {end}" for start, end in sorted(necessary(imports_between_boxes()))]
    return "\n".join(["```mermaid", "flowchart TD", *lines, "```"])


def _label(name: str) -> str:
    meaning, modules = BOXES[name]
    held = "" if modules == name else f"<br><i>{', '.join(modules.split())}</i>"
    return f"<b>{name}</b>: {meaning}{held}"


def imports_between_boxes() -> set[tuple[str, str]]:
    """(box, box that it imports from).

    Raises:
        ValueError: a module that is in no box.
    """
    box_of = {module: name for name, (_, modules) in BOXES.items() for module in modules.split()}
    imports = set(_imports())
    homeless = {module for arrow in imports for module in arrow} - box_of.keys()
    if homeless:
        raise ValueError(
            f"{sorted(homeless)}: in no box of the picture; add them to BOXES in docs/generate.py"
        )
    return {(box_of[start], box_of[end]) for start, end in imports if box_of[start] != box_of[end]}


def _imports() -> Iterator[tuple[str, str]]:
    """(module or folder, module or folder of this package that a file of it imports)."""
    rooms = {
        path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            parts = (name.split(".") for name in names)
            yield from ((own, part[1]) for part in parts if part[0] == PACKAGE.name and part[1] in rooms)


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
    ("architecture.md", "modules"): picture,
    ("megatron.md", "seams"): seam_table,
    ("megatron.md", "patches"): lambda: patch_table(PATCHES),
    ("megatron.md", "rehearsal patches"): lambda: patch_table(REHEARSAL_PATCHES),
}

if __name__ == "__main__":
    main()
