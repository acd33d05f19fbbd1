"""One inner layer of both models on its way through blocks of tokens, for `ops.inner_loss`.

Shapes: N this rank's tokens, n tokens of a block, R those of all ranks under sequence parallelism, T / D hidden width
of teacher / student.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_fdd.ops.blocks import TokenBlock, finished_block
from megatron_fdd.ops.divergence import Divergence
from megatron_fdd.ops.head_loss import masked_sum
from megatron_fdd.ops.heads import Heads
from megatron_fdd.ops.kl_gradients import Upstream, normalisers_of
from megatron_fdd.ops.request import Request
from megatron_fdd.ops.vocab_shard import Pending

# A layer's logits are held until those of the next layer exist.
HELD_LAYERS = 2


@dataclass(frozen=True, slots=True)
class InnerLayer:
    """One layer of both models.

    Attributes:
        teacher_NT, student_ND: features that the heads multiply, float32; the student's carry gradient.
        divergence: factor of the sum of divergences in the loss; None: it is not asked for.
        delta: factor of the sum of 1 - cosine of the change since the layer before; None: it is not asked for.
        lse: log-sum-exps [N] of teacher and student, of a layer whose gradient others compute too: its logits are not
            made here, and the student's gets a gradient. None: they are made here.
    """

    teacher_NT: Tensor
    student_ND: Tensor
    divergence: float | None = None
    delta: float | None = None
    lse: tuple[Tensor, Tensor] | None = None


class LayerSums(NamedTuple):
    """Sums over tokens, each with its weight, 0-dim float32 without gradient; None where they are not asked for."""

    divergence: Tensor | None
    delta: Tensor | None


@dataclass(frozen=True, slots=True)
class InnerTerms:
    """What is computed of the layers.

    Attributes:
        divergence: None: no layer asks for it.
        weights_N: of the tokens, float32. A token of weight 0 contributes exactly 0 to the sums, whatever it holds; to
            the gradients, if its features are finite.
        detaches_previous: a delta's earlier end is a constant.
    """

    divergence: Divergence | None
    weights_N: Tensor
    detaches_previous: bool = False


class LayerPass(ABC):
    """A layer on its way through the blocks: for each `begin`, `add` with a delta's share, `end`; then `finish`.

    Attributes:
        lse: of the block's tokens, of teacher and student.
    """

    def __init__(self, layer: InnerLayer, terms: InnerTerms) -> None:
        self.layer, self._terms = layer, terms
        self.rows = slice(0, 0)
        self.lse: tuple[Tensor, Tensor] = (terms.weights_N, terms.weights_N)
        self._parts: list[Tensor] = []
        self._deltas: list[Tensor] = []

    @abstractmethod
    def begin(self, rows: slice) -> None:
        """Go to a block of tokens."""

    @abstractmethod
    def add(self, by_student_nD: Tensor, by_lse_n: Tensor) -> None:
        """Add to the gradient of the block's features and log-sum-exps."""

    @abstractmethod
    def end(self) -> None:
        """Leave the block."""

    @abstractmethod
    def finish(self) -> list[Tensor | None]:
        """Return the gradients of the layer's inputs."""

    def add_value(self, delta_n: Tensor) -> None:
        """Add a block's deltas to the layer's sum."""
        self._deltas.append(masked_sum(delta_n, self._terms.weights_N[self.rows]))

    @property
    def sums(self) -> LayerSums:
        """The sums over all blocks."""
        return LayerSums(*(torch.stack(each).sum() if each else None for each in (self._parts, self._deltas)))


class GivenLayer(LayerPass):
    """A layer whose log-sum-exps are given; it has the gradient of deltas alone."""

    def __init__(self, layer: InnerLayer, terms: InnerTerms) -> None:
        super().__init__(layer, terms)
        self._gradients: list[Tensor | None] = [None, None]

    def begin(self, rows: slice) -> None:
        assert self.layer.lse is not None
        teacher_N, student_N = self.layer.lse
        self.rows, self.lse = rows, (teacher_N[rows], student_N[rows])

    def add(self, by_student_nD: Tensor, by_lse_n: Tensor) -> None:
        assert self.layer.lse is not None
        for place, tensor, part in zip(
            (0, 1), (self.layer.student_ND, self.layer.lse[1]), (by_student_nD, by_lse_n), strict=True
        ):
            gradient = self._gradients[place]
            if gradient is None:
                gradient = self._gradients[place] = torch.zeros_like(tensor)
            gradient[self.rows] += part

    def end(self) -> None:
        pass

    def finish(self) -> list[Tensor | None]:
        return self._gradients


class SweptLayer(LayerPass):
    """A layer whose logits are made, and held from `begin` to `end`."""

    def __init__(self, layer: InnerLayer, heads: Heads, terms: InnerTerms) -> None:
        super().__init__(layer, terms)
        self._request = request_of(heads, None if layer.divergence is None else terms.divergence)
        self._heads = heads
        self._block: TokenBlock | None = None
        self._gradient_ND = torch.empty_like(layer.student_ND, dtype=heads.student_WD.dtype)
        self._by_student_nD: Tensor | None = None
        self._by_lse_n: Tensor | None = None
        self._reduction: Pending | None = None

    def begin(self, rows: slice) -> None:
        self._settle()
        self.rows, heads = rows, self._heads
        assert heads.teacher_WT is not None
        teacher_nT = self.layer.teacher_NT[rows].to(heads.teacher_WT.dtype)
        student_nD = self.layer.student_ND[rows].to(heads.student_WD.dtype)
        self._block = finished_block(self._request, *heads.models(teacher_nT, student_nD))
        outputs = self._block.outputs(self._request)
        assert outputs.teacher_lse_N is not None
        assert outputs.student_lse_N is not None
        self.lse = outputs.teacher_lse_N, outputs.student_lse_N
        if outputs.divergence_N is not None:
            self._parts.append(masked_sum(outputs.divergence_N, self._terms.weights_N[rows]))

    def add(self, by_student_nD: Tensor, by_lse_n: Tensor) -> None:
        if self._by_student_nD is None or self._by_lse_n is None:
            self._by_student_nD, self._by_lse_n = by_student_nD, by_lse_n
        else:
            self._by_student_nD, self._by_lse_n = (
                self._by_student_nD + by_student_nD,
                self._by_lse_n + by_lse_n,
            )

    def end(self) -> None:
        block, request = self._block, self._request
        assert block is not None
        normalisers = normalisers_of(request, block.statistics, block.second)
        gradient_RD = block.swept.sweeps.gradients(self._upstream(), normalisers, None, None)
        self._reduction = request.shard.start_reduce(gradient_RD.to(self._gradient_ND.dtype))
        self._block = self._by_lse_n = None

    def finish(self) -> list[Tensor | None]:
        self._settle()
        return [self._gradient_ND]

    def _upstream(self) -> Upstream:
        """Return the gradients of all ranks' tokens of the block. Collectives: see `inner_loss`."""
        shard, factor = self._request.shard, self.layer.divergence or 0.0
        by_lse_n = torch.zeros_like(self.lse[1]) if self._by_lse_n is None else self._by_lse_n
        stacked = torch.stack([self._terms.weights_N[self.rows].to(by_lse_n.dtype) * factor, by_lse_n], dim=1)
        stacked = shard.start_stack(stacked).wait() if shard.splits_tokens else stacked[None]
        divergence_R, lse_R = stacked.flatten(0, 1).unbind(1)
        return Upstream(divergence_R * self._request.temperature, lse_R, lse_R)

    def _settle(self) -> None:
        """Put the gradient of the last block in its place, when the ranks have added it up."""
        if self._reduction is None:
            return
        gradient_nD = self._reduction.wait()
        if self._by_student_nD is not None:
            gradient_nD = gradient_nD + self._by_student_nD
        self._gradient_ND[self.rows] = gradient_nD
        self._reduction = self._by_student_nD = None


def request_of(heads: Heads, divergence: Divergence | None) -> Request:
    """Return the request of a layer's sweeps; its blocks are those of every layer of these heads."""
    shard, implementation = heads.shard, heads.implementation
    return Request(
        shard=shard,
        divergence=divergence,
        needs_lse=True,
        has_labels=False,
        implementation=implementation,
        body_gradient=False,
        head_gradient=True,
        held_rows=implementation.held_rows(heads.student_WD, gpu_bytes=shard.gpu_bytes, layers=HELD_LAYERS),
        # In other divergences small probabilities do not bound the score.
        skips_tiles=implementation.skip_below > 0 and (divergence is None or divergence.one_sweep),
        teacher_extras=heads.teacher_extras,
        student_extras=heads.student_extras,
    )
