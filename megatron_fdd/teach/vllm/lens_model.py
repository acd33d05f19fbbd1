"""A teacher's norm and head out of its files, by way of a model of the same kind with hardly any layers.

How a model makes logits of its last state is found by running it (`hf_parts.py`), and a model of 671 billion weights is
not run for that: norm, head and embedding are its own, and the few layers before them are random.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from megatron_fdd.convert.hf_folder import INDEX_FILE, HfFolder
from megatron_fdd.teach.hf_parts import Parts, find_parts

# So many layers are tried, first with small matrices within them; types of several kinds of layers need some.
_TRIED = ((1, True), (2, True), (4, True), (1, False), (8, False))
_INNER = re.compile(r"(^|_)(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|inner_dim|dff)$")
_INNER_SIZE = 64
# A tensor of one of several layers or experts.
_OF_A_LAYER = re.compile(r"\.\d+\.")


def find_lens(folder: Path, config: Any, dtype: str) -> tuple[Parts, int]:
    """Find a teacher's norm and head, and what lies between its last layer and its logits.

    Only the files that have tensors outside of layers are opened.

    Args:
        config: the teacher's, by transformers; quantised or not.
        dtype: of norm and head.

    Returns:
        The parts, whose layers are not the teacher's; and the rows of its embedding.

    Raises:
        ValueError: no small model of this kind runs, or the files have no norm and head for it.
    """
    reasons: list[str] = []
    for small in _small_configs(config):
        try:
            model, absent = _loaded(folder, small, dtype)
            parts = find_parts(model)
        except ValueError as error:
            reasons.append(str(error))
            continue
        except Exception as error:  # its class checks in its own way what a cut config lacks
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())}")
            continue
        needed = {parts.weight_name, f"{parts.head_name}.weight"} & absent
        if needed:
            raise ValueError(
                f"--teacher {folder}: its files have no {min(needed)}, or in another shape; copy the model again"
            )
        return parts, model.get_input_embeddings().num_embeddings
    raise ValueError(
        f"--teacher {folder}: its norm and head are not found in a small model of the type {config.model_type} "
        f"({reasons[0]}); choose another engine"
    )


def _small_configs(config: Any) -> Iterator[Any]:
    """Yield copies of a config with few layers."""
    whole = config.get_text_config(decoder=True).num_hidden_layers
    for count, has_small_layers in _TRIED:
        if count > whole:
            continue
        small = copy.deepcopy(config)
        if hasattr(small, "quantization_config"):
            del small.quantization_config
        text = small.get_text_config(decoder=True)
        for name, value in list(vars(text).items()):
            if isinstance(value, list) and len(value) == whole:
                setattr(text, name, value[:count])
            elif has_small_layers and _INNER.search(name) and isinstance(value, int) and value > _INNER_SIZE:
                setattr(text, name, _INNER_SIZE)
        text.num_hidden_layers = count
        for each in (small, text):
            each.use_cache = False
        yield small


def _loaded(folder: Path, config: Any, dtype: str) -> tuple[Any, set[str]]:
    """Load what a folder has outside of layers; return also the names of all that are random."""
    stored = HfFolder(folder).tensors
    outside = {name: tensor.file for name, tensor in stored.items() if not _OF_A_LAYER.search(name)}
    with tempfile.TemporaryDirectory(prefix="fdd-lens-") as work:
        for file in set(outside.values()):
            Path(work, file).symlink_to((folder / file).resolve())
        Path(work, INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": outside}))
        Path(work, "generation_config.json").write_text("{}")
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            work,
            config=config,
            dtype=dtype,
            attn_implementation=None,  # a config.json may name a kernel of the hub
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        model, info = loaded
    absent = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    return model.eval().requires_grad_(False), absent
