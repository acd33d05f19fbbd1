"""The runs of `teacher_store.py`, each in a process of its own: the real commands, with a part replaced by a watch."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from benchmarks.step_run import _be_one_rank, _everything_into
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


@dataclass(slots=True)
class Alternation:
    """Seconds of the watched work and of the bare work, by turns: of blocks of batches, or of steps.

    Attributes:
        waits: seconds that each step of the watched kind waited for its data.
        parts: seconds of parts of the watched work, all blocks together.
    """

    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Held:
    """The memory of a producer: resident bytes before its loop and the most in it beyond them, and what it wrote."""

    before_bytes: int
    most_bytes: int
    batch_bytes: int
    segment_bytes: int
    store_bytes: int


def make_inputs(shape: Mapping[str, Any], folder: Path, log: Path) -> None:
    """Write models with random weights as Hugging Face folders and checkpoints, and random text, unless they exist."""
    if (folder / "text.idx").exists():
        return
    _be_one_rank()
    with log.open("a") as file, _everything_into(file):
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

        from megatron_fdd import convert

        folder.mkdir(parents=True, exist_ok=True)
        vocabulary = {f"w{number}": number for number in range(shape["vocab_size"])}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        for name, layers in (("teacher", shape["layers"]), ("student", shape["student_layers"])):
            config = LlamaConfig(
                vocab_size=shape["vocab_size"],
                hidden_size=shape["width"],
                intermediate_size=shape["ffn"],
                num_hidden_layers=layers,
                num_attention_heads=shape["heads"],
                num_key_value_heads=shape["groups"],
                max_position_embeddings=2048,
                tie_word_embeddings=True,
            )
            torch.manual_seed(layers)
            hf = folder / f"{name}-hf"
            LlamaForCausalLM(config).to(torch.float32).save_pretrained(hf)
            PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w1").save_pretrained(
                hf
            )
            convert.hf_to_mcore(hf, folder / name)
        builder = IndexedDatasetBuilder(f"{folder / 'text'}.bin", dtype=np.int32)
        random = np.random.default_rng(1)
        most = (max(shape["units"]) + 2 * shape["count"] + 4 * shape["block"] + 2) * shape["seq_length"]
        for _ in range(-(-most // 1000)):
            ids = torch.from_numpy(random.integers(2, shape["vocab_size"], 1000))
            builder.add_document(ids, [len(ids)])
        builder.finalize(f"{folder / 'text'}.idx")


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


class Turns:
    """An engine that stands for another, and runs each block of batches through the bare model beforehand.

    While the bare model runs nothing is written: what the store's thread has begun is waited for, in the producer's
    time.
    """

    def __init__(self, engine: Any, block: int, seen: Alternation) -> None:
        from megatron_fdd.teach import produce

        self._engine, self._block, self._seen = engine, block, seen
        self._write, self._read_ids = produce._write, produce.read_ids
        self._writing = threading.Lock()
        self._count, self._started_s = 0, 0.0
        self._parts = dict.fromkeys(("ids", "states", "writing, beside it"), 0.0)
        seen.parts = self._parts

    def __getattr__(self, name: str) -> Any:
        """Return what the engine has."""
        return getattr(self._engine, name)

    def begin(self) -> None:
        """Start the clock of the producer's first block."""
        self._started_s = time.perf_counter()

    def end(self) -> None:
        """Stop the clock, when all is written."""
        self._seen.ours.append(time.perf_counter() - self._started_s)

    def states(self, units: Any) -> Any:
        """Run a batch; before the first one of a block, run the bare model on as many."""
        if self._count % self._block == 0:
            self._turn(units)
        self._count += 1
        with self._timed("states"):
            return self._engine.states(units)

    def write(self, *arguments: Any) -> None:
        """Write a batch, unless the bare model runs."""
        with self._writing, self._timed("writing, beside it"):
            self._write(*arguments)

    def read_ids(self, *arguments: Any) -> Any:
        """Read the ids of a unit."""
        with self._timed("ids"):
            return self._read_ids(*arguments)

    def _turn(self, units: Any) -> None:
        with self._writing:
            if self._count:
                self._seen.ours.append(time.perf_counter() - self._started_s)
            run = bare_pass(self._engine, units)
            if not self._count:
                run()  # creates what is created only once
            started_s = time.perf_counter()
            for _ in range(self._block):
                run()
            self._seen.bare.append(time.perf_counter() - started_s)
        self._started_s = time.perf_counter()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self._parts[part] += time.perf_counter() - started_s


def bare_pass(engine: Any, units: Any) -> Callable[[], object]:
    """Return what runs the layers of an engine's model on some units: no head, nothing kept."""
    from megatron_fdd.teach.megatron import MegatronEngine

    if isinstance(engine, MegatronEngine):
        from megatron_fdd.data.batch import get_batch
        from megatron_fdd.step.taps import forward_with_taps, stop_before_head

        [sample] = engine._samples(units)
        batch = get_batch(iter([sample]), torch.cuda.current_device())
        run = torch.no_grad()(forward_with_taps)
        return lambda: run(engine._model, batch, [], stop_before_head)
    from megatron_fdd.teach.hf_run import run_without_head

    rows = torch.from_numpy(np.stack(units).astype(np.int64))
    return lambda: torch.no_grad()(run_without_head)(engine._model, rows)


def watch_memory(job: Job) -> Held:
    """Run `fdd teach` and watch its memory.

    Raises:
        RuntimeError: the run failed; the message ends with what it printed last.
    """
    from megatron_fdd.teach import __main__ as producer

    loop = producer.produce
    before, most = 0, 0

    def watched(*arguments: Any, **keywords: Any) -> None:
        nonlocal before, most
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
