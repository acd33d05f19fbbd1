"""The runs of `teacher_store.py`, each in a process of its own: the real commands, with a part replaced by a watch."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.step_run import _be_one_rank, _everything_into
from benchmarks.teacher_store_turns import Alternation, Turns
from megatron_fdd.data.store.segment import segment_names, segment_path


@dataclass(frozen=True, slots=True)
class Job:
    """A run to watch.

    Attributes:
        words: of the command line, without the command.
        log: the file for what the run prints.
        block: batches, or steps, of one kind in a row.
        count: all batches or steps of the run.
    """

    words: Sequence[str]
    log: Path
    block: int
    count: int


@dataclass(frozen=True, slots=True)
class Held:
    """The memory of a producer: resident bytes before its loop and the most in it beyond them, and what it wrote."""

    before_bytes: int
    most_bytes: int
    batch_bytes: int
    segment_bytes: int
    store_bytes: int


def make_inputs(shape: Mapping[str, Any], folder: Path, log: Path) -> None:
    """Write a teacher, a student with random weights and random text, unless they exist."""
    if (folder / "text.idx").exists():
        return
    _be_one_rank()
    with log.open("a") as file, _everything_into(file):
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

        from megatron_fdd import convert

        folder.mkdir(parents=True, exist_ok=True)
        if shape["teacher_hf"] is None:
            write_teacher(shape, folder / "teacher-hf")
        else:
            shutil.copytree(shape["teacher_hf"], folder / "teacher-hf")
        config = AutoConfig.from_pretrained(folder / "teacher-hf", num_hidden_layers=shape["student_layers"])
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / "student-hf")
        AutoTokenizer.from_pretrained(folder / "teacher-hf").save_pretrained(folder / "student-hf")
        for name in ("teacher", "student"):
            convert.hf_to_mcore(folder / f"{name}-hf", folder / name)
        builder = IndexedDatasetBuilder(f"{folder / 'text'}.bin", dtype=np.int32)
        random = np.random.default_rng(1)
        most = (max(shape["units"]) + 2 * shape["count"] + 4 * shape["block"] + 2) * shape["seq_length"]
        for _ in range(-(-most // 1000)):
            ids = torch.from_numpy(random.integers(2, shape["vocab_size"], 1000))
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{folder / 'text'}.idx")


def write_teacher(shape: Mapping[str, Any], folder: Path) -> None:
    """Write a Llama with random weights, and a tokenizer with as many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["width"],
        intermediate_size=shape["ffn"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["groups"],
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(1)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(
        models.WordLevel({f"w{number}": number for number in range(shape["vocab_size"])}, unk_token="w0")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(folder)


def run_producer(job: Job) -> Alternation:
    """Run `fdd teach` with bare forward passes between its blocks of batches.

    Raises:
        RuntimeError: the run failed; the message ends with what it printed last.
    """
    from megatron_fdd.teach import __main__ as producer
    from megatron_fdd.teach import produce

    seen = Alternation()

    def watched(engine: Any, *arguments: Any, **keywords: Any) -> None:
        turns = Turns(engine, job.block, seen)
        with patch.object(produce, "_write", turns.write), patch.object(produce, "read_ids", turns.read_ids):
            turns.begin()
            produce.produce(turns, *arguments, **keywords)
            turns.end()

    with patch.object(producer, "produce", watched):
        _teach(job)
    return seen


def watch_memory(job: Job) -> Held:
    """Run `fdd teach` and watch its memory.

    Raises:
        RuntimeError: the run failed; the message ends with what it printed last.
    """
    from megatron_fdd.teach import __main__ as producer
    from megatron_fdd.teach.produce import produce as loop

    before, most = 0, 0

    def watched(*arguments: Any, **keywords: Any) -> None:
        nonlocal before, most
        ctypes.CDLL(None).malloc_trim(0)  # what loading the model has left
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes what is resident now
        before = _resident("VmRSS")
        loop(*arguments, **keywords)
        most = _resident("VmHWM") - before

    with patch.object(producer, "produce", watched):
        _teach(job)
    store = Path(job.words[list(job.words).index("--store") + 1])
    sizes = [segment_path(store, name).stat().st_size for name in segment_names(store)]
    return Held(before, most, sum(sizes) // job.count, max(sizes), sum(sizes))


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}")


def _teach(job: Job) -> None:
    """Run `fdd teach` in this process."""
    from megatron_fdd.host import rehearsal
    from megatron_fdd.teach import __main__ as producer

    _be_one_rank()
    with job.log.open("w") as log, _everything_into(log):
        if rehearsal.is_wanted():
            rehearsal.start()
        torch.set_num_threads(1)
        with patch.object(sys, "argv", ["teach", *job.words]):
            status = producer.main()
    _check(status, job.log)


def run_step(job: Job) -> Alternation:
    """Train with a store; every second block of steps gets features that lie in memory.

    Raises:
        RuntimeError: the run failed; the message ends with what it printed last.
    """
    import megatron.training.training as megatron_training

    from megatron_fdd import distill
    from megatron_fdd.data.store.taught import TaughtDataset
    from megatron_fdd.host import rehearsal
    from megatron_fdd.step.teacher.stored import StoredTeacher

    _be_one_rank()
    multiprocessing.set_start_method("fork", force=True)  # as under torchrun: for the loader's workers
    read, features, train_step = (
        TaughtDataset.__getitem__,
        StoredTeacher.features,
        megatron_training.train_step,
    )
    seconds: list[float] = []
    kept: list[Any] = []

    def is_stored(step: int) -> bool:
        return step // job.block % 2 == 0

    def sample(self: Any, index: int) -> Any:
        return read(self, index) if is_stored(index) else self._dataset[index]

    def served(self: Any, index: int, batch: Any) -> Any:
        if batch.teacher_features is None:
            return kept[0]
        kept[:] = [features(self, index, batch)]
        return kept[0]

    def timed(*arguments: Any, **keywords: Any) -> Any:
        started_s = time.perf_counter()
        try:
            return train_step(*arguments, **keywords)
        finally:
            seconds.append(time.perf_counter() - started_s)

    with job.log.open("w") as log, _everything_into(log):
        if rehearsal.is_wanted():
            rehearsal.start()
        torch.set_num_threads(1)
        with (
            patch.object(megatron_training, "train_step", timed),
            patch.object(TaughtDataset, "__getitem__", sample),
            patch.object(StoredTeacher, "features", served),
            patch.object(sys, "argv", ["distill", *job.words]),
        ):
            status = distill.main()
    _check(status, job.log)
    return _by_kind(job, seconds, is_stored)


def _by_kind(job: Job, seconds: Sequence[float], is_stored: Callable[[int], bool]) -> Alternation:
    """Part the steps, without the first block of either kind."""
    metrics = Path(job.words[list(job.words).index("--fdd-metrics-file") + 1])
    waits = [json.loads(line)["data_seconds"] for line in metrics.read_text().splitlines()]
    seen = Alternation()
    for step in range(2 * job.block, len(seconds)):
        (seen.ours if is_stored(step) else seen.bare).append(seconds[step])
        if is_stored(step):
            seen.waits.append(waits[step])
    return seen


def _check(status: int, log: Path) -> None:
    if status != 0:
        raise RuntimeError(f"a run ended with {status}:\n" + log.read_text()[-2000:])


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a teacher is a folder
