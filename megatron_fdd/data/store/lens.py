"""The lens of a stored teacher: its final norm and its head, in one safetensors file beside the features.

V vocabulary, T the teacher's width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_fdd.data.store.identity import StoreIdentity, read_identity
from megatron_fdd.data.store.whole_file import FileTensor, write_tensors

LENS_FILE = Path("lens", "lens.safetensors")
NormKind = Literal["rms", "layer"]
# The end of a message that says what to do.
_CHANGED = "it has other bytes than were written; copy it again"
# The tensors that are read as a whole, and have one sum with the header.
_SMALL = ("head.bias", "norm.bias", "norm.weight")
# How many rows of the head one sum covers.
_SUM_ROWS = 1024
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
# The greatest error of logits that `lens` may have, relative to their largest: bf16 has 8 bits.
LARGEST_ERROR = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True, slots=True)
class StoredNorm:
    """A final norm, in float32.

    Attributes:
        kind: "rms" keeps the mean, "layer" takes it away.
        weight_T: scale, as the norm multiplies with it: already shifted by 1 where the model stores it zero-centred.
        bias_T: None where there is none.
    """

    kind: NormKind
    weight_T: Tensor
    bias_T: Tensor | None
    epsilon: float


@dataclass(frozen=True, slots=True)
class StoredExtras:
    """What most teachers' logits have not.

    Attributes:
        bias_V: of the head, in float32; None where there is none.
        cap: c of the soft cap c tanh(z / c) over the logits; None where there is none.
    """

    bias_V: Tensor | None = None
    cap: float | None = None


@dataclass(frozen=True, slots=True)
class StoredLens:
    """What a teacher reads its last hidden state with: logits = cap(head_VT norm(h) + bias_V).

    Attributes:
        head_VT: in the teacher's dtype; no padding rows.
        error: how far the engine's own logits were from these, the largest difference over the largest logit.
    """

    norm: StoredNorm
    head_VT: Tensor
    error: float
    extras: StoredExtras = StoredExtras()


def write_stored_lens(store: Path, lens: StoredLens) -> None:
    """Write a store's lens; a file that is there already stays: every producer of a store has the same one.

    Raises:
        ValueError: the disk cannot take the file, or a number is not finite.
    """
    path = store / LENS_FILE
    if path.is_file():
        return
    tensors = {"head.weight": lens.head_VT, "norm.weight": lens.norm.weight_T.float()}
    if lens.norm.bias_T is not None:
        tensors["norm.bias"] = lens.norm.bias_T.float()
    if lens.extras.bias_V is not None:
        tensors["head.bias"] = lens.extras.bias_V.float()
    wrong = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise ValueError(
            f"the teacher's {wrong[0]} has numbers that are not finite: its weights are damaged; convert it again"
        )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {
        "store": read_identity(store, "--store").digest,
        "kind": lens.norm.kind,
        "epsilon": repr(lens.norm.epsilon),
        "error": repr(lens.error),
    }
    if lens.extras.cap is not None:
        header["cap"] = repr(lens.extras.cap)
    header["norm.sum"] = _small_sum(header, tensors)
    tensors["head.sums"] = _sums(tensors["head.weight"])
    written = {
        name: FileTensor(_DTYPES[tensor.dtype], tuple(tensor.shape), [tensor.view(torch.uint8).numpy()])
        for name, tensor in tensors.items()
    }
    write_tensors(store, path, written, header)


def lacks_lens(store: Path) -> bool:
    """Whether a store has no lens. A damaged one is removed, so that a new one can be written.

    Raises:
        ValueError: the file is there and the system does not give it, or is of another store or version; it may be
            sound.
    """
    try:
        read_stored_norm(store)
        read_stored_head(store, 0, read_identity(store, "--store").vocab_size)
    except ValueError as error:
        is_damaged = isinstance(error.__cause__, SafetensorError | KeyError | ValueError)
        if not is_damaged and (store / LENS_FILE).exists():
            raise
        (store / LENS_FILE).unlink(missing_ok=True)
        return True
    return False


def read_stored_norm(store: Path) -> StoredNorm:
    """Read the final norm of a store's lens, on the CPU.

    Raises:
        ValueError: there is no lens, or it is damaged.
    """
    header, tensors = _read_small(store)
    kind = header["kind"]
    if kind not in ("rms", "layer"):
        raise ValueError(
            f"{store / LENS_FILE}: a norm of the kind {kind!r}; this version knows rms and layer; make the store with "
            "this version"
        )
    return StoredNorm(kind, tensors["norm.weight"], tensors.get("norm.bias"), float(header["epsilon"]))


def read_stored_extras(store: Path) -> StoredExtras:
    """Read what a store's lens has beside norm and head, on the CPU.

    Raises:
        ValueError: there is no lens, or it is damaged.
    """
    header, tensors = _read_small(store)
    return StoredExtras(tensors.get("head.bias"), float(header["cap"]) if "cap" in header else None)


def _read_small(store: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Read all of a store's lens but the head, compared with its sum."""
    path, identity = store / LENS_FILE, read_identity(store, "--fdd-teacher-store")
    _check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = [name for name in file.keys() if name in _SMALL]  # noqa: SIM118  # no mapping
            tensors = {name: file.get_tensor(name) for name in names}
            if header["norm.sum"] != _small_sum(header, tensors):
                raise ValueError(_CHANGED)
        of_store = header["store"]
        if of_store == identity.digest:
            _check_fit(identity, header, tensors)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _damage(path, error) from error
    if of_store != identity.digest:
        raise ValueError(
            f"{path}: the teacher's lens is of the store {of_store}, not of this one, {identity.digest}; copy the "
            "right one, or move it away and run fdd teach again, which writes one"
        )
    return header, tensors


def _check_regular(path: Path) -> None:
    """Refuse a pipe, which would be waited for, or a folder in the place of the lens."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no regular file; remove it, and run fdd teach again, which writes one")


def _check_fit(identity: StoreIdentity, header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse a lens that no teacher of this identity has."""
    lengths = {"norm.weight": identity.hidden_size, "norm.bias": identity.hidden_size}
    lengths["head.bias"] = identity.vocab_size
    for name, tensor in tensors.items():
        if tensor.shape != (lengths[name],):
            raise ValueError(
                f"its {name} has the shape {list(tensor.shape)}, and not [{lengths[name]}]; copy it again"
            )
    for name in ("epsilon", "cap"):
        if name in header and not 0 <= float(header[name]) < math.inf:
            raise ValueError(f"its {name} is {header[name]}, and must be a number of at least 0")
    if "cap" in header and float(header["cap"]) == 0:
        raise ValueError("its cap is 0, and must be above 0")


def read_stored_head(store: Path, first: int, rows: int) -> Tensor:
    """Read rows [first, first + rows) of a store's head, on the CPU; rows behind its last one are zeros.

    Raises:
        ValueError: there is no lens, or it is damaged.
    """
    path, identity = store / LENS_FILE, read_identity(store, "--fdd-teacher-store")
    _check_regular(path)
    low = first // _SUM_ROWS * _SUM_ROWS
    try:
        with safe_open(path, framework="pt") as file:
            view, sums = file.get_slice("head.weight"), file.get_tensor("head.sums")
            num_rows, width = shape = view.get_shape()
            if shape != [identity.vocab_size, identity.hidden_size]:
                raise ValueError(
                    f"its head has the shape {shape}, and not [{identity.vocab_size}, {identity.hidden_size}]; copy "
                    "it again"
                )
            high = min(-(-(first + rows) // _SUM_ROWS) * _SUM_ROWS, num_rows)
            # Whole blocks of sums: only these can be checked.
            found = view[min(low, high) : high]
        if not torch.equal(_sums(found), sums[low // _SUM_ROWS :][: -(-len(found) // _SUM_ROWS)]):
            raise ValueError(_CHANGED)
    except (SafetensorError, OSError, ValueError) as error:
        raise _damage(path, error) from error
    wanted = found[first - low : first - low + rows]
    return torch.cat([wanted, found.new_zeros(rows - len(wanted), width)])


def _sums(head_VT: Tensor) -> Tensor:
    """Return the sum of each 1,024 rows, XXH3 as int64."""
    rows = head_VT.view(torch.uint8).numpy()
    sums = [
        xxhash.xxh3_64_intdigest(rows[first : first + _SUM_ROWS]) for first in range(0, len(rows), _SUM_ROWS)
    ]
    return torch.tensor([each - (1 << 63) for each in sums], dtype=torch.int64)


def _small_sum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Return the sum of all tensors but the head, and of what the header says."""
    said = [header[name] for name in ("store", "kind", "epsilon", "error")]
    total = xxhash.xxh3_64("".join([*said, header.get("cap", "")]).encode())
    for name in (name for name in _SMALL if name in tensors):
        total.update(name.encode())
        total.update(tensors[name].numpy())
    return total.hexdigest()


def _damage(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path}: the teacher's lens cannot be read ({type(error).__name__}: {error}); remove the file if it is there, "
        "and run fdd teach again, which writes it anew"
    )


def relative_error(logits: Tensor, wanted: Tensor) -> float:
    """Return the largest difference of logits over the largest of the right ones."""
    return float((logits.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-30))
