"""The helpers that megatron-core's wheel (0.19.2) leaves out and Megatron's training loop expects."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import megatron.core.datasets.utils as dataset_utils

from megatron_fdd.host.patches.table import replace


def use_built_helpers() -> None:
    """Make Megatron use the dataset index builder that the wheel already contains.

    At start Megatron runs `make` beside it and ends the process if that fails; a wheel has no Makefile. In a source
    checkout, or if the built module is missing, Megatron's own way stays.
    """
    has_makefile = (Path(dataset_utils.__file__).parent / "Makefile").is_file()
    if not has_makefile and find_spec("megatron.core.datasets.helpers_cpp") is not None:
        replace("megatron.core.datasets.utils.compile_helpers", lambda: None)
