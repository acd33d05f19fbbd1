"""Command lines that cannot be read: empty texts, unknown choices, ranks that are not numbers."""

from __future__ import annotations

import argparse
import warnings

import pytest

from megatron_fdd.config import OLD_NAMES
from megatron_fdd.plan import command_line
from tests.harness.command_lines import parser_of_a_run as parser


def test_every_flag_refuses_an_empty_value_by_name() -> None:
    flags = [
        action.option_strings[-1]
        for action in parser()._actions
        if action.option_strings and action.nargs != 0 and action.default != ""
    ]
    assert {"--save", "--load", "--split", "--teacher-load", "--fdd-metrics-file", "--data-path"} < {*flags}
    for flag in flags:
        with pytest.raises(
            ValueError, match=rf"{flag}\b.*(its value is empty|invalid (int|float) value: ''|expected)"
        ):
            parser().parse_args([f"{flag}="])


def test_a_flag_is_taken_by_its_old_name_with_a_warning() -> None:
    def parse(words: str) -> argparse.Namespace:
        return parser().parse_args(words.split())

    for old, new in OLD_NAMES.items():
        assert parse(f"{old} 3") == parse(f"{new} 3") != parse("")
        with pytest.raises(ValueError, match=f"argument {new}: invalid"):
            parse(f"{old} many")
        assert f"{new} " in parser().format_help()
        assert old not in parser().format_help()
        for words in ([old, "3"], [f"{old}=3"]):
            with pytest.warns(UserWarning, match=f"{old} is now {new}: use that"):
                command_line._warn_of_old_names(words)
        with warnings.catch_warnings(action="error"):
            command_line._warn_of_old_names([new, old.removeprefix("--")])


def test_a_value_that_is_no_name_is_refused_by_its_flag() -> None:
    """Every flag that takes a text is asked, so that one that is added has no way round."""
    names = {
        action.option_strings[-1]
        for action in parser()._actions
        if getattr(action.type, "__name__", "") in ("text", "str") and not action.choices
    }
    assert {"--save", "--load", "--teacher-load", "--tensorboard-dir", "--data-path"} < names
    assert {"--fdd-metrics-file", "--fdd-teacher-store", "--data-cache-path", "--tokenizer-model"} < names
    texts = {flag for flag in names if flag.startswith("--fim-")} | {
        *("--chat-template", "--tokenizer-special-tokens", "--sft-tokenizer-prompt-format"),
        "--heterogeneous-layers-config-encoded-json",
    }
    for flag in names - texts:
        with pytest.raises(ValueError, match=rf"^argument {flag}: its value is blank"):
            parser().parse_args([flag, " "])
    for flag in texts:
        parser().parse_args([flag, " a\n"])
    for value in (" runs/a", "runs/a ", "runs/a\n", "runs/\x1b"):
        with pytest.raises(
            ValueError, match=r"argument --save: .* (with a blank|control character); leave that out"
        ):
            parser().parse_args(["--save", value])


def test_an_empty_value_among_others_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--data-path: its value is empty \(an unset variable\?\)"):
        parser().parse_args(["--data-path", "0.5", "", "0.5", "b"])


@pytest.mark.parametrize(
    ("flag", "known"), [("--attention-backend", "flash, fused, unfused"), ("--exit-signal", ".*SIGTERM")]
)
def test_an_unknown_member_of_an_enum_is_refused(flag: str, known: str) -> None:
    """Megatron's own parser ends with a KeyError."""
    with pytest.raises(ValueError, match=rf"{flag}: 'typo': must be one of {known}.* \(see --help\)"):
        parser().parse_args([flag, "typo"])
    assert vars(parser().parse_args(["--attention-backend", "flash"]))["attention_backend"].name == "flash"


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("WORLD_SIZE", "abc", 1), ("WORLD_SIZE", "0", 1), ("RANK", "-1", 0), ("RANK", "", 0)],
)
def test_a_rank_that_is_no_number_is_refused(
    name: str, value: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value}: must be a whole number of at least {least}; "):
        command_line.parse_command_line()
