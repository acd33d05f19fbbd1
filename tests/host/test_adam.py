"""The stand-in for the fused Adam: torch's numbers, one step for each group."""

from __future__ import annotations

import copy

import megatron.core.optimizer as megatron_optimizers
import pytest
import torch

from megatron_fdd.host import rehearsal
from megatron_fdd.host.patches.adam import FusedAdam

STEPS = 5


def _parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 3), (7,), ())]


def _set_gradients(parameters: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("decoupled", "reference"), [(True, torch.optim.AdamW), (False, torch.optim.Adam)])
def test_equals_torch_also_after_a_reload(decoupled: bool, reference: type[torch.optim.Optimizer]) -> None:
    settings = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    ours, theirs, plains = _parameters(), _parameters(), _parameters()
    fused = FusedAdam(ours, **settings, adam_w_mode=decoupled)
    torchs, plain = reference(theirs, **settings, fused=True), reference(plains, **settings)
    for step in range(STEPS):
        if step == 2:
            saved = copy.deepcopy(fused.state_dict())
            fused = FusedAdam(ours, lr=7.0, adam_w_mode=decoupled)
            fused.load_state_dict(saved)
        _set_gradients(ours, step)
        _set_gradients(theirs, step)
        _set_gradients(plains, step)
        fused.step()
        torchs.step()
        plain.step()
        for our, their, wanted in zip(ours, theirs, plains, strict=True):
            assert torch.equal(our, their)
            torch.testing.assert_close(our, wanted, rtol=1e-5, atol=1e-6)
    assert fused.param_groups[0]["step"] == STEPS


def test_a_group_without_parameters_counts_no_step() -> None:
    fused = FusedAdam([{"params": []}, {"params": _parameters()}])
    _set_gradients(fused.param_groups[1]["params"], 0)
    fused.step()
    assert [group.get("step") for group in fused.param_groups] == [None, 1]


def test_megatron_takes_it_for_a_fused_one() -> None:
    rehearsal.start()
    assert megatron_optimizers.Adam is FusedAdam
    assert not megatron_optimizers.USING_PYTORCH_OPTIMIZER
    assert megatron_optimizers.distrib_optimizer.HAVE_APEX_OR_TE
