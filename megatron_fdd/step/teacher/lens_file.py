"""Lens files: what a lens has learned for each of a teacher's blocks, in one safetensors file. No code is in it.

A tensor is called `BLOCK.NAME`, blocks as the paper counts them. The header says of which kind the lens is
(`losses.lens.LENSES`), and of which teacher.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_fdd.host.checkpoint import read_tensor
from megatron_fdd.host.disk import naming, writing
from megatron_fdd.losses.lens import LENSES, LensKind

FLAG = "--teacher-lens"
_FINAL_NORM = "decoder.final_layernorm.weight"
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class TeacherIdentity:
    """Which teacher a lens is for.

    Attributes:
        final_norm: SHA-256 of the final norm's weight in float32, which differs between any two teachers that were
            trained apart; empty for a checkpoint without weights (`fdd import --config-only`).
    """

    num_layers: int
    hidden_size: int
    final_norm: str

    @classmethod
    def read(cls, checkpoint: Path, args: argparse.Namespace) -> TeacherIdentity:
        """Read what is known of a teacher without its large tensors. No collectives.

        Args:
            args: of the teacher; from its checkpoint, or from `teacher_args`.

        Raises:
            ValueError: the checkpoint cannot be read.
        """
        weight_T = read_tensor(checkpoint, _FINAL_NORM, "--teacher-load")
        digest = "" if weight_T is None else hashlib.sha256(weight_T.float().numpy().tobytes()).hexdigest()
        return cls(args.num_layers, args.hidden_size, digest)


@dataclass(frozen=True, slots=True)
class LensFile:
    """The header of a lens file.

    Attributes:
        lens: the name of its kind.
        shapes: of each block's tensors, by name.
        num_bytes: of each block's tensors together.
    """

    path: Path
    lens: str
    teacher: TeacherIdentity
    shapes: Mapping[int, Mapping[str, Sequence[int]]]
    num_bytes: Mapping[int, int]

    @property
    def kind(self) -> LensKind:
        """The formula, and which tensors it needs."""
        return LENSES[self.lens]

    @classmethod
    def open(cls, path: str | Path) -> LensFile:
        """Read the header. No tensor is read.

        Raises:
            ValueError: no such file, no lens file, or a lens of a kind that nothing has registered.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{FLAG} {path}: there is no such file; give one that write_lens has made")
        shapes: dict[int, dict[str, Sequence[int]]] = {}
        num_bytes: dict[int, int] = {}
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                name = header["lens"]
                teacher = TeacherIdentity(
                    int(header["num_layers"]), int(header["hidden_size"]), header["final_norm"]
                )
                for key in file.keys():  # noqa: SIM118  # no mapping
                    block, _, tensor = key.partition(".")
                    view = file.get_slice(key)
                    shape = view.get_shape()
                    shapes.setdefault(int(block), {})[tensor] = shape
                    size = torch.Size(shape).numel() * _DTYPES[view.get_dtype()].itemsize
                    num_bytes[int(block)] = num_bytes.get(int(block), 0) + size
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ValueError(
                f"{FLAG} {path}: is no lens file ({type(error).__name__}: {error}); give one that write_lens has made, "
                "with tensors in float32, bfloat16 or float16"
            ) from error
        if name not in LENSES:
            raise ValueError(
                f"{FLAG} {path}: is of a lens {name!r}, which nothing has added; name the module that calls "
                "add_lens with --fdd-plugin"
            )
        return cls(path, name, teacher, shapes, num_bytes)

    def check(self, teacher: TeacherIdentity, blocks: Collection[int]) -> None:
        """Refuse a file of another teacher, and one without what these blocks need. It reads their tensors.

        Collectives: none.

        Raises:
            ValueError: names what differs, or the tensor with a number that is not finite.
        """
        for name, own in asdict(self.teacher).items():
            given = getattr(teacher, name)
            if given and own != given:
                raise ValueError(
                    f"{FLAG} {self.path}: was made for another teacher: its {name} is {_short(own)}, and that of "
                    f"this run's teacher {_short(given)}; make a lens for this one"
                )
        missing = sorted(set(blocks) - set(self.shapes))
        if missing:
            raise ValueError(
                f"{FLAG} {self.path}: has no tensors for the teacher's blocks {missing}, only for "
                f"{sorted(self.shapes)}: choose among those with --fdd-layer-pairs, or make a lens for these"
            )
        for block in sorted(blocks):
            self._check_block(block, {"T": teacher.hidden_size})
        with safe_open(self.path, framework="pt") as file:
            for block in sorted(blocks):
                tensors = {name: file.get_tensor(f"{block}.{name}") for name in self.kind.tensors}
                _check_finite(self.path, block, tensors)

    def _check_block(self, block: int, sizes: dict[str, int]) -> None:
        """Refuse tensors that are not the kind's; `sizes` are those of letters that are known before."""
        found, wanted = self.shapes[block], self.kind.tensors
        if set(found) != set(wanted):
            raise ValueError(
                f"{FLAG} {self.path}: block {block} has tensors {sorted(found)}; a lens {self.lens!r} needs "
                f"{sorted(wanted)}"
            )
        for name, letters in wanted.items():
            shape = found[name]
            fits = len(shape) == len(letters) and all(
                sizes.setdefault(letter, size) == size for letter, size in zip(letters, shape, strict=True)
            )
            if not fits:
                raise ValueError(
                    f"{FLAG} {self.path}: {block}.{name} has the shape {list(shape)}; a lens {self.lens!r} needs "
                    f"{letters} with {sizes}"
                )

    def load(self, blocks: Collection[int]) -> dict[int, dict[str, Tensor]]:
        """Read the tensors of these blocks to this rank's device, each in its own dtype; without gradient."""
        device = torch.cuda.current_device()
        with safe_open(self.path, framework="pt") as file:
            return {
                block: {name: file.get_tensor(f"{block}.{name}").to(device) for name in self.kind.tensors}
                for block in sorted(blocks)
            }


def write_lens(
    path: str | Path, lens: str, teacher: TeacherIdentity, blocks: Mapping[int, Mapping[str, Tensor]]
) -> None:
    """Write a lens file, which appears only when it is whole.

    Args:
        lens: a name that `add_lens` was given.
        blocks: for each block of the teacher (1-based, "output of block l") its tensors by name; float32, bfloat16 or
            float16.

    Raises:
        ValueError: a number is not finite, the tensors are not those of the kind, or the file cannot be written.
    """
    path = Path(path)
    named: dict[str, Tensor] = {}
    for block, tensors in blocks.items():
        _check_finite(path, block, tensors)
        named |= {f"{block}.{name}": tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"lens": lens} | {name: str(value) for name, value in asdict(teacher).items()}
    partial = path.with_name(f".{path.name}.incomplete")
    try:
        with writing("lens file", path), naming(f"{FLAG} {partial}", f"lens file {path}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(named, partial, header)
            LensFile.open(partial).check(teacher, blocks)
            partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink()


def _check_finite(path: Path, block: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors with numbers that are not finite."""
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(
            f"lens file {path}: {block}.{wrong[0]} has numbers that are not finite; make the lens again"
        )


def _short(value: object) -> str:
    """Return a value as text, a digest by its beginning."""
    return f"{str(value)[:12]}..." if isinstance(value, str) else str(value)
