"""The load of each pipeline chunk, the bubble of an uneven load, and a split of the layers that evens it out.

Figures are those of `plan.flops`. A *split* holds the number of layers of each chunk, `split[stage][virtual]`. In
*chunk order*, the order of the layers, all stages of virtual stage 0 come first, then all of virtual stage 1, and so
on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_fdd.plan.flops import TokenFlops

Split = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class ChunkLoad:
    """The work of one chunk for each token of the student's schedule."""

    stage: int
    virtual: int
    layers: int
    taps: int
    body_flops: int
    tap_flops: int
    head_flops: int

    @property
    def flops(self) -> int:
        """The sum of body, taps and head."""
        return self.body_flops + self.tap_flops + self.head_flops


def chunk_loads(flops: TokenFlops, split: Split, tapped_layers: Sequence[int]) -> list[ChunkLoad]:
    """Return the load of every chunk, in chunk order. `tapped_layers` are 0-based layers of the student."""
    loads: list[ChunkLoad] = []
    first, num_later = 0, len(tapped_layers)
    last = (len(split) - 1, len(split[0]) - 1)
    for virtual in range(len(split[0])):
        for stage in range(len(split)):
            layers = split[stage][virtual]
            taps = sum(first <= layer < first + layers for layer in tapped_layers)
            head = flops.head if (stage, virtual) == last else 0
            num_later -= taps
            tap_flops = flops.taps(taps, num_later)
            loads.append(ChunkLoad(stage, virtual, layers, taps, layers * flops.layer, tap_flops, head))
            first += layers
    assert num_later == 0, f"{tapped_layers} beyond {first} layers"
    return loads


def bubble_fraction(loads: Sequence[ChunkLoad], num_microbatches: int) -> float:
    """Return the share of a step in which the average stage waits, by a replay of Megatron's order of tasks.

    The order is 1F1B's or the interleaved one.

        bubble = 1 - (micro-batches * mean load of a stage) / (end of the last backward pass)

    With equal chunks the waiting is the usual (p - 1) / (m * virtual) of the busy time. With one virtual stage the
    step takes about m * (heaviest stage) + (sum of the others). With more, a heavy chunk also delays the other
    chunks of its stage, so that equal stages made of unequal chunks can wait long. Here sends take no time. The
    forward pass has a third of the body, all of a head, and all of a tap (as with a constant lens).
    """
    num_stages, num_chunks = loads[-1].stage + 1, len(loads)
    forward = [load.body_flops / 3 + load.tap_flops + load.head_flops for load in loads]
    backward = [load.flops - part for load, part in zip(loads, forward, strict=True)]
    durations = forward + backward[::-1]
    queues = [
        iter(stage_tasks(stage, num_stages, num_chunks, num_microbatches)) for stage in range(num_stages)
    ]
    tasks = [next(queue, None) for queue in queues]
    ends: dict[tuple[int, int], float] = {}
    clocks = [0.0] * num_stages
    while any(tasks):
        num_done = len(ends)
        for stage, queue in enumerate(queues):
            while (task := tasks[stage]) is not None:
                step, microbatch = task
                ready = ends.get((step - 1, microbatch)) if step else 0.0
                if ready is None:
                    break
                clocks[stage] = ends[task] = max(clocks[stage], ready) + durations[step]
                tasks[stage] = next(queue, None)
        assert len(ends) > num_done, "the stages wait for each other"
    busy = num_microbatches * sum(durations) / num_stages
    return 1 - busy / max(clocks) if busy else 0.0


def stage_tasks(stage: int, num_stages: int, num_chunks: int, num_microbatches: int) -> list[tuple[int, int]]:
    """Return what a stage runs in a step, in Megatron's order: (step of the way, micro-batch).

    The way of a micro-batch has 2 * num_chunks steps: forward through the chunks, then backward.
    """
    virtual = num_chunks // num_stages
    forward, backward = [], []
    for first in range(0, num_microbatches, num_stages):
        group = range(first, min(first + num_stages, num_microbatches))
        for chunk in range(stage, num_chunks, num_stages):
            forward += [(chunk, microbatch) for microbatch in group]
        for chunk in reversed(range(stage, num_chunks, num_stages)):
            backward += [(2 * num_chunks - 1 - chunk, microbatch) for microbatch in group]
    num_ahead = num_stages - stage - 1
    if virtual > 1:
        num_ahead = 2 * num_ahead + (virtual - 1) * num_stages
    steady = forward[num_ahead:]
    paired = [task for pair in zip(steady, backward, strict=False) for task in pair]
    return forward[:num_ahead] + paired + backward[len(steady) :]


def balanced_split(
    flops: TokenFlops, num_layers: int, num_stages: int, virtual: int, tapped_layers: Sequence[int]
) -> list[list[int]]:
    """Return the split whose heaviest chunk is lightest, by dynamic programming over the chunks.

    It counts the heaviest chunk and not the heaviest stage: see `bubble_fraction`. Among equals, the more even split
    is taken. Every chunk gets a layer, unless there are fewer layers than chunks.
    """
    num_chunks = num_stages * virtual
    smallest = int(num_layers >= num_chunks)
    taps_below = [sum(layer < end for layer in tapped_layers) for end in range(num_layers + 1)]
    # For each number of placed layers: the heaviest chunk, the sum of squares (evenness), the sizes of the chunks.
    best: dict[int, tuple[int, int, tuple[int, ...]]] = {0: (0, 0, ())}
    for num_later in reversed(range(num_chunks)):
        extended: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for start, (heaviest, squares, sizes) in best.items():
            first_end = start + smallest if num_later else num_layers
            for end in range(first_end, num_layers - smallest * num_later + 1):
                taps, num_later_taps = taps_below[end] - taps_below[start], taps_below[-1] - taps_below[end]
                load = (end - start) * flops.layer + flops.taps(taps, num_later_taps)
                load += 0 if num_later else flops.head
                candidate = (max(heaviest, load), squares + load * load, (*sizes, end - start))
                extended[end] = min(candidate, extended.get(end, candidate))
        best = extended
    sizes = best[num_layers][2]
    return [list(sizes[stage::num_stages]) for stage in range(num_stages)]


def layout_string(split: Split) -> str:
    """Write a split in the form of Megatron's `--pipeline-model-parallel-layout`: `Ettt|tttt|tttt|tL`."""
    chunks = ["t" * stage[virtual] for virtual in range(len(split[0])) for stage in split]
    return f"E{'|'.join(chunks)}L"


def describe_balance(
    flops: TokenFlops, split: Split, tapped_layers: Sequence[int], num_microbatches: int
) -> list[str]:
    """Return lines for the dry run: the load of each stage, the bubble, and the flag that shrinks it.

    Args:
        split: the run's split. With one stage there are no lines.
    """
    num_stages = len(split)
    if num_stages == 1:
        return []
    loads = chunk_loads(flops, split, tapped_layers)
    lines = ["  load of each pipeline stage, GFLOP per token, forward and backward, on a GPU:"]
    for stage in range(num_stages):
        own = [load for load in loads if load.stage == stage]
        layers, taps = "+".join(str(load.layers) for load in own), sum(load.taps for load in own)
        total, tap = sum(load.flops for load in own), sum(load.tap_flops for load in own)
        lines.append(
            f"    stage {stage}: {layers} layer(s), {taps} tap(s): "
            f"{total / 1e9:.3g} with taps, {(total - tap) / 1e9:.3g} without"
        )
    bubble = bubble_fraction(loads, num_microbatches)
    without = bubble_fraction(chunk_loads(flops, split, ()), num_microbatches)
    lines.append(
        f"  bubble with {num_microbatches} micro-batch(es): {bubble:.1%} of a step; without taps {without:.1%}"
    )
    num_layers = sum(load.layers for load in loads)
    better = balanced_split(flops, num_layers, num_stages, len(split[0]), tapped_layers)
    better_bubble = bubble_fraction(chunk_loads(flops, better, tapped_layers), num_microbatches)
    if better_bubble >= bubble:
        return [*lines, "    no better split into as many chunks was found"]
    return [
        *lines,
        f"    {better_bubble:.1%} with --pipeline-model-parallel-layout '{layout_string(better)}'",
        "    (in place of every other flag that divides layers among stages or virtual stages)",
    ]
