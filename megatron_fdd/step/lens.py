"""The student's lens on one pipeline stage, and access to a model's final norm and head with their present weights.

Shape letters: H hidden, W this rank's slice of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_fdd.host.layer_specs import final_norm_factor, final_norm_has_bias, logit_cap
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.lens import FinalNorm, Lens
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.step.lens_copies import LensCopies, empty_lens
from megatron_fdd.step.trained_lens import TrainedLens


class StudentLens:
    """The lens for the taps of a stage's chunks: the student's own, a copy of the last stage's, or a trained copy.

    Args:
        students: this stage's unwrapped chunks, by virtual stage.
    """

    def __init__(self, students: Sequence[GPTModel], plan: Plan, topology: Topology) -> None:
        self._students = list(students)
        self._topology = topology
        self._with_norm = plan.config.lens_norm == "final"
        self._is_detached = plan.config.lens_head == "detached"
        self._num_rows = plan.padded_vocab_size // topology.tensor_size
        self._copies = LensCopies(plan.tapping_stages, topology.pipeline_group) if plan.pairs else None
        self._trained: TrainedLens | None = None
        if not self._is_detached and plan.copying_stages:
            self._trained = TrainedLens(plan.copying_stages, topology, with_norm=self._with_norm)
        self._is_copying = topology.stage in plan.copying_stages
        self._copy: Lens | None = None

    @property
    def is_sent_home(self) -> bool:
        """Whether stages train copies, so that `send_gradients_home` has to be called; the same on every rank."""
        return self._trained is not None

    def begin_step(self) -> None:
        """Bring the last stage's lens, with its present weights, to the other stages that tap.

        Collectives over the pipeline group: those of `LensCopies.refresh`; none with one stage.
        """
        if self._copies is None or self._topology.num_stages == 1:
            return
        student = self._students[-1]
        own = None
        with torch.no_grad():
            if self._topology.is_last_stage:
                own = read_lens(student, with_norm=self._with_norm, detached=True)
            empty = partial(empty_lens, student.config, self._num_rows, with_norm=self._with_norm)
            self._copy = self._copies.refresh(own, empty)
        if self._trained is not None and self._copy is not None and self._is_copying:
            self._copy = self._trained.open(self._copy)

    def for_micro_batch(self, chunk: GPTModel) -> Lens:
        """Return the lens for the taps of `chunk`; the chunk with the head reads its own, with the present weights.

        Collectives: none.
        """
        if chunk.post_process:
            return read_lens(chunk, with_norm=self._with_norm, detached=self._is_detached)
        assert self._copy is not None
        return self._copy

    def send_gradients_home(self, num_tokens: Tensor) -> None:
        """Add the gradients of the copies to those of the last stage, after Megatron's own reduction.

        Args:
            num_tokens: the number of tokens by which Megatron divides the step's gradients.

        Collectives: those of `TrainedLens.send_home`.
        """
        assert self._trained is not None
        first, last = self._students[0], self._students[-1]
        self._trained.send_home(last if last.post_process else first, num_tokens)


def read_lens(model: GPTModel, *, with_norm: bool, detached: bool) -> Lens:
    """Return the lens of a model that owns its head (the last pipeline stage), with its present weights.

    Args:
        model: an unwrapped GPTModel.
        detached: whether head and norm are constants of the step; else both receive the lens gradient.

    Collectives: none of its own. Under `--overlap-param-gather` it waits for the parameters that the
    output layer's bucket is still gathering, as a call of that layer would.
    """
    head_WH, extras = read_head(model), HeadExtras(cap=logit_cap(model.config))
    norm = read_final_norm(model) if with_norm else None
    if not detached:
        return Lens(head_WH, norm, extras)
    if norm is not None:
        bias_H = None if norm.bias_H is None else norm.bias_H.detach()
        norm = replace(norm, weight_H=norm.weight_H.detach(), bias_H=bias_H)
    return Lens(head_WH.detach(), norm, extras)


def read_head(model: GPTModel) -> Tensor:
    """Return the output weight [W, H] of this rank, tied or not, after its new value has arrived."""
    if model.share_embeddings_and_output_weights:
        if model.pre_process:
            wait_for(model.embedding.word_embeddings)
        else:
            wait_for(model.output_layer)
        return model.shared_embedding_or_output_weight()
    wait_for(model.output_layer)
    return model.output_layer.weight


def read_final_norm(model: GPTModel) -> FinalNorm:
    """Return the final norm's parameters, after their new values have arrived."""
    config, norm = model.config, model.decoder.final_layernorm
    wait_for(norm)
    weight_H = norm.weight + 1 if config.layernorm_zero_centered_gamma else norm.weight
    factor = final_norm_factor(config)
    if config.normalization == "LayerNorm":
        bias_H = norm.bias if final_norm_has_bias(config) else None
        return FinalNorm(weight_H, bias_H, config.layernorm_epsilon, "layer", factor)
    return FinalNorm(weight_H, None, config.layernorm_epsilon, "rms", factor)


def wait_for(owner: torch.nn.Module) -> None:
    """Call the hook that DDP calls before a module's forward; it waits for parameters that are still being gathered.

    The fused losses never call the head's module, and read the norm's parameters outside its module. Without this
    call training would continue with stale values, and small models would not show it (docs/gradients.md).
    """
    for hook in owner._forward_pre_hooks.values():
        hook(owner, ())
