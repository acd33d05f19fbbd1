"""The index of a Hugging Face model in several files: which file holds which tensor."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.json_file import read_json


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor, as an index names it.

    Raises:
        ValueError: the index has no such map, or names a file outside of its folder.
    """
    declared = read_json(index).get("weight_map")
    if not isinstance(declared, dict):
        raise ValueError(f"{index} has no weight_map; copy it again")
    for name, file in declared.items():
        if not isinstance(file, str) or not file or "\0" in file:
            raise ValueError(
                f"{index} names {shown(file)} for {name}, which is no name of a file; copy it again"
            )
        if PurePosixPath(file).is_absolute() or ".." in PurePosixPath(file).parts:
            raise ValueError(
                f"{index} names the file {shown(file)} for {name}, which lies outside of the folder; put the files "
                "together and name them without a path"
            )
    return declared
