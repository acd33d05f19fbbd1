"""The redirection of `cuda` to `cpu`: device arguments of torch's functions, state functions of torch.cuda."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

_CPU = torch.device("cpu")
# That of an H100, because recipes for it are rehearsed; and below 10 Megatron asks for
# CUDA_DEVICE_MAX_CONNECTIONS=1.
_CAPABILITY = (9, 0)


class Stream:
    """A stream on which everything has happened already; all compare equal, as if there were one."""

    cuda_stream = 0
    device = _CPU

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """Return the lowest and the highest priority, which are the same."""
        return 0, 0

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_exception: object) -> None: ...

    def synchronize(self) -> None:
        """Return at once: nothing is pending."""

    def wait_stream(self, _stream: Stream) -> None:
        """Return at once: nothing is pending."""

    def wait_event(self, _event: Event) -> None:
        """Return at once: nothing is pending."""

    def record_event(self, event: Event | None = None) -> Event:
        """Return `event`, or a new one."""
        return event or Event()

    def query(self) -> bool:
        """Whether everything has happened: always."""
        return True


class Event:
    """An event that has passed already."""

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def record(self, _stream: Stream | None = None) -> None:
        """Do nothing: the event has passed already."""

    def wait(self, _stream: Stream | None = None) -> None:
        """Return at once: the event has passed already."""

    def synchronize(self) -> None:
        """Return at once: the event has passed already."""

    def query(self) -> bool:
        """Whether everything has happened: always."""
        return True

    def elapsed_time(self, _end: Event) -> float:
        """Return 0: events take no time."""
        return 0.0


Function = Callable[..., Any]


def _on_cpu(function: Function) -> Function:
    """Wrap `function` so that a CUDA device given by name is the CPU, and no memory is pinned."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        return function(*args, **kwargs)

    return call


def _is_cuda(device: Any) -> bool:
    """Whether a device argument names a CUDA device: `"cuda:1"`, a torch.device, or an ordinal."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _first_on_cpu(to: Function) -> Function:
    """Wrap `Tensor.to`, which also takes the device as its first argument."""
    to = _on_cpu(to)

    @functools.wraps(to)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        return to(tensor, *args, **kwargs)

    return call


def _named_for_cuda(tensor_type: Function) -> Function:
    """Wrap `Tensor.type` so that it returns CUDA names.

    Megatron's optimizers sort parameters by names such as `torch.cuda.FloatTensor`.
    """

    @functools.wraps(tensor_type)
    def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = tensor_type(tensor, *args, **kwargs)
        return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer

    return call


def _same(tensor: torch.Tensor, *_args: Any, **_options: Any) -> torch.Tensor:
    return tensor


# Functions that take a device but are not in torch's list of constructors.
_OTHERS = "from_file normal"
_LIKE = "empty_like full_like ones_like rand_like randint_like randn_like zeros_like"
_NEW = "new_empty new_empty_strided new_full new_ones new_tensor new_zeros"


def _redirect_tensors() -> None:
    """Make every function and method that makes a tensor on a chosen device make it on the CPU.

    They are replaced one by one: a `TorchFunctionMode` would do the same in three lines, but every call of torch
    would pay for it, a quarter to a half of a small model's time.
    """
    # torch's own list, made for `with torch.device(...)`. torch caches its first answer, so ask before torch's
    # functions are replaced. Also compute it anew, because the cached one may come from a time when somebody else
    # had replaced them (transformers replaces `linspace` while it makes a model).
    constructors = {*_device_constructors(), *_device_constructors.__wrapped__()}
    for module in (torch, torch.fft, torch.nested):
        for name, function in list(vars(module).items()):
            if callable(function) and function in constructors:
                setattr(module, name, _on_cpu(function))
    for owner, names in ((torch, _OTHERS), (torch, _LIKE), (torch.Tensor, _NEW)):
        for name in names.split():
            setattr(owner, name, _on_cpu(getattr(owner, name)))
    tensor = torch.Tensor
    stand_ins: dict[str, Function] = {
        "to": _first_on_cpu(tensor.to),
        "type": _named_for_cuda(tensor.type),
        **dict.fromkeys(("cuda", "pin_memory", "record_stream"), _same),
    }
    for name, stand_in in stand_ins.items():
        setattr(tensor, name, stand_in)


def rng_state(*_device: Any, **_options: Any) -> torch.Tensor:
    """Return the state of the only generator there is, the host's."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *_device: Any, **_options: Any) -> None:
    """Set the state of the only generator there is, the host's."""
    torch.set_rng_state(state)


def shield_from(owner: type, name: str) -> None:
    """Make a method of host code leave the generator unchanged; on GPUs host code has a generator of its own.

    torch's data loaders draw a seed when iterated; without this, a resumed run would drop other activations.
    """
    method = getattr(owner, name)

    @functools.wraps(method)
    def shielded(*args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        try:
            return method(*args, **kwargs)
        finally:
            torch.set_rng_state(state)

    setattr(owner, name, shielded)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _always(value: Any) -> Callable[..., Any]:
    """Return a new function that returns `value`; torch.compile refuses one object under two of torch's names."""
    return lambda *_args, **_options: value


def _properties(*_device: Any) -> SimpleNamespace:
    major, minor = _CAPABILITY
    return SimpleNamespace(
        name="cpu", major=major, minor=minor, total_memory=_host_bytes(), multi_processor_count=1
    )


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cuda_state() -> dict[str, Any]:
    """Return the attributes of torch.cuda that Megatron reads or calls."""
    count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    no_bytes = (
        "memory_allocated max_memory_allocated memory_reserved max_memory_reserved "
        "utilization temperature power_draw clock_rate"
    )
    no_effect = (
        "set_device synchronize empty_cache ipc_collect set_stream reset_peak_memory_stats "
        "reset_max_memory_allocated reset_accumulated_memory_stats _lazy_init init check_error"
    )
    return {
        **{name: _always(0) for name in no_bytes.split()},
        **{name: _always(None) for name in no_effect.split()},
        "is_available": _always(True),
        "is_bf16_supported": _always(True),
        "is_current_stream_capturing": _always(False),
        "device_count": _always(count),
        "current_device": _always(_CPU),
        "get_device_name": _always("cpu"),
        "get_device_capability": _always(_CAPABILITY),
        "get_device_properties": _properties,
        "mem_get_info": lambda *_device: (_host_bytes(), _host_bytes()),
        "memory_stats": lambda *_device: collections.Counter(),
        "memory_summary": _always(""),
        "Stream": Stream,
        "Event": Event,
        "current_stream": _always(Stream()),
        "default_stream": _always(Stream()),
        "stream": _always(contextlib.nullcontext()),
        "device": _always(contextlib.nullcontext()),
        "default_generators": (torch.default_generator,) * count,
        "get_rng_state": rng_state,
        "set_rng_state": set_rng_state,
        "get_rng_state_all": lambda: [rng_state()],
        "set_rng_state_all": lambda states: set_rng_state(states[0]),
        "manual_seed": _seed,
        "manual_seed_all": _seed,
        "_lazy_call": lambda function, **_options: function(),
    }


_installed = False


def is_installed() -> bool:
    """Whether `install` has run in this process (or in the one it was forked from)."""
    return _installed


def install() -> None:
    """Replace the state functions of torch.cuda and the functions that make tensors, for the life of this process."""
    global _installed
    _installed = True
    for name, stand_in in _cuda_state().items():
        # torch.cuda's functions live in submodules that Megatron also calls by their own name.
        for module in (torch.cuda, torch.cuda.random, torch.cuda.memory):
            if hasattr(module, name):
                setattr(module, name, stand_in)
    for name in ("range_push", "range_pop", "mark"):
        setattr(torch.cuda.nvtx, name, _always(None))
    torch.accelerator.is_available = _always(False)  # or the data loader would pin memory
    _redirect_tensors()
