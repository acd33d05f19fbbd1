"""Two teachers by their stores, each of one data set of a blend: `--fdd-teacher-store code=S1 maths=S2`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_fdd.data.store.store import Store
from tests.entry.checks import assert_refused
from tests.entry.command import TIMES, read_metrics, run, trained
from tests.entry.conftest import Toys, make_checkpoint
from tests.entry.stored import EVALUATION, RELATIVE, teach
from tests.harness.ranks import Layout, run_on_ranks


def blend(toy: Toys, folder: Path) -> list[str]:
    """Make two data sets of the toy's text, and return the flags of their blend."""
    for name in ("code", "maths"):
        (folder / name).mkdir()
        for file in toy.root.glob("text.*"):
            shutil.copy(file, folder / name / file.name)
    return ["--data-path", "0.6", str(folder / "code" / "text"), "0.4", str(folder / "maths" / "text")]


def with_whole_sets(command: list[str], data: list[str]) -> list[str]:
    """Return a command with the same training data, and each set's whole validation, which has no weights."""
    at = command.index("--data-path")
    end = next(place for place in range(at + 1, len(command)) if command[place].startswith("--"))
    kept = [*command[:at], *command[end:]]
    for flag, words in (("--split", 2), ("--data-path", 5)):
        at = kept.index(flag)
        kept = [*kept[:at], *kept[at + words :]]
    whole = "--full-validation --multiple-validation-sets --valid-data-path".split()
    return [*kept, "--train-data-path", *data[1:], *whole, data[2], data[4]]


def stored(live: list[str], *stores: object) -> list[str]:
    """Return a live run's flags with stores in its teacher's place."""
    at = live.index("--teacher-load")
    return [*live[:at], "--fdd-teacher-store", *map(str, stores), *live[at + 2 :]]


def test_two_stores_of_one_teacher_teach_what_it_teaches_alone(toy: Toys, tmp_path: Path) -> None:
    """Each store has the features of its own data set alone, so that no sample can be taught from the other one."""
    data, code, maths = blend(toy, tmp_path), tmp_path / "S1", tmp_path / "S2"
    both = ("--fdd-teacher-store", f"code={code}", f"maths={maths}")
    live, found = tmp_path / "live.jsonl", tmp_path / "found.jsonl"
    tensor = "--tensor-model-parallel-size 2 --sequence-parallel".split()
    flags = [*EVALUATION, *data]
    _, _, _, plan, told = trained(
        teach(toy, code, *data, *both),
        teach(toy, maths, *data, *both),
        toy.command(*flags, "--fdd-metrics-file", live),
        stored(toy.command(*flags, "--fdd-dry-run"), *both[1:]),
        stored(toy.command(*flags, "--fdd-metrics-file", found, *tensor, "--num-workers", 1), *both[1:]),
    )
    sizes = [len(Store.open(path, "--store").index) for path in (code, maths)]
    assert min(sizes) > 0
    assert sum(sizes) == 32
    for name, path, size in (("code", code, sizes[0]), ("maths", maths, sizes[1])):
        assert f"  teacher {name}: features of " in plan[0].out
        assert f"    it teaches {tmp_path / name / 'text'}\n" in plan[0].out
        assert f"all {size} units of this run's data of {name} are in {path} (" in told[0].out
        assert f"teacher {name} cross-entropy on the first batch: " in told[0].out
    for record, wanted in zip(read_metrics(found), read_metrics(live), strict=True):
        for term, value in wanted.items():
            if term not in TIMES:
                assert record[term] == pytest.approx(value, rel=RELATIVE), term
        is_step = "tokens" in record
        prefix = "" if is_step else "valid "
        assert record[f"{prefix}kd code"] != record[f"{prefix}kd maths"]
        if is_step:
            shares = [record[f"tokens {name}"] / record["tokens"] for name in ("code", "maths")]
            assert sum(shares) == 1
            total = sum(
                share * record[f"total {name}"] for share, name in zip(shares, ("code", "maths"), strict=True)
            )
            assert record["total"] == pytest.approx(total, rel=RELATIVE)
    assert "  total code " in told[0].out.replace("| total code", "  total code")


@pytest.mark.tier("all")
def test_teachers_may_differ_in_depth_and_width(toy: Toys, tmp_path: Path) -> None:
    """With several stages, whole validation sets and filler; the run goes on from its checkpoint."""
    wider = {"num_hidden_layers": 9, "hidden_size": 60}
    arguments = {"root": tmp_path, "name": "wider", "changes": wider}
    run_on_ranks(make_checkpoint, Layout(ranks=1), arguments)
    data, code, maths = blend(toy, tmp_path), tmp_path / "S1", tmp_path / "S2"
    both = ("--fdd-teacher-store", f"code={code}", f"maths={maths}")
    second = teach(toy, maths, *data, *both)
    second[second.index("--teacher") + 1] = str(tmp_path / "wider")
    found, save = tmp_path / "found.jsonl", ("--save", tmp_path / "run", "--save-interval", 2)
    pipeline = "--pipeline-model-parallel-size 2".split()
    flags = ["--fdd-metrics-file", found, *save, *pipeline]
    commands = [
        teach(toy, code, *data, *both),
        second,
        stored(toy.command(*EVALUATION, *data, *flags, "--exit-interval", 2), *both[1:]),
        stored(toy.command(*EVALUATION, *data, *flags, "--load", tmp_path / "run"), *both[1:]),
    ]
    trained(*(with_whole_sets(command, data) for command in commands))
    first, *others = read_metrics(found)
    assert [record["iteration"] for record in others] == [2, 3, 3]
    own = {f"trajectory {pair}" for pair in ("s1:t2 code", "s2:t4 code", "s1:t3 maths", "s2:t6 maths")}
    assert own == {name for name in first if name.startswith("trajectory s")}


def test_what_several_teachers_cannot_do_is_refused(toy: Toys, tmp_path: Path) -> None:
    data, store = blend(toy, tmp_path), tmp_path / "S"
    live = toy.command(*data)
    other, lens, wrong, twice, elsewhere, mock, load = run(
        stored(live, f"code={store}"),
        [*stored(live, f"code={store}", f"maths={store}"), "--teacher-lens", "tuned.safetensors"],
        stored(live, store, f"maths={store}"),
        stored(live, f"code={store}", f"code={store}"),
        teach(toy, tmp_path / "T", *data, "--fdd-teacher-store", f"code={store}", f"maths={store}"),
        stored(toy.mock_command(), f"code={store}", f"maths={store}"),
        [*live, "--fdd-teacher-store", f"code={store}", f"maths={store}"],
        ranks=1,
    )
    assert_refused(
        other, rf"no teacher for the data set {tmp_path}/maths/text: the data sets are .*; the names are code"
    )
    assert_refused(
        lens, "--teacher-lens tuned.safetensors with several teachers: a lens file is of one teacher"
    )
    assert_refused(wrong, "each of several must be NAME=DIR")
    assert_refused(twice, "code has the store .* already; give it one")
    assert_refused(elsewhere, "is none of the stores of --fdd-teacher-store code=")
    assert_refused(
        mock, "--mock-data and data of a training script have no prefix in which a name could be found"
    )
    assert_refused(load, "a run has one teacher; leave one out")
