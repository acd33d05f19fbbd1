"""A store of another precision than the flags of a training ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.data.store.store import Store
from megatron_fdd.plan.teacher_store import check_precision
from tests.data.store.made import IDENTITY, opened, write

FP8 = {"teacher_fp8_format": "e4m3", "teacher_fp8_recipe": "blockwise"}


def store_in(folder: Path, **changes: Any) -> Store:
    write(folder, identity=replace(IDENTITY, **changes))
    return opened(folder)


def check(store: Store, **flags: Any) -> None:
    check_precision(FddConfig(teacher_store=str(store.path), **flags), store)


@pytest.mark.parametrize(
    ("ran", "told"),
    [({}, "FP8: no"), ({"fp8": "no"}, "FP8: no"), ({"fp8": "e4m3 tensorwise"}, "FP8: e4m3 tensorwise")],
)
def test_a_teacher_in_another_precision_than_asked_for(
    tmp_path: Path, ran: dict[str, str], told: str
) -> None:
    store = store_in(tmp_path, ran={**IDENTITY.ran, **ran})
    check(store)
    with pytest.raises(
        ValueError,
        match=rf"^--teacher-fp8-format e4m3 .*blockwise: the teacher of .* ran in bfloat16, {told}; leave",
    ):
        check(store, **FP8)


def test_a_teacher_in_fp8_as_asked_for(tmp_path: Path) -> None:
    check(store_in(tmp_path, ran={**IDENTITY.ran, "fp8": "e4m3 blockwise"}), **FP8)


def test_another_form_than_asked_for(tmp_path: Path) -> None:
    store = store_in(tmp_path, form="int8")
    check(store)
    check(store, tap_dtype="int8")
    with pytest.raises(
        ValueError, match=r"^--fdd-tap-dtype fp8: .* has hidden states in int8, .*--form fp8$"
    ):
        check(store, tap_dtype="fp8")
