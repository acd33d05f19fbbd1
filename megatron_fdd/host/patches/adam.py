"""Adam in the form of apex and TransformerEngine, for machines without them: otherwise Megatron cannot resume.

Megatron 0.19.2 reads the step of a fused Adam from the param group. It reads the step of torch's Adam from each
parameter's state, where its distributed-optimizer checkpoints fail to find it when loading.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from megatron_fdd.host.patches.table import current, replace


class FusedAdam(torch.optim.Optimizer):
    """torch's fused Adam or AdamW, bit for bit, with one `step` for each param group."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
    ) -> None:
        """Take the arguments that Megatron passes; `capturable` (`--optimizer-cuda-graph`) must be False."""
        assert not capturable, "refused in megatron_fdd.plan.refusals"
        self.adam_w_mode = adam_w_mode
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # apex and TransformerEngine read this from a checkpoint of this class.
        defaults["bias_correction"] = True
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; a group without parameters counts no step."""
        assert closure is None, "Megatron's optimizers take no closure"
        for group in self.param_groups:
            if group["params"]:
                group["step"] = group.get("step", 0) + 1
                self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        params = [param for param in group["params"] if param.grad is not None]
        if not params:
            return
        states = [self._state(param) for param in params]
        # torch increments the step itself, in one number for each parameter, on the parameter's device.
        steps = torch.full((len(params),), float(group["step"] - 1), device=params[0].device).unbind()
        beta1, beta2 = group["betas"]
        adam(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            list(steps),
            fused=True,  # one kernel, without temporaries of the parameters' size
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            decoupled_weight_decay=self.adam_w_mode,
        )

    def _state(self, param: Tensor) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        return state


def install_adam() -> None:
    """Make Megatron use `FusedAdam` as apex's fused Adam, where it has neither apex nor TransformerEngine."""
    if not current("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER"):
        return
    replace("megatron.core.optimizer.Adam", FusedAdam)
    replace("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", False)
    replace("megatron.core.optimizer.distrib_optimizer.Adam", FusedAdam)
    replace("megatron.core.optimizer.distrib_optimizer.HAVE_APEX_OR_TE", True)
    replace("megatron.core.optimizer.distrib_optimizer.USING_APEX_OPTIMIZER", True)
