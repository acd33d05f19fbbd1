"""The quickstart's text: the documentation that every Python carries, as JSONL for `tools/prepare_data.py`.

The documents are the topics of `help()` and the module docstrings of the standard library; the modules are
parsed, never imported. A document's hash decides whether it is for training or validation, so the split is
the same on every run and no document is in both.

    python examples/quickstart/corpus.py --output-dir runs/quickstart/corpus
"""

import argparse
import ast
import hashlib
import inspect
import json
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
MIN_CHARACTERS = 200


def clean(text: str) -> str:
    """Without common indentation, ruling lines, trailing spaces and runs of empty lines."""
    lines = [line.rstrip() for line in inspect.cleandoc(text).splitlines()]
    kept = [line for line in lines if not re.fullmatch(r"\s*([*=~^-])\1{3,}", line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()


def module_docstrings(library: Path) -> Iterator[str]:
    """The docstring of every module under `library`, in the order of their paths."""
    for path in sorted(library.rglob("*.py")):
        if SKIPPED_FOLDERS.isdisjoint(path.relative_to(library).parts):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about escapes in other people's strings
                tree = ast.parse(path.read_bytes())
            yield ast.get_docstring(tree) or ""


def documents(library: Path) -> list[str]:
    """Cleaned documents, each once."""
    texts = [topics[name] for name in sorted(topics)] + list(module_docstrings(library))
    cleaned = dict.fromkeys(clean(text) for text in texts)
    return [text for text in cleaned if len(text) >= MIN_CHARACTERS]


def is_validation(text: str, percent: int) -> bool:
    """Whether this document is one of the `percent` held out, decided by its hash alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % 100 < percent


def write_json_lines(path: Path, texts: list[str]) -> None:
    """One `{"text": ...}` a line; the file appears only when it is whole."""
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    partial.replace(path)


def main() -> None:
    """Parse the command line and write train.jsonl and validation.jsonl."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--validation-percent", type=int, default=10, help="of the documents (default 10)")
    arguments = parser.parse_args()
    texts = documents(Path(sysconfig.get_path("stdlib")))
    split: dict[bool, list[str]] = {True: [], False: []}
    for text in texts:
        split[is_validation(text, arguments.validation_percent)].append(text)
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    write_json_lines(arguments.output_dir / "train.jsonl", split[False])
    write_json_lines(arguments.output_dir / "validation.jsonl", split[True])
    sizes = {held: sum(map(len, split[held])) for held in split}
    print(
        f"corpus: {len(split[False])} training documents ({sizes[False]:,} characters), "
        f"{len(split[True])} validation documents ({sizes[True]:,} characters) -> {arguments.output_dir}"
    )


if __name__ == "__main__":
    main()
