"""[NAME=]PATH, the form of models, data files and runs on a command line."""

from __future__ import annotations

from pathlib import Path

from megatron_fdd.host.given_name import fault_of


def split_name(value: str) -> tuple[str, str]:
    """Return name ("" for none) and path.

    A path may have an equals sign too: a name has no slash, and the whole value must not be an existing path.

    Raises:
        ValueError: one side of the equals sign is empty, or no name.
    """
    name, separator, path = value.partition("=")
    has_name = separator and "/" not in name and not Path(value).exists()
    if has_name and not (name and path):
        raise ValueError(f"{value}: must be NAME=PATH (an unset variable?)")
    for part in (name, path) if has_name else ():
        fault = fault_of(part)
        if fault is not None:
            raise ValueError(f"{value}: {fault}")
    return (name, path) if has_name else ("", value)
