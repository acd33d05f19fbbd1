"""The table of layer specifications, by name, for models whose layers are not Megatron's own.

A checkpoint's arguments keep the name (`fdd_layer_spec`) and a few plain values (`fdd_layer_options`). The name is
looked up here and nowhere else: nothing is imported by a name that a checkpoint holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_fdd.host.field_kinds import Kind, shown
from megatron_fdd.host.plugins import REMEDY

if TYPE_CHECKING:  # importing Megatron takes seconds, and a rehearsal starts before it
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.models.gpt import GPTModelConfig

NAME, OPTIONS = "fdd_layer_spec", "fdd_layer_options"
SPEC_ARGS = (NAME, OPTIONS)
"""The arguments of a checkpoint that say which layers a model has."""

Configure = Callable[["GPTModelConfig", Mapping[str, Any]], None]


def _leave(_config: GPTModelConfig, _options: Mapping[str, Any]) -> None:
    """Change nothing: Megatron's arguments say all."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """The layers of a family.

    Attributes:
        build: makes the specification of a layer from Megatron's model configuration; called when a model is built. It
            is given `vp_stage` too, if it has such a parameter.
        configure: sets in a configuration what no argument of Megatron's says, from `fdd_layer_options`. Called
            whenever a configuration is made, also to plan a run on a machine that could not build the model. Raises
            ValueError for what the layers cannot do.
        longest: returns the longest sequence that the layers can process, from `fdd_layer_options`; None if there is no
            bound beside `max_position_embeddings`.
    """

    build: Callable[[GPTModelConfig], ModuleSpec]
    configure: Configure = _leave
    longest: Callable[[Mapping[str, Any]], int] | None = None


_SPECS: dict[str, LayerSpec] = {}


def add_layer_spec(name: str, spec: LayerSpec) -> None:
    """Put a specification into the table.

    Raises:
        ValueError: the name is taken.
    """
    if name in _SPECS:
        raise ValueError(f"there is a layer specification {name!r} already: choose another name")
    _SPECS[name] = spec


def check_options(options: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
    """Refuse options of a layer specification that are missing or of the wrong kind.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    for name, kind in kinds.items():
        if not kind.fits(options.get(name)):
            raise ValueError(
                f"the checkpoint's {OPTIONS} have {name} = {shown(options.get(name))}, which must be {kind.words}"
            )


def final_norm_factor(config: TransformerConfig) -> float:
    """Return what the final norm's output is multiplied by, in front of the head: 1 unless a family says otherwise.

    A family's `configure` sets `config.final_norm_factor`, and its `build` uses `layer_block.changed_block`.
    """
    factor: float = getattr(config, "final_norm_factor", 1.0)
    return factor


def logit_cap(config: TransformerConfig) -> float | None:
    """Return c of the soft cap c tanh(z / c) of the model's logits: None unless a family's `configure` sets it."""
    cap: float | None = getattr(config, "logit_cap", None)
    return cap


def final_norm_has_bias(config: TransformerConfig) -> bool:
    """Return whether the final norm has a bias: a LayerNorm has one, unless a family's `bias_free_norms` is set."""
    return config.normalization == "LayerNorm" and not getattr(config, "bias_free_norms", False)


def apply_layer_spec(config: GPTModelConfig, args: argparse.Namespace) -> None:
    """Give `config` the layers that its arguments name, if they name any.

    Raises:
        ValueError: a name that is not in the table, or `--spec` beside it; a sequence that is too long for the layers.
    """
    name = getattr(args, NAME, None)
    if name is None:
        return
    if args.spec is not None:
        raise ValueError(
            f"--spec {' '.join(args.spec)}: the model has the layers of a {name}; leave --spec out"
        )
    if name not in _SPECS:
        raise ValueError(
            f"the checkpoint's model has layers named {name!r} ({NAME}), which nothing here describes (there are "
            f"{', '.join(sorted(_SPECS))}); add its family: {REMEDY}"
        )
    spec, options = _SPECS[name], getattr(args, OPTIONS, None) or {}
    spec.configure(config, options)
    longest = None if spec.longest is None else spec.longest(options)
    if longest is not None and args.seq_length > longest:
        raise ValueError(
            f"--seq-length {args.seq_length}: attention of a {name} changes beyond {longest} tokens, and not in "
            f"Megatron; give at most {longest}, or for a teacher use `fdd teach --engine transformers`"
        )
    config.transformer_layer_spec = spec.build
