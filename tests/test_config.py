"""The flags: said once by the fields, defaults of the paper, bounds, schedules."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from megatron_fdd.config import DEFAULTS, FddConfig, add_fdd_args
from megatron_fdd.config.flags import Bound, add_flags, check_bounds, flag, read_flags


def parser() -> argparse.ArgumentParser:
    return add_fdd_args(argparse.ArgumentParser())


def parse(*argv: str) -> FddConfig:
    return FddConfig.from_args(parser().parse_args(argv))


def test_defaults_are_the_papers() -> None:
    config = parse("--teacher-load", "T")
    assert config == FddConfig(teacher_load="T")
    assert (config.layers, config.alpha, config.beta, config.kd_weight, config.ce_weight) == (4, 1, 1, 1, 0)
    assert (config.kd_divergence, config.delta, config.lens_head) == ("fkl", "logprob", "detached")


def test_every_flag_arrives_in_its_field() -> None:
    """Given one after the other, each with another value than its default."""
    actions = parser()._actions[1:]  # without --help
    assert len(actions) == len(DEFAULTS)
    for action in actions:
        changed = {
            name
            for name, value in dataclasses.asdict(parse("--teacher-load", "T", *other_value(action))).items()
            if value != {**DEFAULTS, "teacher_load": "T"}[name]
        }
        assert changed == {action.dest.removeprefix("fdd_")}, action.option_strings


def other_value(action: argparse.Action) -> list[str]:
    """The flag, with a value that is not its default; a text can be read as pairs of layers too."""
    name = action.option_strings[0]
    if action.nargs == 0:
        return [name]
    if action.type in (int, float):
        return [name, "3" if action.type is int else "0.5"]
    choices = action.choices or ["mine=0.5" if action.metavar == "NAME=WEIGHT" else "1:2,3:4"]
    return [name, next(text for text in choices if text != action.default)]


MAKERS = ["us"]


@dataclass(frozen=True)
class Toy:
    """A field of each kind."""

    teacher_share: float | None = flag(None, "at most 100% of it", group="of the teacher", metavar="F")
    level: Literal["low", "high"] = flag("low", "how much", group="of the run")
    maker: str = flag("us", "whose", choices=lambda: MAKERS)
    place: str = flag("in", "where", choices=lambda: {"in": "here", "out": "there"})
    count: int = flag(2, "how many", bound=Bound("at least 2", lambda value: value >= 2))
    is_quick: bool = flag(False, "no waiting")
    words: tuple[str, ...] | None = flag(None, "some", read=lambda text: text and tuple(text.split()))
    guests: tuple[str, ...] = flag((), "one after the other")

    def __post_init__(self) -> None:
        check_bounds(self)


def parse_toy(*argv: str) -> Toy:
    made = argparse.ArgumentParser(exit_on_error=False)
    add_flags(made, Toy)
    return Toy(**read_flags(Toy, made.parse_args(argv)))


def test_a_field_says_its_flag() -> None:
    assert parse_toy() == Toy() == Toy(None, "low", "us", "in", 2, False, None, ())
    argv = "--teacher-share 0.5 --fdd-level high --fdd-count 3 --fdd-is-quick --fdd-words=a --fdd-maker us"
    argv += " --fdd-guests b --fdd-guests=c --fdd-place out"
    assert parse_toy(*argv.split()) == Toy(0.5, "high", "us", "out", 3, True, ("a",), ("b", "c"))
    for wrong in ("--fdd-level middle", "--fdd-count 2.5", "--teacher-share half"):
        with pytest.raises(
            argparse.ArgumentError, match=rf"{wrong.split()[0]}: invalid .*{wrong.split()[1]}"
        ):
            parse_toy(*wrong.split())
    with pytest.raises(ValueError, match="--fdd-count 1: must be at least 2"):
        Toy(count=1)


def test_an_open_set_has_what_is_there_when_the_parser_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        argparse.ArgumentError, match="--fdd-maker: 'them' is none of us; if a plug-in .* --fdd-plugin$"
    ):
        parse_toy("--fdd-maker", "them")
    with pytest.raises(ValueError, match="--fdd-maker 'them' is none of us; if a plug-in"):
        Toy(maker="them")
    monkeypatch.setattr(f"{__name__}.MAKERS", ["us", "them"])
    assert parse_toy("--fdd-maker", "them") == Toy(maker="them")


def test_help_says_what_the_fields_say() -> None:
    made = argparse.ArgumentParser()
    add_flags(made, Toy)
    teacher, run = made.format_help().split("of the teacher:\n")[1].split("of the run:\n")
    assert " ".join(teacher.split()) == "--teacher-share F at most 100% of it"
    assert " ".join(run.split()) == (
        "--fdd-level {low,high} how much (low) --fdd-maker {us} whose (us) "
        "--fdd-place {in,out} where; in: here; out: there (in) --fdd-count FDD_COUNT how many (2) "
        "--fdd-is-quick no waiting --fdd-words FDD_WORDS some --fdd-guests FDD_GUESTS one after the other"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--fdd-alpha -1", "--fdd-alpha -1.0: must be at least 0"),
        ("--fdd-temperature 0", "--fdd-temperature 0.0: must be from 0.01 to 100"),
        ("--fdd-temperature 1e-30", "--fdd-temperature 1e-30: must be from 0.01 to 100"),
        ("--fdd-temperature 101", "--fdd-temperature 101.0: must be from 0.01 to 100"),
        ("--fdd-temperature nan", "--fdd-temperature nan: must be from 0.01 to 100"),
        ("--fdd-divergence-mix 1", "--fdd-divergence-mix 1.0: must be between 0 and 1"),
        ("--fdd-layers 0", "--fdd-layers 0: must be at least 1"),
        (
            "--teacher-expert-model-parallel-size 0",
            "--teacher-expert-model-parallel-size 0: must be at least 1",
        ),
        ("--teacher-lens L --fdd-lens-norm none", "--teacher-lens L: a lens file is made for the final norm"),
        ("--fdd-beta nan", "--fdd-beta nan: must be at least 0"),
        ("--fdd-kd-weight inf", "--fdd-kd-weight inf: must be at least 0, and finite"),
        ("--fdd-warmup-iters -2", "--fdd-warmup-iters -2: must be at least 0"),
        ("--fdd-term mine", "--fdd-term mine: must be NAME=WEIGHT, the weight at least 0, and finite"),
        ("--fdd-term =1", "--fdd-term =1: must be NAME=WEIGHT"),
        ("--fdd-term mine=inf", "--fdd-term mine=inf: must be NAME=WEIGHT"),
        ("--fdd-term mine=-1", "--fdd-term mine=-1: must be NAME=WEIGHT"),
        ("--fdd-term a=1 --fdd-term a=2", "--fdd-term a=2: a has a weight already, 1; give one"),
        ("--fdd-skip-below 1", "--fdd-skip-below 1.0: must be at least 0 and below 1"),
        ("--fdd-decay-iters -1", "--fdd-decay-iters -1: must be at least 0"),
        ("--fdd-sample-tokens 0", "--fdd-sample-tokens 0.0: must be above 0, and at most 1"),
        ("--fdd-sample-tokens 1.5", "--fdd-sample-tokens 1.5: must be above 0, and at most 1"),
        ("--fdd-sample-tokens nan", "--fdd-sample-tokens nan: must be above 0, and at most 1"),
    ],
)
def test_wrong_values_are_refused(argv: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse("--teacher-load", "T", *argv.split())


def test_every_number_has_a_bound() -> None:
    numbers = [action for action in parser()._actions if action.type in (int, float)]
    assert len(numbers) > 10
    for action in numbers:
        name = action.option_strings[0]
        for wrong in ("-1", *["nan"] * (action.type is float)):
            with pytest.raises(ValueError, match=rf"^{name} {wrong}(\.0)?: must be "):
                parse("--teacher-load", "T", name, wrong)


@pytest.mark.parametrize(
    ("options", "scales"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup_iters": 4}, [0.25, 0.5, 0.75, 1, 1]),
        ({"decay_iters": 4}, [1, 0.75, 0.5, 0.25, 0]),
        ({"warmup_iters": 2, "decay_iters": 4}, [0.5, 0.75, 0.5, 0.25, 0]),
    ],
)
def test_weights_of_inner_layers_rise_and_fall(options: dict[str, Any], scales: list[float]) -> None:
    config = FddConfig(teacher_load="T", **options)
    assert [config.weight_scale(iteration) for iteration in range(5)] == scales


def test_stores_of_teachers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse("--fdd-teacher-store", "S").teacher_store == (("", "S"),)
    several = parse("--fdd-teacher-store", "code=S1", "maths=S=2", "--fdd-layers", "3").teacher_store
    assert several == (("code", "S1"), ("maths", "S=2"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    assert parse("--fdd-teacher-store", "lr=1").teacher_store == (("", "lr=1"),)
    for words in (("S", "code=S1"), ("=S", "code=S1"), ("code=", "maths=S"), ("code=S1", "code=S2")):
        with pytest.raises(ValueError, match="^--fdd-teacher-store "):
            parse("--fdd-teacher-store", *words)
