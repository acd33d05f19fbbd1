"""What a plan says of data that it has only sampled."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.data import token_ids
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.vocabulary import check_data_ids
from tests.data.conftest import megatron_args
from tests.data.foreign import foreign, forget


@pytest.mark.parametrize(
    ("is_plan", "size", "said"), [(True, 30, True), (True, 5, False), (False, 30, False)]
)
def test_a_plan_says_what_it_has_not_read(
    is_plan: bool, size: int, said: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training reads everything, and so has nothing to say."""
    monkeypatch.setattr(token_ids, "SAMPLED_IDS", 10)
    monkeypatch.setattr(token_ids, "_PIECES", 2)
    forget()
    args = megatron_args("--data-path", foreign(tmp_path / "own", [[4] * size]))
    holders = {"the student": 5}
    context = Context(FddConfig(teacher_load="T", dry_run=is_plan), args, id_holders=holders)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_data_ids(context)
    told = [str(each.message) for each in found]
    assert [line.startswith(f"{tmp_path / 'own'}: of its token ids this plan") for line in told] == [
        True
    ] * said
    holders["the teacher"] = 4
    with pytest.raises(ValueError, match="own has the token id 4, and the teacher has 4 ids"):
        check_data_ids(context)
