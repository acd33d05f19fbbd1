"""The study's text: stories separated by a line, split into JSONL for training, for choices, and for final scores.

Every `--every`-th story goes to validation.jsonl (the learning rates are chosen on it) and the one after it to
test.jsonl (the reported scores); the rest is train.jsonl. The last story is dropped, because a text that was cut to a
size ends in the middle of a story. If a story occurs twice, the first is kept.

    python examples/study/split.py --text tinystories.txt --output-dir runs/study/text
"""

import argparse
import json
from pathlib import Path


def read_stories(path: Path, separator: str) -> list[str]:
    """Return whole stories, each once, in the order of the file.

    Raises:
        ValueError: fewer than two lines equal `separator`.
    """
    stories = [story.strip() for story in f"\n{path.read_text(encoding='utf-8')}".split(f"\n{separator}\n")]
    if len(stories) < 3:
        raise ValueError(f"{path} has no two lines {separator!r}, which end its stories: see --separator")
    return list(dict.fromkeys(story for story in stories[:-1] if story))


def split_stories(stories: list[str], every: int) -> dict[str, list[str]]:
    """Split the stories into train, validation and test.

    Raises:
        ValueError: a part would be empty.
    """
    parts = {
        "train": [story for number, story in enumerate(stories) if number % every > 1],
        "validation": stories[::every],
        "test": stories[1::every],
    }
    if not all(parts.values()):
        raise ValueError(f"{len(stories)} stories, of which every {every}th is held out, leave a part empty")
    return parts


def main() -> None:
    """Parse the command line and write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--separator", default="<|endoftext|>", help="the line (default %(default)s)")
    parser.add_argument("--every", type=int, default=20, help="default %(default)s")
    arguments = parser.parse_args()
    try:
        parts = split_stories(read_stories(arguments.text, arguments.separator), arguments.every)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, stories in parts.items():
        partial = arguments.output_dir / f"{name}.partial"
        partial.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories), encoding="utf-8")
        partial.replace(arguments.output_dir / f"{name}.jsonl")
    print(", ".join(f"{name}: {len(stories)} stories" for name, stories in parts.items()))


if __name__ == "__main__":
    main()
