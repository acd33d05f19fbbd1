"""`cuda` means `cpu`: device arguments of torch's functions, and the state functions of torch.cuda."""

from __future__ import annotations

import collections
import contextlib
import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
# An H100's: recipes for it are the ones rehearsed, and Megatron asks for
# CUDA_DEVICE_MAX_CONNECTIONS=1 below 10 only.
_CAPABILITY = (9, 0)


class Stream:
    """A stream on which everything has happened already; there is one, so that all compare equal."""

    cuda_stream = 0
    device = _CPU

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream)

    def __hash__(self) -> int:
        return 0

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_exception: object) -> None: ...

    def synchronize(self) -> None: ...

    def wait_stream(self, _stream: Stream) -> None: ...

    def wait_event(self, _event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def query(self) -> bool:
        return True


class Event:
    """An event that has passed."""

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def record(self, _stream: Stream | None = None) -> None: ...

    def wait(self, _stream: Stream | None = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _end: Event) -> float:
        return 0.0


class CpuDevices(TorchFunctionMode):
    """Sends every tensor that is asked for on a CUDA device to the CPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if kwargs:
            if _is_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
        if (stand_in := _METHODS.get(func)) is not None:
            return stand_in(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _is_cuda(device: Any) -> bool:
    """Whether a device argument names a CUDA device: `"cuda:1"`, a torch.device, or an ordinal."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and _is_cuda(args[0]):
        args = (_CPU, *args[1:])
    return tensor.to(*args, **kwargs)


def _type(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Megatron's optimizers sort parameters by names such as `torch.cuda.FloatTensor`."""
    answer = tensor.type(*args, **kwargs)
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) else answer


def _keep_mode_on(run: Callable[..., Any]) -> Callable[..., Any]:
    """torch turns a mode off inside the function that it intercepts, here all of a backward pass."""

    def run_with_mode(*args: Any, **kwargs: Any) -> Any:
        with _INSTALLED:
            return run(*args, **kwargs)

    return run_with_mode


def _same(tensor: torch.Tensor, *_args: Any, **_options: Any) -> torch.Tensor:
    return tensor


_METHODS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.Tensor.to: _to,
    torch.Tensor.type: _type,
    torch.Tensor.cuda: _same,
    torch.Tensor.pin_memory: _same,
    torch.Tensor.record_stream: _same,
}


def rng_state(*_device: Any, **_options: Any) -> torch.Tensor:
    """The state of the only generator there is, the host's."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, *_device: Any, **_options: Any) -> None:
    """Set the state of the only generator there is, the host's."""
    torch.set_rng_state(state)


def shield_from(owner: type, name: str) -> None:
    """Make a method of host code draw nothing from the generator, which on GPUs is another one.

    torch's data loaders draw a seed when iterated: a resumed run would drop other activations.
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
    """A function of its own for each name: torch.compile refuses one object with two of torch's names."""
    return lambda *_args, **_options: value


def _properties(*_device: Any) -> SimpleNamespace:
    major, minor = _CAPABILITY
    return SimpleNamespace(
        name="cpu", major=major, minor=minor, total_memory=_host_bytes(), multi_processor_count=1
    )


def _host_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cuda_state() -> dict[str, Any]:
    """The attributes of torch.cuda that Megatron reads or calls."""
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


_INSTALLED = CpuDevices()
_installed = False


def is_installed() -> bool:
    """Whether `install` has run in this process (or in the one it was forked from)."""
    return _installed


def install() -> None:
    """Replace the state functions of torch.cuda and enter the mode, for the life of this thread."""
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
    torch.autograd._engine_run_backward = _keep_mode_on(torch.autograd._engine_run_backward)
    _INSTALLED.__enter__()
