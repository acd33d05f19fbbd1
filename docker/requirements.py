"""The requirements of pyproject.toml, printed without torch and megatron-core: `python requirements.py [EXTRA...]`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

HELD = {"torch", "megatron-core", "megatron_fdd"}


def requirements(pyproject: Path, extras: list[str]) -> list[str]:
    """Those of the package and of these extras."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    asked = [
        *project["dependencies"],
        *(line for extra in extras for line in project["optional-dependencies"][extra]),
    ]
    return [line for line in asked if re.match(r"[\w-]+", line)[0] not in HELD]  # type: ignore[index]


if __name__ == "__main__":
    print("\n".join(requirements(Path("pyproject.toml"), sys.argv[1:])))
