"""Sends between pipeline stages."""

from __future__ import annotations

from megatron.core import ModelParallelConfig


def let_host_run_ahead(config: ModelParallelConfig) -> None:
    """Leave out the wait for the whole device with which Megatron follows each batch of sends.

    Before torch 1.13 a batch could be waited for before the device had it. Since then its `wait` makes the stream wait
    for all of its sends, and Megatron waits for every batch before it reads what came or frees what went. Interleaved
    schedules that overlap their sends never wait for the device.
    """
    config.batch_p2p_sync = False
