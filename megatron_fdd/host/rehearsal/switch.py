"""The switch of the rehearsal: whether this process rehearses, and turning the rehearsal on."""

from __future__ import annotations

import importlib
import logging
import os
import queue
import sys
import warnings
from typing import Any

import torch
from torch.utils.data import dataloader

from megatron_fdd.host.patches.adam import install_adam
from megatron_fdd.host.patches.table import replace
from megatron_fdd.host.rehearsal import device

VARIABLE = "FDD_REHEARSE"

_NO_PINNED_MEMORY = "'pin_memory' argument is set as true but no accelerator is found"


def is_wanted() -> bool:
    """Whether this process rehearses: yes if torch sees no CUDA device.

    The environment's FDD_REHEARSE=1 or 0 overrides this.

    Raises:
        ValueError: FDD_REHEARSE is neither 1 nor 0.
    """
    asked = os.environ.get(VARIABLE, "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}={asked!r}: set 1 to rehearse on CPUs, 0 never to rehearse, or unset it")
    if asked:
        return asked == "1"
    # In a started rehearsal torch.cuda claims a device.
    return device.is_installed() or not torch.cuda.is_available()


def start() -> None:
    """Make Megatron's `cuda` mean `cpu` in this process, for good; later calls do nothing.

    It is best called before Megatron is imported, but works afterwards too.
    """
    if device.is_installed():
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _turn_compiler_off()
    _hide_gpu_packages()
    importlib.import_module("megatron_fdd.host.quiet")
    warnings.filterwarnings("ignore", message=_NO_PINNED_MEMORY)
    device.install()
    _stand_in_for_modules()


def _turn_compiler_off() -> None:
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:  # which has read the variable already
        torch.compiler.set_stance("force_eager")
    # torch's own imports the compiler even then, which takes half as long as torch and Megatron together.
    setattr(torch, "compile", _uncompiled)  # noqa: B010  # mypy refuses the assignment


def _uncompiled(model: Any = None, **_options: Any) -> Any:
    """Do what torch.compile does while the compiler is off: return the function, as a decorator with options too."""
    return (lambda function: function) if model is None else model


def _hide_gpu_packages() -> None:
    """Make GPU packages look as if they were not installed.

    Megatron uses their optimizers and norms wherever they can be imported.
    """
    for name in ("transformer_engine", "apex", "amp_C"):
        if name not in sys.modules:
            sys.modules[name] = None  # type: ignore[assignment]  # importing it is an ImportError


def _stand_in_for_modules() -> None:
    """Replace the parts that have no CPU form in Megatron 0.19.2."""
    from megatron_fdd.host.patches.norms import install_norms
    from megatron_fdd.host.rehearsal.attention import install_attention
    from megatron_fdd.host.rehearsal.experts import install_experts
    from megatron_fdd.host.rehearsal.gloo import install_gloo

    generator = "megatron.core.tensor_parallel.random"
    replace(f"{generator}._get_cuda_rng_state", device.rng_state)
    replace(f"{generator}._set_cuda_rng_state", device.set_rng_state)
    # It draws numbers from the one generator, which also makes the weights; how many depends on the layout.
    replace("megatron.training.initialize._warmup_jit_function", lambda **_options: None)
    # Megatron's own queue lives in a process that imports everything anew; add_flags drops --async-save.
    results_queue = "megatron.core.dist_checkpointing.strategies.filesystem_async._results_queue"
    replace(results_queue, queue.Queue())
    device.shield_from(dataloader._BaseDataLoaderIter, "__init__")
    # There is one generator here, so Megatron's check that the host's generator did not change must fail.
    logging.getLogger(generator).addFilter(lambda record: "CPU RNG state changed" not in str(record.msg))
    install_gloo()
    install_attention()
    install_norms()
    install_adam()
    install_experts()
