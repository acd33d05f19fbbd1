"""Every name of Megatron and torch that this package replaces at run time, and the one function that replaces it.

`PATCHES` is for every run, `REHEARSAL_PATCHES` only for runs on CPUs. Nothing else of them is replaced: `replace`
takes only listed names, and a test compares both tables with what live runs have changed. The tables are plain data:
importing this module imports neither torch nor Megatron.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

WRITTEN_FOR = "megatron-core 0.19.2"


@dataclass(frozen=True, slots=True)
class Patch:
    """One name that is replaced.

    Attributes:
        target: dotted name of the attribute of a module or a class.
        when: the condition under which it is replaced.
        why: what a run would lack without it.
        until: the condition under which it stays necessary.
        installed_by: our function, as `module.function` below `megatron_fdd`.
    """

    target: str
    when: str
    why: str
    until: str
    installed_by: str


_TRAINING = "megatron.training.training"
_OPTIMIZER = "megatron.core.optimizer"
_DISTRIBUTED = f"{_OPTIMIZER}.distrib_optimizer"
_NO_ADAM = "without apex and TransformerEngine"
_LOCAL = "`--transformer-impl local`, and while a conversion builds a model"
_STEPPED = "while Megatron reads the step of torch's Adam where its distributed checkpoints do not store it"
_LOCAL_NORM = "while `WrappedTorchNorm` refuses sequence parallelism and zero-centred weights"


def _adam(name: str, why: str) -> Patch:
    return Patch(name, _NO_ADAM, why, _STEPPED, "host.patches.adam.install_adam")


PATCHES: tuple[Patch, ...] = (
    Patch(
        f"{_TRAINING}.get_forward_backward_func",
        "always, while training",
        "Runs the teacher before the student's schedule, and adds the terms of all stages to what is logged.",
        "while the training loop takes no schedule as an argument",
        "step.schedule.installed",
    ),
    Patch(
        f"{_TRAINING}.training_log",
        "always, while training",
        "Writes an iteration's terms to the metrics file, with the gradient's norm, which is known only there.",
        "while the training loop has no callback after the optimizer's step",
        "step.schedule.installed",
    ),
    Patch(
        f"{_TRAINING}.evaluate",
        "always, while training",
        "Averages each term of a validation over its own tokens; Megatron would weigh all alike.",
        "while the training loop averages all terms of a validation over one count of tokens",
        "step.schedule.installed",
    ),
    Patch(
        f"{_TRAINING}.evaluate_and_print_results",
        "always, while training",
        "Writes the means of a validation to the metrics file.",
        "while the training loop has no callback after an evaluation",
        "step.schedule.installed",
    ),
    Patch(
        f"{_TRAINING}.save_checkpoint",
        "always, while training",
        "Refuses weights that are not finite, writes file sums beside a checkpoint's files, and says on the terminal "
        "that it has been saved.",
        "while the training loop has no callback before and after a save",
        "step.schedule.installed",
    ),
    Patch(
        "megatron.training.checkpointing.schedule_async_save",
        "always, while training",
        "With `--async-save` the file sums are written when the files are there.",
        "while a save in the background has no callback at its end",
        "step.schedule.installed",
    ),
    Patch(
        "megatron.training.datasets.data_samplers.MegatronFullValidationSampler",
        "always, while training",
        "`--full-validation` reads every sample once; Megatron's reads some twice where ranks have unequal numbers.",
        "while Megatron's validation steps begin its samples again",
        "data.full_validation.installed",
    ),
    Patch(
        f"{_TRAINING}.build_pretraining_data_loader",
        "always, while training",
        "With `--fdd-teacher-store` the loaders read features into memory that is used again, a step ahead, also "
        "without workers.",
        "while Megatron's loaders take no function that makes a batch of samples, and read nothing ahead without "
        "workers",
        "data.store.loader.installed",
    ),
    Patch(
        f"{_TRAINING}.load_checkpoint",
        "always, while training",
        "Resumes an optimizer at another `--lr` or `--min-lr` than it was saved with, if a flag asks for that.",
        "while Megatron looks for a saved group of parameters by its learning rates",
        "host.patches.rates.resumed_rates",
    ),
    _adam(f"{_OPTIMIZER}.Adam", "Megatron builds our Adam, which has one step for a param group."),
    _adam(f"{_OPTIMIZER}.USING_PYTORCH_OPTIMIZER", "Megatron gives it the arguments of a fused Adam."),
    _adam(f"{_DISTRIBUTED}.Adam", "The distributed optimizer knows our Adam as its own."),
    _adam(
        f"{_DISTRIBUTED}.HAVE_APEX_OR_TE",
        "The distributed optimizer saves and loads the step by param group.",
    ),
    _adam(
        f"{_DISTRIBUTED}.USING_APEX_OPTIMIZER",
        "It takes our Adam's step for apex's, the same in every param group.",
    ),
    Patch(
        "torch.distributed.checkpoint.filesystem.pickle",
        "always, without `--fdd-trust-checkpoint`",
        "The index of a checkpoint is read by an unpickler that makes listed classes only, so that it runs no code.",
        "while torch unpickles the index without a limit",
        "host.unpickling.restrict_unpickling",
    ),
    Patch(
        "torch._weights_only_unpickler._get_allowed_globals",
        "always, without `--fdd-trust-checkpoint`",
        "Objects of a checkpoint hold plain tensors only: torch follows a quantised one to memory outside of the file.",
        "while torch's restricted unpickler makes tensors that no checkpoint of Megatron holds",
        "host.unpickling.restrict_unpickling",
    ),
    Patch(
        "megatron.core.datasets.utils.compile_helpers",
        "Megatron from a wheel, which has the built helpers and no Makefile",
        "Megatron would run `make` at start, and end the process where that fails.",
        "while a wheel lacks the Makefile that its training loop runs",
        "host.patches.helpers.use_built_helpers",
    ),
    Patch(
        "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
        _LOCAL,
        "Local norms are ours, which take sequence parallelism and zero-centred weights.",
        _LOCAL_NORM,
        "host.patches.norms.install_norms",
    ),
    Patch(
        "megatron.core.transformer.transformer_block.LayerNormImpl",
        _LOCAL,
        "The final norm is of the same kind; beside apex or TransformerEngine it would be theirs.",
        _LOCAL_NORM,
        "host.patches.norms.install_norms",
    ),
)


def _on_cpus(target: str, why: str, installed_by: str) -> Patch:
    return Patch(target, "in a rehearsal on CPUs", why, "while Megatron has no CPU form of it", installed_by)


_RANDOM = "megatron.core.tensor_parallel.random"
_MAPPINGS = "megatron.core.tensor_parallel.mappings"
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
_STAND_INS, _EXPERTS = "host.rehearsal.switch.start", "host.rehearsal.experts.install_experts"

REHEARSAL_PATCHES: tuple[Patch, ...] = (
    _on_cpus(f"{_RANDOM}._get_cuda_rng_state", "There is one random state, the host's.", _STAND_INS),
    _on_cpus(f"{_RANDOM}._set_cuda_rng_state", "There is one random state, the host's.", _STAND_INS),
    _on_cpus(
        "megatron.training.initialize._warmup_jit_function",
        "It would draw from the generator that makes the weights.",
        _STAND_INS,
    ),
    _on_cpus(
        "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue",
        "Megatron's own is served by another process, which would import everything anew.",
        _STAND_INS,
    ),
    _on_cpus(
        "megatron.core.models.backends.LocalSpecProvider.core_attention",
        "Local attention takes context parallelism and packed sequences.",
        "host.rehearsal.attention.install_attention",
    ),
    _on_cpus(f"{_DISPATCHER}.maybe_move_tensor_to_cpu", "Sizes are on the host already.", _EXPERTS),
    _on_cpus(f"{_MAPPINGS}._gather_along_first_dim", "gloo gathers parts of equal size only.", _EXPERTS),
    _on_cpus(
        f"{_MAPPINGS}._reduce_scatter_along_first_dim", "gloo scatters parts of equal size only.", _EXPERTS
    ),
)


def replace(target: str, stand_in: Any) -> Any:
    """Set an attribute of Megatron, and return its earlier value.

    Args:
        target: one of the tables' names.

    Raises:
        ValueError: this Megatron has no such name.
    """
    listed = {patch.target for patch in PATCHES + REHEARSAL_PATCHES}
    assert target in listed, f"{target} is in no table of host/patches/table.py: list it there first"
    owner, name = _owner(target)
    before = vars(owner)[name]
    setattr(owner, name, stand_in)
    return before


@contextmanager
def replaced(stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Apply `replace` inside a `with` statement, and undo it at the end. ValueError as in `replace`."""
    with ExitStack() as stack:
        for target, stand_in in stand_ins.items():
            stack.callback(replace, target, replace(target, stand_in))
        yield


def current(target: str) -> Any:
    """Return what Megatron has under this name now. ValueError if this Megatron has no such name."""
    owner, name = _owner(target)
    return getattr(owner, name)


def _owner(target: str) -> tuple[Any, str]:
    """Return the module or class that has a name, and the last part of the name."""
    path, _, name = target.rpartition(".")
    owner = _find(path)
    if owner is None or name not in vars(owner):
        raise ValueError(
            f"this Megatron has no {target}, which megatron_fdd replaces: it was written for {WRITTEN_FOR}; "
            "install that version"
        )
    return owner, name


def _find(path: str) -> Any:
    """Return a module, or a class in one; None if there is neither."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # Megatron has the module, but one of its own imports is missing
    module, _, name = path.rpartition(".")
    return getattr(_find(module), name, None) if module else None
