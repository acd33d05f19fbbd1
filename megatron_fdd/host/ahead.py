"""Work that threads do ahead of the one who needs it, in order, with a bounded amount of it in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

# So many bytes of results are used, wait or are made, or two results that have more together. A maker takes up to
# twice as much meanwhile.
MAX_BYTES = 128 << 20
# A result counts as so many at least, so that their number is bounded too.
_MIN_BYTES = 1 << 20
_MAX_THREADS = 4


def ahead[Item, Result](
    make: Callable[[Item], Result], items: Iterable[tuple[Item, int]], max_bytes: int = MAX_BYTES
) -> Generator[Result]:
    """Yield `make(item)` for each item in order, made by threads while earlier results are used.

    torch's copies, sums and reading leave Python's lock, so that they run side by side. A result belongs to the one
    who takes it, until the next one is asked for. Close the iterator where it is not used up: the threads end then.

    Args:
        make: is called in several threads at a time.
        items: each with the bytes of its result.

    Raises:
        Exception: what `make` raised, in the place of the result.
    """
    waiting: deque[tuple[Future[Result], int]] = deque()
    taken = 0
    threads = min(max(len(os.sched_getaffinity(0)), 2), _MAX_THREADS)  # one can wait for the disk
    pool = ThreadPoolExecutor(threads, thread_name_prefix="ahead")
    try:
        for item, size in items:
            cost = max(size, _MIN_BYTES)
            while len(waiting) > 1 and taken + cost > max_bytes:
                yield waiting[0][0].result()
                taken -= waiting.popleft()[1]
            waiting.append((pool.submit(make, item), cost))
            taken += cost
        while waiting:
            yield waiting[0][0].result()
            waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
