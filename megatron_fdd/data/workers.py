"""Processes that tokenise: how many are worth starting, and their results, in order.

This module, and with it a worker, imports neither torch nor Megatron: a worker is ready after one second of CPU
time instead of six. Workers are spawned, not forked. Their parent has imported torch and runs threads (the
tokenizer's, the progress bar's, the pool's own); a fork would have one of these threads, and the locks of all. A
fork server would share one import among all workers, but there is only one for the whole program, with whatever was
imported there first, and it outlives the pool; it would save less than a second of CPU time for 4 MB of input.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

from megatron_fdd.data.documents import RawDocument
from megatron_fdd.data.encode import EncodedDocument, Encoder
from megatron_fdd.data.streams import about_bytes
from megatron_fdd.data.tokenizer import PROBE

# Large enough that handing over a batch costs nothing compared with encoding it.
_BATCH_BYTES = 64 * 1024
_BATCH_DOCUMENTS = 512
# Batches in flight for each worker: reading stays ahead of encoding, and the corpus is not read into memory.
_AHEAD = 4
# A worker takes 0.9 s of CPU time to start and 1.7 s to encode this (benchmarks/LOG.md, "preparing data").
BYTES_OF_A_WORKER = 4 * 1024 * 1024
# More workers would only wait for each other.
_WORKERS_A_CORE = 4

EncodedBatch = tuple[int, list[EncodedDocument]]


def useful_workers(asked: int, inputs: Sequence[str]) -> int:
    """Return how many of the requested workers have enough to do; with 1, the parent encodes by itself.

    An input without a size (a pipe) may be long, so then it is all of them. The pool starts workers one by one, as
    batches come.
    """
    most = min(asked, _WORKERS_A_CORE * (os.cpu_count() or 1))
    if not all(os.path.isfile(path) for path in inputs):
        return most
    # A compressed file counts as the text in it, because a worker has to encode the text.
    return max(1, min(most, sum(map(about_bytes, inputs)) // BYTES_OF_A_WORKER))


def _batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.content)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encode_in_order(
    documents: Iterable[RawDocument], encoder: Encoder, workers: int, *, past_refusals: bool
) -> Iterator[EncodedBatch]:
    """Yield the bytes consumed and the encoded documents of each batch, in the order of the documents.

    Closed before its end, as after a refusal, it ends its workers in the middle of what they encode.

    Args:
        past_refusals: whether a batch goes on after a document that is refused, or ends with it.

    Raises:
        ValueError: a worker died.
    """
    batches = _batches(documents)
    if workers == 1:
        for batch in batches:
            yield _encode_batch(encoder, batch, past_refusals)
        return
    context = multiprocessing.get_context("spawn")
    # `ended` is open in this process alone: its closing tells the workers.
    end, ended = context.Pipe(duplex=False)
    # Not multiprocessing.Pool: it reads the whole corpus ahead, and hangs when a worker dies.
    pool = ProcessPoolExecutor(workers, context, _start_worker, (_pickled(encoder), end))
    pending: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_encode_in_worker, batch, past_refusals))
            if len(pending) >= workers * _AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker process died, most likely because memory ran out; try fewer --workers"
        ) from error
    finally:
        ended.close()
        pool.shutdown(wait=True, cancel_futures=True)
        end.close()


def _encode_batch(encoder: Encoder, batch: list[RawDocument], past_refusals: bool) -> EncodedBatch:
    encoded: list[EncodedDocument] = []
    for document in batch:
        encoded.append(encoder(document))
        if encoded[-1].refusal is not None and not past_refusals:
            break
    return sum(document.num_bytes for document in batch[: len(encoded)]), encoded


_worker_encoder: Encoder | None = None


def _pickled(encoder: Encoder) -> bytes:
    """Return the encoder as bytes for the workers; refuse a tokenizer whose copy would give other ids."""
    tokenizer = encoder.tokenizer
    try:
        content = pickle.dumps(encoder)
        copy = pickle.loads(content).tokenizer
    except Exception as error:  # whatever a library raises
        raise ValueError(
            f"this tokenizer cannot be sent to workers ({error}); prepare with --workers 1"
        ) from error
    if copy.ids(PROBE) != tokenizer.ids(PROBE):
        raise ValueError(
            "this tokenizer gives other ids after it was sent to a worker; prepare with --workers 1"
        )
    return content


# Held by the main thread of a worker whenever it does not encode.
_not_encoding = threading.Lock()


def _start_worker(encoder: bytes, end: Connection) -> None:
    """Set up a worker process; runs once in each."""
    global _worker_encoder
    # Ctrl-C reaches the whole process group; the parent reports it, and the workers end with the pool.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _not_encoding.acquire()
    threading.Thread(target=_end_when_unwanted, args=(end,), daemon=True).start()
    # The workers already run side by side; the tokenizers' own threads would only compete with them.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker_encoder = pickle.loads(encoder)


def _end_with_parent() -> None:
    """End this process when its parent ends; a worker whose parent is killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _end_when_unwanted(end: Connection) -> None:
    """End this process in the middle of what it encodes, when the parent wants no more of it.

    A template or a tokenizer may be at work for a long time. A result that is being sent is sent to its end: the parent
    would wait for the rest.
    """
    end.poll(None)  # until its other side is closed
    with _not_encoding:
        os._exit(1)


def _encode_in_worker(batch: list[RawDocument], past_refusals: bool) -> EncodedBatch:
    assert _worker_encoder is not None
    _not_encoding.release()
    try:
        return _encode_batch(_worker_encoder, batch, past_refusals)
    finally:
        _not_encoding.acquire()
