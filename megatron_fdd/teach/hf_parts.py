"""The parts of a causal language model of transformers, found by what runs, not by their names.

The layers are a list of the right length, the norm is what runs between the last layer and the head; the constant and
the kind of norm are measured. Nothing of it is believed: the model's own logits decide.

Shape letters: B rows, S sequence, T the model's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_fdd.data.store.lens import LARGEST_ERROR, StoredExtras, StoredNorm, relative_error
from megatron_fdd.losses.lens import FinalNorm
from megatron_fdd.teach.hf_norm import measure_norm, real_tensors
from megatron_fdd.teach.hf_run import first_tensor, in_one_line, input_device, run_without_head, tapped

# A text of this many tokens shows how a model is made; half of it, that it is causal.
_PROBE_TOKENS = 32
# Under these names a config has the cap of the logits.
_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# A logit this near to its cap says nothing about the constant.
_NEAR_CAP = 0.9
# A measured constant that is so near to a power of two is one.
_NEAR_POWER = 1e-3


@dataclass(frozen=True, slots=True)
class Parts:
    """How a model makes logits of its last layer's output h: cap(constant (W norm(h) + b)), cap(z) = c tanh(z / c).

    Attributes:
        layers: modules whose first output is the hidden state behind a block, in order.
        layers_name, norm_name, head_name: where they are in the model, for people.
        norm: without the constant.
        weight_name, raw_weight_T: the norm's weight as the model stores it; no name and ones where it has none.
        head: with or without a bias b.
        cap: None where there is none.
    """

    layers: Sequence[nn.Module]
    layers_name: str
    norm_name: str
    norm: StoredNorm
    weight_name: str
    raw_weight_T: Tensor
    head_name: str
    head: nn.Linear
    constant: float = 1.0
    cap: float | None = None

    @property
    def folded_norm(self) -> StoredNorm:
        """The norm with the constant in its weight and bias."""
        norm = self.norm
        bias_T = None if norm.bias_T is None else self.constant * norm.bias_T
        return StoredNorm(norm.kind, self.constant * norm.weight_T, bias_T, norm.epsilon)

    @property
    def head_VT(self) -> Tensor:
        """The head's weight."""
        return real_tensors(self.head)["weight"]

    @property
    def extras(self) -> StoredExtras:
        """The bias, times the constant, and the cap; on the CPU."""
        bias_V = real_tensors(self.head).get("bias")
        if bias_V is None or not bool(bias_V.any()):
            return StoredExtras(None, self.cap)
        return StoredExtras(self.constant * bias_V.float().cpu(), self.cap)

    def error(self, hidden_BST: Tensor, logits_BSV: Tensor) -> float:
        """Return how far the model's logits are from those of a student's lens, over the largest logit.

        Args:
            hidden_BST: output of the last layer.
            logits_BSV: the model's own.
        """
        ours_BSV = self._uncapped(hidden_BST)
        if self.cap is not None:
            ours_BSV = self.cap * torch.tanh(ours_BSV / self.cap)
        return relative_error(ours_BSV, logits_BSV.to(ours_BSV.device))

    def check_error(self, hidden_BST: Tensor, logits_BSV: Tensor) -> float:
        """Refuse a model whose logits are something else; return their error. Arguments as of `error`.

        Raises:
            ValueError: says how large the error is.
        """
        error = self.error(hidden_BST, logits_BSV)
        # Some models keep hidden states in float32, and round what goes on to a head in bfloat16.
        if not error <= max(LARGEST_ERROR[dtype] for dtype in (hidden_BST.dtype, self.head.weight.dtype)):
            raise ValueError(
                f"--teacher: its logits are not those of {self.norm_name} and {self.head_name} (they differ by "
                f"{error:.1e} of the largest): something else lies between, which a lens cannot do; choose "
                "another teacher (docs/teacher-types.md)"
            )
        return error

    def with_constant(self, hidden_BST: Tensor, logits_BSV: Tensor) -> Parts:
        """Return these parts with the constant between head and logits, measured by least squares."""
        ours_BSV = self._uncapped(hidden_BST).double()
        wanted_BSV = logits_BSV.to(ours_BSV)
        if self.cap is not None:
            counts_BSV = wanted_BSV.abs() < _NEAR_CAP * self.cap
            ours_BSV = ours_BSV.where(counts_BSV, 0)
            wanted_BSV = self.cap * torch.atanh((wanted_BSV / self.cap).where(counts_BSV, 0))
        finite_BSV = ours_BSV.isfinite() & wanted_BSV.isfinite()  # some models take ids away, with -inf
        ours_BSV, wanted_BSV = ours_BSV.where(finite_BSV, 0), wanted_BSV.where(finite_BSV, 0)
        constant = float((ours_BSV * wanted_BSV).sum() / (ours_BSV**2).sum().clamp(min=1e-300))
        power = 2.0 ** round(float(torch.tensor(max(constant, 1e-30)).log2()))
        return replace(self, constant=power if abs(constant / power - 1) < _NEAR_POWER else constant)

    def _uncapped(self, hidden_BST: Tensor) -> Tensor:
        """Return logits before the cap, float32: the features are rounded to the head's dtype, as a student's are."""
        head_VT, stored = self.head_VT, self.folded_norm
        place = head_VT.device
        bias_T = None if stored.bias_T is None else stored.bias_T.to(place)
        norm = FinalNorm(stored.weight_T.to(place), bias_T, stored.epsilon, stored.kind)
        logits_BSV = nn.functional.linear(norm(hidden_BST.to(place)).to(head_VT.dtype), head_VT).float()
        bias_V = self.extras.bias_V
        return logits_BSV if bias_V is None else logits_BSV + bias_V.to(place)


class _Run(NamedTuple):
    """A module that ran, what it was given first, and its first output."""

    module: nn.Module
    given: Tensor | None
    output: Tensor | None


@torch.no_grad()
def find_parts(model: Any) -> Parts:
    """Find a model's parts, and compare what they give with the model's own logits.

    Args:
        model: a causal language model of transformers.

    Raises:
        ValueError: the model is not made of layers, a norm and a linear head; says what it has.
    """
    text = model.config.get_text_config(decoder=True)
    head_name, head = _find_head(model)
    layers_name, layers = _find_layers(model, text.num_hidden_layers)
    ids_BS = torch.randint(
        head.out_features, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0)
    ).to(input_device(model))
    ran, logits_BSV = _run(model, layers, ids_BS)
    states = _states(layers, ran, (1, _PROBE_TOKENS, head.in_features))
    _check_causal(model, layers, ids_BS[:, : _PROBE_TOKENS // 2], states)
    norm_name, module = _find_norm(model, layers, head, ran)
    norm, weight, raw_T = measure_norm(module, norm_name, states[-1])
    cap = next((abs(float(found)) for name in _CAPS if (found := getattr(text, name, None))), None)
    parts = Parts(
        *(layers, layers_name, norm_name, norm, f"{norm_name}.{weight}" if weight else "", raw_T),
        *(head_name, head),
        cap=cap,
    )
    parts = parts.with_constant(states[-1], logits_BSV)
    parts.check_error(states[-1], logits_BSV)
    return parts


def _find_head(model: Any) -> tuple[str, nn.Linear]:
    """Find the layer that makes the logits. Refuse one that is not linear."""
    head = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is head), "")
    if not isinstance(head, nn.Linear) or head.weight.dtype not in LARGEST_ERROR:
        kind = type(head).__name__ if not isinstance(head, nn.Linear) else f"linear in {head.weight.dtype}"
        raise ValueError(
            f"--teacher: its head {name} is of the kind {kind}, and a lens needs a linear one in float32, bfloat16 or "
            "float16; keep the head out of the quantisation (modules_to_not_convert in config.json)"
        )
    return name, head


def _find_layers(model: Any, count: int) -> tuple[str, list[nn.Module]]:
    """Find the shallowest list of so many layers."""
    lists = [
        (name.count("."), name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len(set(module)) == count
    ]
    if not lists:
        raise ValueError(
            f"--teacher: a {type(model).__name__} has no list of {count} layers (num_hidden_layers of its "
            "config.json): choose another teacher (docs/teacher-types.md)"
        )
    _, name, layers = min(lists, key=lambda found: found[0])
    return name, layers


def _run(model: Any, layers: Sequence[nn.Module], ids_BS: Tensor) -> tuple[list[_Run], Tensor]:
    """Run the whole model; return what ran of it outside of its layers, and the logits."""
    inside = {module for layer in layers for module in layer.modules()} - set(layers)
    ran: list[_Run] = []

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        ran.append(_Run(module, first_tensor(given), first_tensor(output)))

    hooks = [module.register_forward_hook(keep) for module in model.modules() if module not in inside]
    try:
        with in_one_line(model, ids_BS):
            logits_BSV = model(input_ids=ids_BS).logits
    finally:
        for hook in hooks:
            hook.remove()
    return ran, logits_BSV


def _states(layers: Sequence[nn.Module], ran: Sequence[_Run], shape: tuple[int, ...]) -> list[Tensor]:
    """Return the layers' outputs. Refuse layers that run in another order, or give something else."""
    outputs = [run for run in ran if run.module in layers]
    if [run.module for run in outputs] != list(layers):
        raise ValueError(
            f"--teacher: its {len(layers)} layers do not run one after the other, each once "
            f"({len(outputs)} runs): choose another teacher (docs/teacher-types.md)"
        )
    states = []
    for run in outputs:
        if run.output is None or tuple(run.output.shape) != shape:
            found = "none" if run.output is None else list(run.output.shape)
            raise ValueError(
                f"--teacher: one of its layers gives {found} where a hidden state of the head's width is "
                f"{list(shape)}; several residual streams, or a projection before the head, have no lens: choose "
                "another teacher (docs/teacher-types.md)"
            )
        states.append(run.output)
    return states


def _check_causal(model: Any, layers: Sequence[nn.Module], ids_BS: Tensor, states: Sequence[Tensor]) -> None:
    """Refuse a model in which the beginning of a row depends on how the row goes on, which padding would change."""
    with tapped(layers) as found:
        run_without_head(model, ids_BS)
    length = ids_BS.shape[1]
    error = max(relative_error(mine, whole[:, :length]) for mine, whole in zip(found, states, strict=True))
    if not error <= LARGEST_ERROR[states[-1].dtype]:
        raise ValueError(
            f"--teacher: the states of a row's first tokens change by {error:.1e} when the row goes on: it is no "
            "causal model; set is_decoder in its config.json if it is one, or choose another teacher"
        )


def _find_norm(
    model: Any, layers: Sequence[nn.Module], head: nn.Module, ran: Sequence[_Run]
) -> tuple[str, nn.Module]:
    """Find the one module that does something between the last layer and the head."""
    order = [run.module for run in ran]
    if head not in order:
        raise ValueError(
            f"--teacher: a {type(model).__name__} makes its logits without its head: choose another teacher"
        )
    between = [
        run.module
        for run in ran[order.index(layers[-1]) + 1 : order.index(head)]
        if run.output is not None and not list(run.module.children()) and not _changes_nothing(run)
    ]
    names = {module: name for name, module in model.named_modules()}
    if len(between) != 1:
        found = ", ".join(f"{names[each]} ({type(each).__name__})" for each in between) or "no norm"
        raise ValueError(
            f"--teacher: between its last layer and its head runs {found}, and a lens is one norm and a linear head: "
            "choose another teacher (docs/teacher-types.md)"
        )
    return names[between[0]], between[0]


def _changes_nothing(run: _Run) -> bool:
    """Whether a module gave back what it got, as dropout does."""
    return run.given is not None and run.output is not None and torch.equal(run.given, run.output)
