"""TransformerEngine's own Python on CPUs; `rank_image.py` explains how."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

PYTHON = Path(sys.prefix) / "transformer-engine"  # where tools/env.sh puts the package, without its libraries
IMAGE = "tests.transformer_engine.rank_image"
needs_python = pytest.mark.skipif(
    not PYTHON.is_dir(), reason="needs TransformerEngine's Python: source tools/env.sh"
)
