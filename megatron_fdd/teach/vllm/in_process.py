"""vLLM in this process, where it is installed: the same files, in a folder of its own."""

from __future__ import annotations

import importlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.segment import Bytes
from megatron_fdd.teach.vllm.checks import Expected, check_version
from megatron_fdd.teach.vllm.settings import CONNECTOR, VllmSettings
from megatron_fdd.teach.vllm.source import Answer, Finish, own_logprobs
from megatron_fdd.teach.vllm.state_file import StateFiles

SHARED_MEMORY = Path("/dev/shm")
# What torchrun tells its processes, which vLLM's own would take for theirs.
_LAUNCH = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def is_installed() -> bool:
    """Whether there is a vLLM here."""
    return importlib.util.find_spec("vllm") is not None


def own_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder in memory for the files of this process."""
    place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
    return tempfile.TemporaryDirectory(prefix="fdd-teach-", dir=place)


class LocalSource:
    """vLLM's `LLM`, on all GPUs that this process sees; what `Source` says.

    Raises:
        ValueError: it cannot be started.
    """

    source = "--engine vllm"

    def __init__(self, settings: VllmSettings) -> None:
        self.version, self.max_model_len = "", settings.max_model_len
        self._files = StateFiles(settings.folder, threading.Event())
        try:
            vllm: Any = importlib.import_module("vllm")
            self.version, self._sampling = str(vllm.__version__), vllm.SamplingParams
        except Exception as error:  # of any part of vLLM
            raise self._failure(error) from error
        check_version(self.version, self.source)
        try:
            with _as_alone(is_long=settings.is_long):
                self._llm: Any = vllm.LLM(
                    model=str(settings.teacher),
                    dtype=settings.dtype,
                    max_model_len=settings.max_model_len,
                    enable_prefix_caching=False,
                    tensor_parallel_size=max(torch.cuda.device_count(), 1),
                    speculative_config=settings.speculative_config,
                    kv_transfer_config=settings.kv_transfer_config,
                )
        except Exception as error:
            raise self._failure(error) from error

    def ask(
        self, units: Sequence[Ids], expected: Expected, compared: Collection[int], finish: Finish
    ) -> list[Bytes]:
        """Run all units together; what `Source.ask` says."""
        wanted = [
            self._sampling(max_tokens=1, temperature=0.0, prompt_logprobs=0 if number in compared else None)
            for number in range(len(units))
        ]
        prompts = [{"prompt_token_ids": ids.tolist()} for ids in units]
        results = self._llm.generate(prompts, wanted, use_tqdm=False)
        return [
            self._finished(result, ids, expected, number in compared, finish)
            for number, (ids, result) in enumerate(zip(units, results, strict=True))
        ]

    def _failure(self, error: Exception) -> ValueError:
        said = " ".join(str(error).split())
        return ValueError(
            f"{self.source}: vLLM {self.version} does not start here ({type(error).__name__}: {said}); start a server "
            "in the way that suits this machine (--dry-run prints the command), and give --url"
        )

    def _finished(
        self, result: Any, ids: Ids, expected: Expected, is_compared: bool, finish: Finish
    ) -> Bytes:
        told = (result.kv_transfer_params or {}).get("hidden_states_path")
        if told is None:
            raise ValueError(
                f"{self.source}: vLLM {self.version} gives no hidden states: {CONNECTOR} is not there; install another "
                "version"
            )
        try:
            expected.check_ids(list(result.prompt_token_ids), ids)
            states_SLT = expected.states(self._files.read(told), ids)
            logprobs = own_logprobs(result.prompt_logprobs, ids, self.source) if is_compared else None
            return finish(Answer(ids, states_SLT, logprobs))
        finally:
            self._files.remove(told)


@contextmanager
def _as_alone(*, is_long: bool) -> Iterator[None]:
    """Hide torchrun's environment from the processes that vLLM starts."""
    before = dict(os.environ)
    for name in [*_LAUNCH, *(name for name in before if name.startswith("TORCHELASTIC_"))]:
        os.environ.pop(name, None)
    if is_long:
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
