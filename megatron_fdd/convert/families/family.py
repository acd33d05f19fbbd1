"""The description of a family of Hugging Face models that a conversion needs.

A family is a table. Each row names one Megatron parameter, the Hugging Face tensors in it and the transform
between the two; the configuration has a mapping in each direction. Import and export read the same table.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, Protocol

import torch

from megatron_fdd.convert.families.transforms import Same, Transform
from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.layer_specs import LayerSpec

HfConfig = dict[str, Any]
"""The content of a config.json, before any library has completed or renamed its fields."""
MegatronArgs = dict[str, Any]
"""Megatron's argparse destinations and their values, which are plain values only."""


def slice_name(name: str, index: int) -> str:
    """Name one entry of dim 0 of a tensor that a folder holds as a whole, such as an expert."""
    return f"{name}[{index}]"


def whole_name(name: str) -> str:
    """Return the tensor to which a slice belongs; another name is returned unchanged."""
    return name.partition("[")[0]


def refuse_field(field: str, value: Any, why: str) -> NoReturn:
    """Refuse one field of a config.json with a ValueError."""
    raise ValueError(f'config.json has "{field}": {shown(value)}, {why}')


@dataclass(frozen=True, slots=True)
class WeightRow:
    """One Megatron parameter and its sources.

    Attributes:
        mcore: name in a stock GPTModel of Megatron's own ("local") modules, whole on one rank.
        sources: names of the Hugging Face tensors, in the transform's order. They are empty if the model lacks a
            parameter that Megatron has; the parameter is then 0.
        vocabulary: whether dim 0 is the vocabulary, which Megatron pads; padded rows are 0 and never exported.
        dtype: in which both sides keep it, whatever the dtype of the model; None if it has the model's.
    """

    mcore: str
    sources: tuple[str, ...]
    transform: Transform = Same()
    vocabulary: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Tensors that published files have and a table has no place for.

    Attributes:
        what: they are, for people.
        names: config -> pattern of the whole of such a name; empty if the model has none.
        without: config -> config of the model without them.
        is_kept_always: whether an import keeps them beside its checkpoint unasked, because the model is none without
            them.
    """

    what: str
    names: Callable[[HfConfig], str]
    without: Callable[[HfConfig], HfConfig]
    is_kept_always: bool = False


@dataclass(frozen=True, slots=True)
class DenseSibling:
    """The models that differ from a mixture of experts by an MLP in place of each layer's experts.

    Attributes:
        model_type: theirs; it may be the mixture's own.
        config: (a mixture's config, channels of an MLP) -> the dense model's. It raises ValueError if that cannot say
            what the mixture's says.
    """

    model_type: str
    config: Callable[[HfConfig, int], HfConfig]


class StoredFolder(Protocol):
    """What a family may look at in a model folder, to see how its files hold the weights."""

    @property
    def config(self) -> HfConfig:
        """The content of config.json."""

    @property
    def names(self) -> Collection[str]:
        """The names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""


@dataclass(frozen=True, slots=True)
class Family:
    """The conversion of one family of models.

    Attributes:
        model_type: the config.json field that selects the family.
        megatron_args: config -> the args that shape this model, in addition to `fixed`. It raises ValueError with the
            name of the field if it does not understand a value, or if Megatron's GPTModel cannot express it.
        fixed: Megatron args that are the same for all models of the family.
        hf_config: (config to start from, Megatron args) -> config; fields that already agree stay untouched.
        keep_layers: (config, layers) -> config of the model that has only these layers (0-based, increasing).
        rows: config -> the whole table with every parameter of the model, in the order of an export. The rows of
            one layer stay together.
        layer_prefix: the beginning of the names of one layer's tensors, with `{layer}` in it.
        ignored: endings of the names of buffers that may be present and carry no information.
        stacked: endings of the names of tensors that hold all experts of a layer, in dim 0. Rows name one of them
            by `slice_name`.
        tied: (name of the head, name of the embedding); a tied model may repeat the embedding under the head's name.
        prefix: a beginning that all names of a file may lack, as in a base model without a head.
        layer_spec: its layers, if they are not Megatron's own. `megatron_args` may have options for it, as plain
            values under "fdd_layer_options".
        left_out: what an import leaves out or keeps aside, and says so; None if nothing.
        uncut: Megatron args whose size a student shares with its teacher, each with the reason, for people.
        variant: (the family, a folder) -> the family with another table, if the folder's files hold the same weights
            otherwise; None if there is one way only.
        of_args: (config, args of a checkpoint) -> the family with what the args say and the config leaves open; None if
            it leaves nothing open.
        same_as: the type of transformers that is the same model, where transformers has none of this name; else empty.
        dense: the models with an MLP in place of experts; why there are none, for people; empty of a family without
            experts.
        models: the published models that it has, for people.
        limits: what of them is refused or lost, and why, for people.
    """

    model_type: str
    megatron_args: Callable[[HfConfig], MegatronArgs]
    fixed: Mapping[str, Any]
    hf_config: Callable[[HfConfig, Namespace], HfConfig]
    keep_layers: Callable[[HfConfig, Sequence[int]], HfConfig]
    rows: Callable[[HfConfig], list[WeightRow]]
    layer_prefix: str
    ignored: tuple[str, ...]
    tied: tuple[str, str]
    prefix: str = ""
    stacked: tuple[str, ...] = ()
    layer_spec: LayerSpec | None = None
    left_out: LeftOut | None = None
    uncut: Mapping[str, str] = field(default_factory=dict)
    variant: Callable[[Family, StoredFolder], Family] | None = None
    of_args: Callable[[HfConfig, Namespace], Family] | None = None
    same_as: str = ""
    dense: DenseSibling | str = ""
    models: str = ""
    limits: str = ""

    def left_out_names(self, config: HfConfig, names: Iterable[str]) -> list[str]:
        """Return the names, sorted, of the tensors that the table has no place for."""
        pattern = self.left_out.names(config) if self.left_out is not None else ""
        return sorted(name for name in names if pattern and re.fullmatch(pattern, name))

    @property
    def keeps_left_out(self) -> bool:
        """Whether an import keeps those tensors unasked."""
        return self.left_out is not None and self.left_out.is_kept_always

    def without_left_out(self, config: HfConfig) -> HfConfig:
        """Return the config of a model without those tensors."""
        return config if self.left_out is None else self.left_out.without(config)

    def as_stored(self, folder: StoredFolder) -> Family:
        """Return the family as a folder's files hold it: with its own tensors, a variant, or all without `prefix`."""
        if self.variant is not None:
            return self.variant(self, folder)
        if any(name.startswith(self.prefix) for name in folder.names):
            return self

        def bare(name: str) -> str:
            return name.removeprefix(self.prefix)

        def rows(config: HfConfig) -> list[WeightRow]:
            return [replace(row, sources=tuple(map(bare, row.sources))) for row in self.rows(config)]

        head, embedding = self.tied
        return replace(
            self, rows=rows, layer_prefix=bare(self.layer_prefix), tied=(head, bare(embedding)), prefix=""
        )


_TEXTS = ("model_type", "layer_prefix", "prefix")
_FUNCTIONS = ("megatron_args", "hf_config", "keep_layers", "rows")


def check_record(family: Family) -> None:
    """Refuse a record with a field of another type, which a conversion would stumble over.

    Raises:
        ValueError: names the field.
    """
    if not isinstance(family, Family):
        raise ValueError(
            f"a family must be a Family: {family!r} is none; make one, such as with decoder_family"
        )
    spec = family.layer_spec
    is_right = {
        **{name: isinstance(getattr(family, name), str) for name in _TEXTS},
        **{name: callable(getattr(family, name)) for name in _FUNCTIONS},
        "fixed": isinstance(family.fixed, Mapping),
        "uncut": isinstance(family.uncut, Mapping),
        "dense": isinstance(family.dense, DenseSibling | str),
        "ignored": _are_texts(family.ignored),
        "tied": _are_texts(family.tied) and len(family.tied) == 2,
        "layer_spec": spec is None
        or (isinstance(spec, LayerSpec) and callable(spec.build) and callable(spec.configure)),
    }
    wrong = [f"{name} {getattr(family, name)!r}" for name, right in is_right.items() if not right]
    if wrong or not family.model_type:
        raise ValueError(
            f"the family {family.model_type!r} has {', '.join(wrong) or 'no name'}: give what the docstring of "
            "Family says"
        )


def _are_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(each, str) for each in value)
