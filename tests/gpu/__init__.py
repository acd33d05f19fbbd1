"""Tests and trials that need one GPU or several."""

from importlib.util import find_spec


def te_is_there() -> bool:
    """Whether TransformerEngine is installed, and not hidden because it is broken."""
    return find_spec("transformer_engine") is not None
