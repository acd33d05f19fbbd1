"""The lens of a store: read as it was written, in slices of the vocabulary; damage is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fdd.data.store.lens import (
    LENS_FILE,
    StoredExtras,
    StoredNorm,
    lacks_lens,
    read_stored_extras,
    read_stored_head,
    read_stored_norm,
    write_stored_lens,
)
from tests.data.store.made import IDENTITY, OTHER, flip, write, write_lens

ROWS = IDENTITY.vocab_size


@pytest.mark.parametrize("bias", [True, False])
def test_the_norm_is_read_as_written(tmp_path: Path, bias: bool) -> None:
    write(tmp_path)
    wanted, found = write_lens(tmp_path, bias=bias).norm, read_stored_norm(tmp_path)
    assert (found.kind, found.epsilon) == (wanted.kind, wanted.epsilon)
    assert torch.equal(found.weight_T, wanted.weight_T)
    assert (found.bias_T is None) == (not bias)
    if found.bias_T is not None and wanted.bias_T is not None:
        assert torch.equal(found.bias_T, wanted.bias_T)


@pytest.mark.parametrize("bias", [True, False])
def test_the_extras_are_read_as_written(tmp_path: Path, bias: bool) -> None:
    write(tmp_path)
    wanted, found = write_lens(tmp_path, bias=bias).extras, read_stored_extras(tmp_path)
    assert found.cap == wanted.cap == (30.0 if bias else None)
    assert (found.bias_V is None) == (wanted.bias_V is None) == (not bias)
    if found.bias_V is not None and wanted.bias_V is not None:
        assert torch.equal(found.bias_V, wanted.bias_V)


@pytest.mark.parametrize(
    ("first", "rows"),
    [(0, ROWS), (0, 1), (1023, 2), (1024, 1024), (2047, 3), (2049, 1), (2040, 30), (2050, 4), (4096, 4)],
)
def test_rows_behind_the_vocabulary_are_zeros(tmp_path: Path, first: int, rows: int) -> None:
    write(tmp_path)
    head_VT = torch.cat([write_lens(tmp_path).head_VT, torch.zeros(9000, IDENTITY.hidden_size).bfloat16()])
    found = read_stored_head(tmp_path, first, rows)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, head_VT[first : first + rows])


def test_no_flipped_bit_of_a_lens_stays_unseen(tmp_path: Path) -> None:
    write(tmp_path)
    write_lens(tmp_path)
    path = tmp_path / LENS_FILE
    right = path.read_bytes()
    header = 8 + int.from_bytes(right[:8], "little")
    places = [*range(8, header, 3), *range(header, len(right), 401), *range(-60, 0, 3)]
    for number, at in enumerate(places):
        flip(path, at, number % 8)
        with pytest.raises(ValueError, match="lens cannot be read .*remove the file .* fdd teach again"):
            _read(tmp_path)
        path.write_bytes(right)


def _read(path: Path) -> None:
    read_stored_norm(path)
    read_stored_head(path, 0, ROWS)


def test_a_flipped_bit_is_seen_by_the_rank_whose_rows_it_is_of(tmp_path: Path) -> None:
    write(tmp_path)
    lens = write_lens(tmp_path)
    path = tmp_path / LENS_FILE
    at = path.read_bytes().index(lens.head_VT[1500].view(torch.uint8).numpy().tobytes())
    flip(path, at)
    assert torch.equal(read_stored_head(tmp_path, 0, 1024), lens.head_VT[:1024])
    with pytest.raises(ValueError, match="has other bytes than were written"):
        read_stored_head(tmp_path, 1024, 1024)


def test_a_lens_that_is_cut_off_gone_or_foreign(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", identity=OTHER)
    write_lens(tmp_path / "b")
    path = tmp_path / "a" / LENS_FILE
    with pytest.raises(ValueError, match=r"lens.safetensors: .*FileNotFoundError.*run fdd teach again"):
        _read(tmp_path / "a")
    path.parent.mkdir()
    content = (tmp_path / "b" / LENS_FILE).read_bytes()
    path.write_bytes(content)
    with pytest.raises(ValueError, match="lens is of the store .*, not of this one"):
        _read(tmp_path / "a")
    with pytest.raises(ValueError, match="or move it away and run fdd teach again"):
        lacks_lens(tmp_path / "a")
    assert path.read_bytes() == content, "another store's only copy, perhaps"
    for size in (0, 7, 300, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"lens.safetensors: .*remove the file"):
            _read(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extras": StoredExtras(cap=0.0)}, "its cap is 0, and must be above 0"),
        ({"extras": StoredExtras(cap=-3.0)}, "its cap is -3.0, and must be a number of at least 0"),
        ({"extras": StoredExtras(cap=float("nan"))}, "its cap is nan"),
        ({"extras": StoredExtras(torch.zeros(7))}, "its head.bias has the shape .7., and not .2050."),
        (
            {"norm": StoredNorm("rms", torch.ones(3), None, 1e-5)},
            "its norm.weight has the shape .3., and not .5.",
        ),
        ({"norm": StoredNorm("rms", torch.ones(5), None, -1.0)}, "its epsilon is -1.0"),
        ({"head_VT": torch.zeros(2049, 5)}, r"its head has the shape \[2049, 5\], and not \[2050, 5\]"),
    ],
)
def test_a_lens_that_no_teacher_of_the_store_has(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write(tmp_path)
    lens = replace(write_lens(tmp_path), **changes)
    (tmp_path / LENS_FILE).unlink()
    write_stored_lens(tmp_path, lens)
    with pytest.raises(ValueError, match=f"lens.safetensors: .*{message}"):
        _read(tmp_path)


def test_a_rank_behind_the_last_row_gets_zeros(tmp_path: Path) -> None:
    """The student's vocabulary may be larger by more than a block of sums."""
    write(tmp_path)
    lens = write_lens(tmp_path)
    behind = -(-ROWS // 1024) * 1024
    for first in (behind, behind + 5000):
        found = read_stored_head(tmp_path, first, 16)
        assert found.shape == (16, lens.head_VT.shape[1])
        assert found.dtype == lens.head_VT.dtype
        assert not found.any()


def test_the_first_lens_stays(tmp_path: Path) -> None:
    write(tmp_path)
    lens = write_lens(tmp_path)
    write_stored_lens(tmp_path, replace(lens, head_VT=lens.head_VT + 1))
    assert torch.equal(read_stored_head(tmp_path, 0, ROWS), lens.head_VT)


@pytest.mark.parametrize("name", ["head.weight", "head.bias", "norm.weight", "norm.bias"])
def test_numbers_that_are_not_finite_are_not_written(tmp_path: Path, name: str) -> None:
    write(tmp_path / "s")
    write(tmp_path / "t")
    lens = write_lens(tmp_path / "s")
    norm, head_VT, extras = lens.norm, lens.head_VT.clone(), lens.extras
    bad_T = torch.full_like(norm.weight_T, torch.inf)
    if name == "head.weight":
        head_VT[7, 1] = torch.nan
    elif name == "head.bias":
        extras = replace(extras, bias_V=torch.full((ROWS,), torch.nan))
    elif name == "norm.weight":
        norm = replace(norm, weight_T=bad_T)
    else:
        norm = replace(norm, bias_T=bad_T)
    with pytest.raises(ValueError, match=f"the teacher's {name} has numbers that are not finite"):
        write_stored_lens(tmp_path / "t", replace(lens, norm=norm, head_VT=head_VT, extras=extras))
    assert not (tmp_path / "t" / LENS_FILE).exists()
