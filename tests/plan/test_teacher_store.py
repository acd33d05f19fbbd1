"""Stores of other precisions than the flags of a training ask for, and of several teachers that do not fit together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.data.store.routed import NamedStore
from megatron_fdd.data.store.store import Store
from megatron_fdd.losses.layer_plan import Plan
from megatron_fdd.losses.pairs import LayerPair
from megatron_fdd.losses.term_modules import ModuleSize
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.teacher_store import check_precision, check_store, check_teachers, plan_stores
from megatron_fdd.plan.vocabulary import check_vocabularies, common_vocab_size
from megatron_fdd.step.teacher.stored import PlannedStore
from tests.data.store.made import IDENTITY, opened, write

FP8 = {"teacher_fp8_format": "e4m3", "teacher_fp8_recipe": "blockwise"}


def store_in(folder: Path, **changes: Any) -> Store:
    write(folder, identity=replace(IDENTITY, **changes))
    return opened(folder)


def check(store: Store, **flags: Any) -> None:
    check_precision(FddConfig(teacher_store=(("", str(store.path)),), **flags), store)


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


def context(*stores: Store, **more: Any) -> Context:
    names = ("code", "maths")
    args: Any = SimpleNamespace(
        vocab_size=60, tokenizer_model="M", tokenizer_type=None, num_layers=6, hidden_size=4
    )
    config = FddConfig(
        teacher_store=tuple((name, name) for name in names), layers=2, layer_pairs=((1, 2), (2, 4))
    )
    named = tuple(NamedStore(*each) for each in zip(names, stores, strict=False))
    return Context(config, args, teacher_stores=named, **more)


def test_teachers_of_different_vocabularies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a head that no token of the tokenizer has are no difference."""
    monkeypatch.setattr("megatron_fdd.plan.vocabulary.get_tokenizer", lambda: SimpleNamespace(vocab_size=50))
    sizes = (64, 50, 47)
    large, exact, small = (store_in(tmp_path / str(size), vocab_size=size) for size in sizes)
    check_vocabularies(context(large, exact))
    assert common_vocab_size(context(large, exact)) == 50
    with pytest.raises(
        ValueError,
        match=r"different ones \(of 50 of the tokenizer: the teacher code 50, the teacher maths 47\); all",
    ):
        check_vocabularies(context(large, small))


def test_each_teacher_has_its_own_layers(tmp_path: Path) -> None:
    shallow = store_in(tmp_path / "a", num_layers=6)
    deep = store_in(tmp_path / "b", num_layers=9, blocks=[3, 6, 9])
    known = context(shallow, deep)
    plan = Plan(
        replace(known.config, layer_pairs=None), (LayerPair(2, 2), LayerPair(4, 4)), 1, (6,), (), 50, 64
    )
    pairs = [each.plan.pairs for each in plan_stores(replace(known, plan=plan))]
    assert pairs == [(LayerPair(2, 2), LayerPair(4, 4)), (LayerPair(2, 3), LayerPair(4, 6))]
    flat = store_in(tmp_path / "c", num_layers=2, blocks=[2])
    with pytest.raises(
        ValueError, match=f"^--fdd-teacher-store {flat.path}: --fdd-layers 2 needs a teacher of at least 3"
    ):
        plan_stores(replace(context(shallow, flat), plan=plan))


def test_a_schedule_of_batch_sizes_needs_a_teacher_in_memory() -> None:
    """A finished store and a stream alike are read by a plan for one batch size."""
    args: Any = SimpleNamespace(step_batch_size_schedule="0:8 99:16")
    for follow in (False, True):
        config = FddConfig(teacher_store=(("", "S"),), teacher_follow=follow)
        with pytest.raises(
            ValueError,
            match="^--step-batch-size-schedule 0:8 99:16 with --fdd-teacher-store: how many .*leave it out, or",
        ):
            check_teachers(Context(config, args))
        check_teachers(Context(config, SimpleNamespace(step_batch_size_schedule=None)))  # type: ignore[arg-type]
    check_teachers(Context(FddConfig(teacher_load="T"), args))


def test_a_term_that_learns_has_one_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [store_in(tmp_path / name) for name in "ab"]
    known = context(*stores)
    monkeypatch.setattr("megatron_fdd.plan.teacher_store._check_content", lambda _: None)
    monkeypatch.setattr("megatron_fdd.plan.teacher_store.check_attention", lambda _: None)
    monkeypatch.setattr(
        "megatron_fdd.plan.teacher_store.module_size",
        lambda term, *_: ModuleSize({}, 3 if term.kind == "delta" else 0),
    )
    plan = Plan(known.config, (LayerPair(1, 2), LayerPair(2, 4)), 1, (6,), (), 50, 64)
    one, two = (tuple(PlannedStore(each, plan) for each in known.teacher_stores[:count]) for count in (1, 2))
    check_store(replace(known, plan=plan, planned_stores=one))
    with pytest.raises(ValueError, match="^--fdd-term delta with several teachers: it learns"):
        check_store(replace(known, plan=plan, planned_stores=two))
