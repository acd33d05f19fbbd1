"""The command line of a run: Megatron's parser with our flags; every mistake in it becomes one ValueError."""

from __future__ import annotations

import argparse
import enum
import math
import os
import re
import sys
import warnings
from collections.abc import Iterable
from typing import NoReturn

from megatron.training.arguments import parse_args

from megatron_fdd.config import OLD_NAMES, add_fdd_args
from megatron_fdd.host.given_name import fault_of
from megatron_fdd.host.layer_specs import SPEC_ARGS
from megatron_fdd.host.process import is_first_rank

# Megatron reads these variables before any flag.
_COUNTS = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_LAUNCHERS = "torchrun and fdd train set it"
# Flags whose values Megatron evaluates: lists of zeros and ones such as ([0]+[1]*3)*8.
_PATTERNS = frozenset(("moe_layer_freq", "no_rope_freq", "window_attn_skip_freq", "linear_attention_freq"))
_LONGEST_PATTERN = 1_000_000
# How the names in `args` begin of flags whose values may have blanks and line ends: tokens, templates, JSON.
_FREE_TEXTS = (
    *("fim_", "chat_template", "special_tokens", "sft_tokenizer_prompt_format"),
    "heterogeneous_layers_config_encoded_json",
)


def parse_command_line() -> tuple[argparse.Namespace, dict[str, object]]:
    """Parse `sys.argv`.

    Returns:
        The namespace, and the default of every flag.

    Raises:
        ValueError: names the flag or the variable of the launcher with a wrong value.
    """
    _check_launch()
    defaults: dict[str, object] = {}

    def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        add_fdd_args(parser)
        parser.set_defaults(**dict.fromkeys(SPEC_ARGS))  # no flags: a checkpoint has them
        for action in parser._actions:
            defaults.setdefault(action.dest, action.default)  # the first counts, as in argparse
            if action.dest == "yaml_cfg":
                action.type = _refuse_yaml
            _name_wrong_values(action)
        _mend_help(parser)
        # argparse would print its usage and exit on every rank; this raises one error, like all other checks.
        parser.error = _argument_error  # type: ignore[method-assign]
        if not is_first_rank():
            parser.print_help = _print_nothing  # type: ignore[method-assign, assignment]
        return parser

    args = parse_args(add_args)
    if is_first_rank():
        _warn_of_old_names(sys.argv[1:])
    return args, defaults


def _check_launch() -> None:
    """Refuse an environment whose ranks are not numbers, or more than the ranks that it says there are."""
    counts = {}
    for name in _COUNTS:
        least = int(name == "WORLD_SIZE")
        value = os.environ.get(name, str(least))
        if not re.fullmatch(r"[0-9]{1,9}", value) or int(value) < least:
            raise ValueError(f"{name}={value}: must be a whole number of at least {least}; {_LAUNCHERS}")
        counts[name] = int(value)
    if counts["RANK"] >= counts["WORLD_SIZE"]:
        raise ValueError(
            f"RANK={counts['RANK']}: must be below WORLD_SIZE={counts['WORLD_SIZE']}; {_LAUNCHERS}"
        )


def _name_wrong_values(action: argparse.Action) -> None:
    """Make a flag refuse a value that is no name by the flag's name; an unset shell variable leaves an empty one.

    An unknown member of an enum is refused too: Megatron's parser (0.19.2) ends with a bare KeyError on it.
    """
    read = action.type
    if read in (int, float) or action.nargs == 0:  # numbers refuse it already
        return

    is_name = read in (None, str) and not action.dest.startswith(_FREE_TEXTS)

    def text(value: str) -> object:
        fault = fault_of(value) if is_name or not value else None
        if fault is not None and value != action.default:
            raise argparse.ArgumentTypeError(fault)
        if action.dest in _PATTERNS:
            _check_pattern(value)
        try:
            return read(value) if callable(read) else value
        except KeyError as error:
            names = [each.name for each in action.choices or () if isinstance(each, enum.Enum)]
            allowed = f"must be one of {', '.join(names)}" if names else "there is no such name"
            raise argparse.ArgumentTypeError(f"{value!r}: {allowed}") from error
        except (AssertionError, SyntaxError) as error:  # of a pattern of layers, which Megatron evaluates
            raise argparse.ArgumentTypeError(f"{value!r} cannot be read: {error}") from error

    text.__name__ = getattr(read, "__name__", "text")  # argparse writes this name in its message
    action.type = text


def _check_pattern(value: str) -> None:
    """Refuse a pattern of layers that would fill the memory, or never end, when Megatron evaluates it."""
    numbers = [int(each) for each in re.findall("[0-9]{1,9}", value)]
    if "**" in value or re.search("[0-9]{10}", value) or math.prod(filter(None, numbers)) > _LONGEST_PATTERN:
        raise argparse.ArgumentTypeError(f"{value!r}: more layers than any model has; write it shorter")


def _refuse_yaml(_path: str) -> NoReturn:
    """Refuse Megatron's file of flags, which would take the place of the whole command line."""
    raise argparse.ArgumentTypeError("would replace all other flags; give its entries as flags")


def _warn_of_old_names(words: Iterable[str]) -> None:
    """Warn of flags under names that the next release will not take."""
    given = {word.partition("=")[0] for word in words}
    for old in OLD_NAMES.keys() & given:
        warnings.warn(
            f"{old} is now {OLD_NAMES[old]}: use that, the next release will not take the old name",
            stacklevel=2,
        )


def _mend_help(parser: argparse.ArgumentParser) -> None:
    """Escape the bare % in one of Megatron's help texts (0.19.2), which would make `--help` fail."""
    for action in parser._actions:
        try:
            _ = (action.help or "") % {**vars(action), "prog": parser.prog}
        except ValueError:
            action.help = str(action.help).replace("%", "%%")


def _print_nothing(_file: object = None) -> None:
    """Print no help: thousands of lines are enough on one rank."""


def _argument_error(message: str) -> NoReturn:
    raise ValueError(f"{message} (see --help)")
