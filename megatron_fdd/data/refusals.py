"""Refusals of records: where the record is, why it is not used, and what to do about all records of that kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum


class Reason(Enum):
    """Why a record is refused, in the words of the summary; each with its remedy."""

    MALFORMED = "malformed", "mend the file, or leave these records out with --skip-refused"
    FIELDS = "fields that no layout has", "name or rename the fields (fdd prepare --help lists the layouts)"
    MEDIA = "images or other parts that are not text", "leave these records out with --skip-refused"
    EMPTY = "empty", "leave these records out with --skip-refused"
    NOTHING_LEARNED = "nothing in it is learned", "leave these records out with --skip-refused"
    TOO_LONG = (
        "its prompt fills --seq-length",
        "raise --seq-length, or leave these records out with --skip-refused",
    )
    DROPPED = (
        "the chat template drops a field",
        "give a template that writes it (--chat-template FILE), or allow it with --allow-dropped",
    )
    NOT_FOLLOWED = (
        "the answer does not follow its generation prompt",
        "set the template's own switches with --chat-template-kwargs, or give another with --chat-template FILE",
    )
    RAISED = (
        "the chat template refuses it",
        "change the record, or give another template with --chat-template FILE",
    )
    NO_TEMPLATE = (
        "the tokenizer has no chat template",
        "give one with --chat-template FILE, or use the fields prompt and response",
    )
    NO_STOP = "no token ends the answer", "give a template that ends a turn with one (--chat-template FILE)"

    @property
    def title(self) -> str:
        """The reason in a few words."""
        return self.value[0]

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return self.value[1]


class Refusal(ValueError):  # noqa: N818
    """The error of a record that cannot be used.

    Args:
        where: file and line, element or row of the record.
        reason: the kind of refusal, for counting.
        detail: what is wrong with this record.
    """

    def __init__(self, where: str, reason: Reason, detail: str) -> None:
        super().__init__(f"{where}: {detail}; {reason.remedy}")
        self.where, self.reason, self.detail = where, reason, detail

    def __reduce__(self) -> tuple[type[Refusal], tuple[str, Reason, str]]:
        return Refusal, (self.where, self.reason, self.detail)  # it crosses from a worker to its parent


class Fault(ValueError):  # noqa: N818
    """What is wrong with a record, raised where the record's place is not known; `refusing` adds the place."""

    def __init__(self, detail: str, reason: Reason = Reason.MALFORMED) -> None:
        super().__init__(detail)
        self.reason = reason


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turn whatever goes wrong with the record at `where` into its refusal.

    Raises:
        Refusal: in place of any exception but a `Refusal` or a `MemoryError`.
    """
    try:
        yield
    except (Refusal, MemoryError):
        raise
    except Fault as error:
        raise Refusal(where, error.reason, str(error)) from error
    except RecursionError as error:
        raise Refusal(where, Reason.MALFORMED, "is nested too deeply") from error
    except ValueError as error:
        raise Refusal(where, Reason.MALFORMED, str(error)) from error
    except Exception as error:  # a record can hold anything
        detail = f"cannot be read ({type(error).__name__}: {error})"
        raise Refusal(where, Reason.MALFORMED, detail) from error
