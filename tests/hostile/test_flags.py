"""Flags, environments and places with which a run cannot work: each is refused in one line, and nothing is started."""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_fdd.config import FddConfig
from megatron_fdd.data.prepared import check_replaceable
from megatron_fdd.evaluate import report
from megatron_fdd.evaluate.answers import AnswersFile
from megatron_fdd.plan import checks, command_line, numbers
from megatron_fdd.plan.context import Context
from megatron_fdd.plan.modules import check_spec
from megatron_fdd.plan.numbers import check_numbers
from megatron_fdd.plan.written_files import check_folders, check_metrics_place, make_folders
from megatron_fdd.step.metrics import MetricsFile
from tests.harness.command_lines import parser_of_a_run, training_parser
from tests.hostile.flags import ENVIRONMENTS, FLAGS, UNREADABLE

TRAINS = (
    "--micro-batch-size 2 --seq-length 16 --lr 1e-3 --train-iters 10 --eval-interval 5 --teacher-load T "
    "--transformer-impl local"
).split()


def known(*words: str) -> Context:
    args = parser_of_a_run().parse_args([*TRAINS, *words])
    return Context(FddConfig.from_args(args), args)


def refuse(words: str) -> None:
    checks.make_checks(checks.BEFORE_MEGATRON, known(*words.split()), to_plan=True)


@pytest.mark.parametrize(
    "words",
    ["", "--split 99", "--split 969,30,1", "--data-path 0.5 a 1e3 b", "--data-path a b", "--data-path 1"],
)
def test_what_is_right_passes(words: str) -> None:
    refuse(words)


@pytest.mark.parametrize("words", {**FLAGS, **UNREADABLE})
def test_wrong_flags(words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape({**FLAGS, **UNREADABLE}[words])}") as error:
        refuse(words)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("words", ENVIRONMENTS)
def test_wrong_environments(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for word in words.split():
        monkeypatch.setenv(*word.split("=", 1))
    with pytest.raises(
        ValueError, match=f"^{re.escape(ENVIRONMENTS[words])}.*torchrun and fdd train set it$"
    ):
        command_line.parse_command_line()


def _said_of(value: int) -> dict[str, str | None]:
    """Return, for each number of Megatron's, what is said of `value`; None if it is taken."""
    said: dict[str, str | None] = {}
    for action in training_parser()._actions:
        if action.type not in (int, float) or action.choices or action.dest.startswith(("fdd_", "teacher_")):
            continue
        args = argparse.Namespace(skip_train=False, **{action.dest: action.type(value)})
        said[action.dest] = None
        try:
            check_numbers(Context(FddConfig(teacher_load="T"), args))
        except ValueError as error:
            said[action.dest] = str(error).removeprefix(f"{action.option_strings[0]} {action.type(value)}: ")
    return said


def test_no_number_is_below_zero() -> None:
    said = _said_of(-1)
    taken = {name for name, text in said.items() if text is None}
    assert taken == {name for name in numbers._MAY_BE_NEGATIVE if name != "window_size"}  # a pair
    assert set(said.values()) == {None, "must be at least 0", "must be at least 1"}
    assert len(said) > 300


def test_intervals_and_sizes_of_layouts_begin_at_one() -> None:
    """A flag that a new Megatron brings has to be added to the table, or here to those that it switches off."""
    said = _said_of(0)
    assert set(said.values()) == {None, "must be at least 1", "must be above 0"}
    refused = {name for name, text in said.items() if text is not None}
    assert {*refused, *PATTERNS} - {"train_iters", "no_rope_freq"} == numbers._FROM_ONE | numbers._ABOVE_ZERO
    others = ("rl_", "inference_", "inprocess_", "indexer_")  # of other programs than a training
    own = {name for name in {*said} - refused if not name.startswith(others)}
    assert {name for name in own if name.endswith(("_interval", "_parallel_size", "_iters"))} == {
        "manual_gc_interval",  # off
        "exit_interval",  # off
        "non_persistent_save_interval",  # off
        "train_sync_interval",  # off
        "eval_iters",
        "lr_warmup_iters",
        "ft_num_warmup_iters",
        "moe_routing_trace_max_training_iters",
        "model_parallel_size",  # which Megatron does not take any more
    }


PATTERNS = {"moe_layer_freq", "window_attn_skip_freq", "linear_attention_freq", "no_rope_freq"}


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_a_pattern_of_layers(name: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    wrong = {} if name == "no_rope_freq" else {"0": "0: must be at least 1"}  # 0: off
    wrong |= {"[1": "'[1' cannot be read: ", "[]*": "'[]*' cannot be read: "}
    for value, said in wrong.items():
        with pytest.raises(ValueError, match=f"{flag}:? {re.escape(said)}"):
            refuse(f"{flag} {value}")
    refuse(f"{flag} ([0]+[1]*2)*2")


@pytest.fixture
def no_hang() -> Iterator[None]:
    """End the test if it waits for a pipe."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def _pipe(path: Path) -> str:
    os.mkfifo(path)
    return "is a pipe"


def _folder(path: Path) -> str:
    path.mkdir()
    return "is a folder; name a file in it"


def _device(path: Path) -> str:
    path.symlink_to("/dev/full")  # read, it never ends
    return "is a device"


def _circle(path: Path) -> str:
    path.symlink_to(path)
    return "is a symbolic link that leads back to itself"


def _below_a_file(path: Path) -> str:
    path.parent.rmdir()
    path.parent.touch()
    return f"cannot be written: {path.parent} is a file, and a folder is needed; give another place"


def _no_file(path: Path) -> str:
    path.write_text("a letter")
    return "holds something else than metrics"


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize("make", [_pipe, _folder, _device, _circle, _below_a_file, _no_file])
def test_a_metrics_file_that_is_no_file(make: Callable[[Path], str], tmp_path: Path) -> None:
    path = tmp_path / "there" / "metrics.jsonl"
    path.parent.mkdir()
    said = make(path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=f"^--fdd-metrics-file {path}: {said}"):
        check_metrics_place(known("--fdd-metrics-file", str(path)))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_a_metrics_file_is_followed(tmp_path: Path) -> None:
    real, link = tmp_path / "disk" / "metrics.jsonl", tmp_path / "metrics.jsonl"
    real.parent.mkdir()
    link.symlink_to(real)
    check_metrics_place(known("--fdd-metrics-file", str(link)))
    assert not real.exists(), "a refused run leaves no file behind"
    for first_iteration in (1, 2):
        MetricsFile(str(link), first_iteration).write(first_iteration, {"total": 1.0})
    assert link.is_symlink()
    assert len(real.read_text().splitlines()) == 2


FOLDERS = ("--save", "--tensorboard-dir", "--wandb-save-dir", "--data-cache-path")


@pytest.mark.usefixtures("no_hang")
@pytest.mark.parametrize("flag", FOLDERS)
def test_a_folder_that_is_none(flag: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loose").symlink_to(tmp_path / "gone")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name in ("file", "pipe", "file/below", "loose", "circle", "x" * 300):
        with pytest.raises(ValueError, match=f"^{flag} {tmp_path / name}: cannot be written: .*"):
            check_folders(known(flag, str(tmp_path / name)))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    check_folders(known(flag, str(tmp_path / "link")))
    before = sorted(tmp_path.rglob("*"))
    check_folders(known(flag, str(tmp_path / "new" / "folder")))
    assert sorted(tmp_path.rglob("*")) == before, "a refused run leaves no folder behind"
    make_folders(known(flag, str(tmp_path / "new" / "folder")))
    assert (tmp_path / "new" / "folder").is_dir()
    for root in ("/", "//", "/tmp/.."):
        with pytest.raises(ValueError, match=f"^{flag} {root}: is the root of the file system"):
            check_folders(known(flag, root))


def test_a_loose_link_is_named(tmp_path: Path) -> None:
    (tmp_path / "loose").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=f"it is a link to {tmp_path}/gone, which does not exist"):
        check_folders(known("--save", str(tmp_path / "loose")))


@pytest.mark.usefixtures("no_hang")
def test_other_programs_replace_nothing_either(tmp_path: Path) -> None:
    """The same question for what reports, evaluations and prepared sets are written to."""
    _device(tmp_path / "report.html")
    with pytest.raises(ValueError, match=f"^--out {tmp_path}/report.html: is a device"):
        report._write(tmp_path / "report.html", b"")
    _pipe(tmp_path / "answers.jsonl")
    with pytest.raises(ValueError, match=f"^--out {tmp_path}/answers.jsonl: is a pipe"):
        AnswersFile(tmp_path / "answers.jsonl", {})
    (tmp_path / "report.md").symlink_to(tmp_path / "real.md")
    report._write(tmp_path / "report.md", b"text")
    assert (tmp_path / "report.md").is_symlink()
    assert (tmp_path / "real.md").read_bytes() == b"text"
    (tmp_path / "a.bin").symlink_to(tmp_path / "elsewhere.bin")
    os.mkfifo(tmp_path / "b.idx")
    for prefix, said in (
        ("a", r".*a\.bin is a symbolic link, which the set would replace"),
        ("b", "is a pipe"),
    ):
        with pytest.raises(ValueError, match=f"^--output-prefix {tmp_path}/{prefix}(.idx)?: {said}"):
            check_replaceable(str(tmp_path / prefix))
    check_replaceable(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("local", "give two words, a module and the name of a specification in it"),
        (
            "no.such.module layers",
            r"cannot import no\.such\.module \(ModuleNotFoundError: .*put it on PYTHONPATH",
        ),
        ("json layers", "json has no layers; give a name that it has"),
    ],
)
def test_layers_that_cannot_be_imported(words: str, said: str) -> None:
    """Megatron builds its usual layers instead, with a line in the log."""
    with pytest.raises(ValueError, match=f"^--spec {words}: {said}"):
        check_spec(known("--spec", *words.split()))
    check_spec(known("--spec", "json", "loads"))
    check_spec(known())
