"""The logit lens: a model's final norm and head, applied to any hidden state; the teacher's may be a learned one.

Shape letters: S sequence (this rank's part), B micro-batch, N = S*B token rows, H hidden, T the teacher's width,
W this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_fdd.ops.head_extras import NO_EXTRAS, HeadExtras
from megatron_fdd.ops.own_code import called, takes


@dataclass(frozen=True, slots=True)
class FinalNorm:
    """A functional copy of a model's final norm. Statistics and result are float32.

    Attributes:
        weight_H: scale, already shifted by 1 where the model stores it zero-centred.
        bias_H: None where there is none.
        kind: "rms" keeps the mean, "layer" takes it away.
        factor: of the result, in a model whose logits are scaled.
    """

    weight_H: Tensor
    bias_H: Tensor | None
    epsilon: float
    kind: Literal["rms", "layer"]
    factor: float = 1.0

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        hidden_NH = hidden_NH.float()
        width = hidden_NH.shape[-1:]
        weight_H, bias_H = self.weight_H.float(), None if self.bias_H is None else self.bias_H.float()
        if self.kind == "layer":
            normed_NH = torch.nn.functional.layer_norm(hidden_NH, width, weight_H, bias_H, self.epsilon)
        else:
            normed_NH = torch.nn.functional.rms_norm(hidden_NH, width, weight_H, self.epsilon)
            normed_NH = normed_NH if bias_H is None else normed_NH + bias_H
        return normed_NH if self.factor == 1.0 else normed_NH * self.factor


@dataclass(frozen=True, slots=True)
class Lens:
    """The map from a hidden state to the vocabulary: z = head_WH N(h), or z = head_WH h without a norm.

    The head stays sharded over the vocabulary; no logits are formed here (ops/linear_kl.py does it in tiles).

    Attributes:
        extras: bias and soft cap of the logits, of final and inner layers alike.
    """

    head_WH: Tensor
    norm: FinalNorm | None
    extras: HeadExtras = NO_EXTRAS

    def features(self, hidden_SBH: Tensor) -> Tensor:
        """Return the normed features of every token row, float32 [N, H]."""
        return self.normed(hidden_SBH.flatten(0, 1))

    def normed(self, hidden_NH: Tensor) -> Tensor:
        """Return the normed features of rows [N, H], in float32."""
        return hidden_NH.float() if self.norm is None else self.norm(hidden_NH)


Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class LensKind:
    """A way to make features of a block's output, with tensors that were learned for the block.

    Attributes:
        tensors: the shape of each of a block's tensors, a letter a dimension: `{"weight": "TT", "bias": "T"}`. T is the
            teacher's width; any other letter is a size of the file's own, one size a block.
        features: makes features [N, T] of hidden states [N, T] in the teacher's dtype, a block's tensors by name, and
            the teacher's final norm, which takes [N, T] of any dtype and returns float32. The head comes after it. Each
            row is made from its own row alone: there are ranks, and steps, that see some rows of a sequence.
    """

    tensors: Mapping[str, str]
    features: Callable[[Tensor, Mapping[str, Tensor], Norm], Tensor]


LENSES: dict[str, LensKind] = {}
"""Every kind that a lens file can be of, by name."""


def add_lens(name: str, kind: LensKind) -> None:
    """Add an own kind, from the module that `--fdd-plugin` names.

    Raises:
        ValueError: a kind of that name exists, the name is not one word, or the kind's tensors or function cannot be.
    """
    if not isinstance(kind, LensKind):
        raise ValueError(f"lens {name!r}: must be a LensKind: {kind!r} is none")
    if name in LENSES:
        raise ValueError(f"a lens {name!r} exists already: give this one another name")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a lens cannot be called {name!r}: use letters, digits and _")
    tensors = kind.tensors
    if not isinstance(tensors, Mapping) or not tensors or not all(map(_is_named, tensors.items())):
        raise ValueError(
            f"lens {name}: tensors {tensors!r} must name at least one, without '.', with a letter for each of its "
            "dimensions, as {'weight': 'TT'}"
        )
    if not takes(kind.features, "hidden_NT", "tensors", "norm"):
        raise ValueError(
            f"lens {name}: features: it must be a function that takes (hidden_NT, tensors, norm)"
        )
    LENSES[name] = kind


def _is_named(row: tuple[object, object]) -> bool:
    """Whether a row has the name of a tensor and its shape."""
    return all(isinstance(each, str) for each in row) and "." not in str(row[0]) and str(row[1]).isalpha()


@dataclass(frozen=True, slots=True)
class TeacherLens:
    """The teacher's lens on one pipeline stage. Constant.

    Attributes:
        bare: final norm and head. The final hidden states are read through nothing else.
        kind: None: inner layers are read through the bare lens too.
        blocks: tensors of the blocks that this stage reads, by name.
    """

    bare: Lens
    kind: LensKind | None = None
    blocks: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def head_WT(self) -> Tensor:
        """The teacher's own head, whatever the kind."""
        return self.bare.head_WH

    def features(self, hidden_SBT: Tensor, block: int) -> Tensor:
        """Make the features of every token row of a block's output, float32 [N, T], which the head multiplies.

        Raises:
            ValueError: the kind failed, or returned another shape.
        """
        if self.kind is None:
            return self.bare.features(hidden_SBT)
        hidden_NT = hidden_SBT.flatten(0, 1)
        features_NT = called(
            "the lens: features", self.kind.features, hidden_NT, self.blocks[block], self.bare.normed
        )
        shape = features_NT.shape if isinstance(features_NT, Tensor) else None
        if shape != hidden_NT.shape:
            found = repr(features_NT) if shape is None else f"features {[*shape]}"
            raise ValueError(
                f"the lens made {found} of hidden states {[*hidden_NT.shape]}; both must have one shape"
            )
        return features_NT.float()
