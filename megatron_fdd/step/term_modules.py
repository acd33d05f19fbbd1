"""The parameters of terms, as a part of the student's chunks, so that Megatron trains, reduces and saves them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

from megatron_fdd.config import FddConfig
from megatron_fdd.host.checkpoint import TERM_PREFIX
from megatron_fdd.losses.layer_plan import ChunkPlan
from megatron_fdd.losses.term_modules import TapModules, make_modules
from megatron_fdd.step.lens import wait_for

_CHILD = TERM_PREFIX.rstrip(".")


class TermModules(nn.Module):
    """The modules of a chunk's taps; parameters are called `fdd_terms.KIND.PAIR.NAME` in the chunk and in checkpoints.

    Args:
        chunk: the chunk whose child this becomes.
        fresh: names that the checkpoint to be loaded lacks. The load does not ask for them, and they keep their first
            values.
    """

    def __init__(self, chunk: GPTModel, modules: TapModules, fresh: Collection[str]) -> None:
        super().__init__()
        self._tensor_group = chunk.pg_collection.tp
        self._fresh = frozenset(fresh)
        for (kind, index), module in modules.items():
            if kind not in self._modules:
                self.add_module(kind, nn.Module())
            self.get_submodule(kind).add_module(str(index), module)
        self.register_load_state_dict_pre_hook(_keep_fresh)

    def for_micro_batch(self) -> TapModules:
        """Return the modules as they were given, after the new values of their parameters have arrived.

        Raises:
            AssertionError: the checkpoint has not been loaded.
        """
        assert not self._fresh, f"never loaded: {sorted(self._fresh)}"
        for module in self.modules():
            wait_for(module)
        return {
            (kind, int(index)): module
            for kind, taps in self.named_children()
            for index, module in taps.named_children()
        }

    def anchors(self) -> tuple[Tensor, ...]:
        """Return a tensor that adds 0 to a micro-batch's loss and depends on all that is trained; nothing without any.

        Megatron's overlapped reduction waits in every step for a gradient of each parameter, also for taps not drawn.
        """
        trained = [each.flatten()[0].float() * 0.0 for each in self.parameters() if each.requires_grad]
        return (torch.stack(trained).sum(),) if trained else ()

    def sharded_state_dict(
        self, prefix: str, sharded_offsets: tuple[Any, ...], metadata: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the place of each parameter in a checkpoint, without those that the checkpoint to be loaded lacks.

        Megatron calls it for each child of a chunk.
        """
        state = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            sharded_offsets=sharded_offsets,
            tp_group=self._tensor_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return {name: entry for name, entry in state.items() if name not in self._fresh}


def add_term_modules(
    chunks: Sequence[GPTModel],
    plans: Sequence[ChunkPlan],
    config: FddConfig,
    widths: tuple[int, int],
    fresh: Collection[str] = (),
) -> None:
    """Give chunks the terms' modules for their taps; for Megatron's hook before it wraps them.

    Args:
        plans: the chunks' plans.
        widths: hidden width of student and teacher.
        fresh: as for `TermModules`; may also name parameters of other chunks.
    """
    for chunk, plan in zip(chunks, plans, strict=True):
        modules = make_modules(config, plan.pairs, widths)
        if not modules:
            continue
        own = TermModules(chunk, modules, fresh)
        for parameter in own.parameters():
            # Each rank of the tensor-parallel group has other rows; Megatron sums their gradients.
            parameter.sequence_parallel = chunk.config.sequence_parallel  # type: ignore[attr-defined]
        chunk.add_module(_CHILD, own.to(torch.cuda.current_device()))


def term_modules_of(chunk: GPTModel) -> TermModules | None:
    """Return what `add_term_modules` gave a chunk; None where no term learns or keeps anything for its taps."""
    return getattr(chunk, _CHILD, None)


def _keep_fresh(modules: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Add missing fresh parameters to a state, as torch's hook before `load_state_dict`; nothing else may be missing.

    Megatron forgives an incomplete state: it tries again without `strict`.
    """
    assert isinstance(modules, TermModules)
    own = modules.state_dict(prefix=prefix)
    missing = own.keys() - state.keys()
    assert missing <= modules._fresh, f"not loaded: {sorted(missing)}"
    state |= {name: own[name] for name in missing}
    modules._fresh = frozenset()
