"""Triton kernels with so few columns that a small vocabulary has several tiles, in a mended interpreter on a CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@contextmanager
def few_columns(row_columns: int = 8) -> Iterator[None]:
    """Give programs few columns, and mend the interpreter: its loops cannot convert their bounds from NumPy 2.4 on."""
    import triton

    from megatron_fdd.ops.gpu import sweeps

    with ExitStack() as patches:
        patches.enter_context(patch.object(sweeps, "MOST_COLUMNS", 16))
        patches.enter_context(patch.object(sweeps, "ROW_COLUMNS", row_columns))
        if DEVICE == "cpu":
            interpreter = triton.runtime.interpreter
            patch_tensor = interpreter._patch_lang_tensor

            def patched(tensor, scope) -> None:
                patch_tensor(tensor, scope)
                scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

            patches.enter_context(patch.object(interpreter, "_patch_lang_tensor", patched))
        yield
