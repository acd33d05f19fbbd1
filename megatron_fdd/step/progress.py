"""The lines of a run for people: a step, a validation, a checkpoint, the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_fdd.host import console


@dataclass(frozen=True, slots=True)
class Step:
    """One step's report; `tokens` (with a label) and `seconds` cover all steps since the last line."""

    iteration: int
    values: Mapping[str, float | None]
    learning_rate: float | None
    grad_norm: float | None
    tokens: float
    seconds: float


class Progress:
    """The lines on rank 0 that tell how far a run is.

    Args:
        num_iterations: returns how many steps the whole run has, including the steps before a resumption; called for
            each line, because with `--train-samples` Megatron computes the number late.
        terms: the kinds of terms that have a weight, in the order of their display.
        teachers: names of several teachers, whose totals are shown; none with one.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        num_iterations: Callable[[], int],
        terms: tuple[str, ...],
        *,
        teachers: Sequence[str] = (),
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] = console.say,
    ) -> None:
        self._num_iterations = num_iterations
        self._terms, self._totals = terms, [f"total {name}" for name in teachers]
        self._clock, self._say = clock, say
        self._started_s = clock()
        self._first: tuple[int, float] | None = None
        self._last_iteration: int | None = None

    @property
    def has_begun(self) -> bool:
        """Whether a step is done; known only on rank 0."""
        return self._last_iteration is not None

    def made(self, iteration: int) -> None:
        """Note that a step is done, with or without a line."""
        self._last_iteration = iteration

    def step(self, step: Step) -> None:
        """Write one line; the time left follows from all steps since the first line, validations and saves included."""
        self.made(step.iteration)
        fields = [
            self._head("step", step.iteration),
            f"{_duration(self._seconds_left(step))} left",
            f"{step.tokens / max(step.seconds, 1e-9):,.0f} tok/s",
            *self._losses(step.values),
            f"lr {_or_dash(step.learning_rate, '.1e')}",
            f"grad {_or_dash(step.grad_norm, '.2f')}",
        ]
        self._say(" | ".join(fields))

    def evaluation(self, name: str, iteration: int, values: Mapping[str, float]) -> None:
        """Write one line; `name` is valid, test or, after the last step, final."""
        self._say(" | ".join([self._head(name, iteration), *self._losses(values)]))

    def saved(self, iteration: int, folder: str, seconds: float, *, is_on_disk: bool = True) -> None:
        """Write one line about a checkpoint."""
        how = f"in {seconds:.0f} s" if is_on_disk else "in the background"
        self._say(f"{self._head('saved', iteration)} | {folder} | {how}")

    def end(self, saved_in: str | None, *, loaded_iteration: int = 0) -> None:
        """Write the last line.

        Args:
            saved_in: the folder of --save.
            loaded_iteration: how many steps the checkpoint had from which this run started.
        """
        num, last = self._num_iterations(), self._last_iteration
        if last is None and loaded_iteration >= num > 0:
            how = f"nothing left to do: {loaded_iteration} of {num} steps were done before this start"
        elif last is None:
            how = "ended without a training step"
        else:
            how = f"done: {last} steps" if last >= num else f"stopped after step {last} of {num}"
        where = "nothing saved (no --save)" if saved_in is None else f"checkpoint: {saved_in}"
        self._say(f"{how}; {_duration(self._clock() - self._started_s)} in all; {where}")

    def interrupted(self, saved_in: str | None, saved_iteration: int | None) -> None:
        """Write the last line after Ctrl-C or SIGTERM.

        Args:
            saved_in: the folder of --save.
            saved_iteration: step of the newest checkpoint in it; None without one.
        """
        after = (
            "before the first step" if self._last_iteration is None else f"after step {self._last_iteration}"
        )
        if saved_in is None:
            rest = "nothing saved (no --save)"
        elif saved_iteration is None:
            rest = f"no checkpoint yet in {saved_in}"
        else:
            rest = f"the same command goes on after step {saved_iteration}, from {saved_in}"
        self._say(f"interrupted {after} of {self._num_iterations()}; {rest}")

    def _head(self, what: str, iteration: int) -> str:
        total = str(self._num_iterations())
        return f"{what:5} {iteration:{len(total)}}/{total}"

    def _losses(self, values: Mapping[str, float | None]) -> list[str]:
        shown = [[name for name in names if name in values] for names in (self._totals, self._terms)]
        parts = ["  ".join(f"{name} {_loss(values[name])}" for name in names) for names in shown if names]
        return [f"total {_loss(values.get('total'))}", *parts]

    def _seconds_left(self, step: Step) -> float:
        now = self._clock()
        if self._first is None:
            self._first = step.iteration, now
            return step.seconds * (self._num_iterations() - step.iteration)
        first_iteration, first_s = self._first
        per_step = (now - first_s) / max(1, step.iteration - first_iteration)
        return per_step * (self._num_iterations() - step.iteration)


def _loss(value: float | None) -> str:
    """Write a loss with about four digits."""
    if value is None:
        return "-"
    if value == 0 or 0.1 <= abs(value) < 1000:
        return f"{value:.3f}"
    return f"{value:.4f}" if 0.01 <= abs(value) < 0.1 else f"{value:.2e}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float) -> str:
    """Write seconds as a clock does: 41 -> 00:41, 3700 -> 1:01:40."""
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute:02}:{second:02}"
