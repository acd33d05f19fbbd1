"""Options about chat templates, for every command that asks a model or prepares data."""

from __future__ import annotations

import datetime
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from megatron_fdd.data.records import parse_json
from megatron_fdd.host.disk import explain
from megatron_fdd.host.pipe import open_to_read


@dataclass(frozen=True, slots=True)
class TemplateFile:
    """The value of --chat-template."""

    path: str
    text: str


def _template(_ctx: click.Context, _option: click.Parameter, path: str | None) -> TemplateFile | None:
    if path is None:
        return None
    try:
        with io.TextIOWrapper(io.BufferedReader(open_to_read(path)), "utf-8") as file:
            return TemplateFile(path, file.read())
    except OSError as error:
        raise click.BadParameter(explain(error)) from error
    except UnicodeDecodeError as error:
        raise click.BadParameter(f"{path}: cannot be read as UTF-8 ({error}); convert it") from error
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


def _object(_ctx: click.Context, _option: click.Parameter, text: str | None) -> dict[str, Any]:
    try:
        value = parse_json(text or "{}")
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"{text}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise click.BadParameter(
            f"{text}: must be a JSON object, for example '{{\"enable_thinking\": false}}'"
        )
    return value


def _date(
    _ctx: click.Context, _option: click.Parameter, given: datetime.datetime | None
) -> datetime.date | None:
    return None if given is None else given.date()


def with_options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a decorator that adds these options, in this order."""

    def add(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return add


CHAT_TEMPLATE = (
    click.option(
        "--chat-template",
        metavar="FILE",
        callback=_template,
        help="A jinja template that replaces the tokenizer's own.",
    ),
    click.option(
        "--chat-template-kwargs",
        metavar="JSON",
        callback=_object,
        help="Switches of the chat template: '{\"enable_thinking\": false}'. A record's own override them.",
    ),
    click.option(
        "--chat-date",
        type=click.DateTime(["%Y-%m-%d"]),
        metavar="YYYY-MM-DD",
        callback=_date,
        help="The date that a chat template writes as today's. [default: today]",
    ),
)
