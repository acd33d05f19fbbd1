"""Source distributions and wheels of the checkout, built offline and outside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

from tests.harness.markdown import ROOT


def copy_checkout(folder: Path) -> Path:
    """Copy into `folder` what git tracks, and new files that are not ignored; return `folder`."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def build(kind: Literal["sdist", "wheel"], source: Path, folder: Path) -> Path:
    """Build the project at `source` into the empty `folder` with the installed setuptools; return the file."""
    code = (
        "import sys, setuptools.build_meta as backend; getattr(backend, 'build_' + sys.argv[1])(sys.argv[2])"
    )
    command = [sys.executable, "-c", code, kind, str(folder)]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (built,) = folder.iterdir()
    return built
