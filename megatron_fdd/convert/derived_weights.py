"""The weights of a model folder that is made from another one: tensors renamed, left out, or changed one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from megatron_fdd.convert.checksums import Checksums, check_finite, digest
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.hf_writer import TensorSpec, parse_size, plan_shards, write_index, write_shard
from megatron_fdd.convert.mcore_model import name_of
from megatron_fdd.host.bar import Bar


@dataclass(frozen=True, slots=True)
class Derived:
    """A tensor to be written.

    Attributes:
        sources: names of the tensors that it is made from, mostly one.
        change: makes it of these, with the spec's dtype and shape; each is read when it is asked for. None if it is the
            only one bit for bit.
    """

    spec: TensorSpec
    sources: tuple[str, ...]
    change: Callable[[Iterator[Tensor]], Tensor] | None = None


def write_derived(
    source: HfFolder, tensors: Sequence[Derived], target: Path, *, max_shard_size: str, progress: bool
) -> int:
    """Write tensors with their index and checksums into the folder `target`; return their number of parameters.

    One tensor is in memory at a time, and those of its sources that `change` holds.

    Raises:
        ValueError: a tensor of the source is not finite, or not what its `checksums.json` says.
    """
    shards = plan_shards((tensor.spec for tensor in tensors), parse_size(max_shard_size))
    by_name = {tensor.spec.name: tensor for tensor in tensors}
    expected = Checksums.read(source.path)
    digests: dict[str, str] = {}
    total = sum(shard.num_bytes for shard in shards)
    with Bar(total=total, desc="writing", unit="B", is_shown=progress) as bar:
        for shard in shards:
            values = _values(source, [by_name[spec.name] for spec in shard.tensors], expected)
            for spec, written in write_shard(target, shard, values):
                tensor = by_name[spec.name]
                if expected is not None and tensor.change is None:
                    (only,) = tensor.sources
                    if only not in source.quantised:
                        expected.check(source.path, only, written)
                digests[spec.name] = written
                bar.update(spec.num_bytes)
    write_index(target, shards)
    dtypes = {name_of(tensor.spec.dtype) for tensor in tensors}
    Checksums(dtypes.pop() if len(dtypes) == 1 else "mixed", digests).write(target)
    return sum(math.prod(tensor.spec.shape) for tensor in tensors)


def _values(source: HfFolder, tensors: Sequence[Derived], expected: Checksums | None) -> Iterator[Tensor]:
    """Yield the values of tensors; what is written unchanged is held to the checksums after it is written."""
    for tensor in tensors:
        parts = _parts(source, tensor, expected)
        yield next(parts) if tensor.change is None else tensor.change(parts)


def _parts(source: HfFolder, tensor: Derived, expected: Checksums | None) -> Iterator[Tensor]:
    """Yield the sources of a tensor, each read when it is asked for."""
    for name in tensor.sources:
        value = source.read(name)
        check_finite(value, f"{source.path}: {name}", "take other weights")
        if tensor.change is not None and expected is not None and name not in source.quantised:
            expected.check(source.path, name, digest(value))
        yield value
        del value  # before the next one is read
