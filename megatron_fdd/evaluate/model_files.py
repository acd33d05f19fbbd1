"""The checks of a Hugging Face folder before transformers loads it: weights, sizes, names of code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fdd.host.field_kinds import Kind, either, list_of, shown, wrong_field
from megatron_fdd.host.json_file import read_json
from megatron_fdd.host.model_fields import HEADS, LAYERS
from megatron_fdd.host.weight_map import read_weight_map

# Under these names all kinds of models have them. Some models give a number for each layer.
_SIZES: Mapping[str, Kind] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head"), either(HEADS, list_of(HEADS))),
}
# Fields that choose how attention, or experts, are computed; a value with a slash is a repository of kernels.
_IMPLEMENTATION = ("attn_implementation", "experts_implementation")

# Even with quantised weights.
_MOST_WEIGHTS_A_BYTE = 8
# So many random numbers are made at once; transformers then says which tensors are missing.
_FEW_WEIGHTS = 10**8


def check_weight_files(folder: Path) -> None:
    """Refuse weights that lie outside of the folder, or are far too few for its config.json.

    transformers follows such names, and fills what is missing with random numbers before it says so.

    Raises:
        ValueError: names the file, or both numbers.
    """
    files = {path for end in ("*.safetensors", "*.bin") for path in folder.glob(end)}
    for index in sorted(folder.glob("*.index.json")):
        files |= {folder / name for name in read_weight_map(index).values()}
    if any(path.exists() and not path.is_file() for path in files):
        raise ValueError(f"{folder}: its weights are no regular files; copy or export the model again")
    config = read_json(folder / "config.json")
    names = (("vocab_size",), ("hidden_size", "n_embd"), ("num_hidden_layers", "n_layer"))
    sizes = [next((config[name] for name in group if type(config.get(name)) is int), 0) for group in names]
    vocabulary, width, layers = sizes
    least = (vocabulary + layers) * width  # an embedding, and at least a norm in each layer
    num_bytes = sum(path.stat().st_size for path in files if path.is_file())
    if least > max(_FEW_WEIGHTS, _MOST_WEIGHTS_A_BYTE * num_bytes):
        raise ValueError(
            f"{folder}: its config.json describes a model of {least:,} weights or more, and its files of weights have "
            f"{num_bytes:,} bytes: they belong to different models; copy or export the model again"
        )


def check_sizes(content: Mapping[str, Any], folder: Path) -> None:
    """Refuse numbers of layers and heads that no model has, in a config.json and in the part about its text model."""
    part = content.get("text_config")
    for values in (content, part if isinstance(part, dict) else {}):
        found = wrong_field(values, _SIZES)
        if found is not None:
            raise ValueError(
                f'{folder}/config.json has "{found[0]}": {shown(found[1])}, which must be {found[2]}; '
                "get the file again"
            )


def check_no_kernels(content: object, folder: Path) -> None:
    """Refuse a config.json, or a part of one, that names a kernel of the hub, which transformers would run."""
    for name, value in content.items() if isinstance(content, dict) else ():
        check_no_kernels(value, folder)
        if name.endswith(_IMPLEMENTATION) and "/" in str(value):
            raise ValueError(
                f'{folder}/config.json has "{name}": {shown(value)}, which is code on the hub, and nothing is run by a '
                "name out of a file; remove that field"
            )
