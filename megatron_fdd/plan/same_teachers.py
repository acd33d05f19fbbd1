"""The teachers of a run that goes on: noted in each checkpoint, and compared with those of the run that goes on."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_fdd.host.checkpoint import RELEASE
from megatron_fdd.plan.context import Context
from megatron_fdd.step.teacher.lens_file import TeacherIdentity

# Where Megatron's arguments have them, which every checkpoint holds.
_NOTED = "fdd_teachers"


@dataclass(frozen=True, slots=True)
class _Noted:
    """What tells a teacher from another one without reading it.

    Attributes:
        name: of one of several stored teachers; empty for the only one.
        folder: of its checkpoint or store, for people; a moved folder is the same teacher.
        final_norm: SHA-256; empty where nobody knows it.
        weights: of a stored teacher, the engine and dtype with which it ran and the hash of all weights, which depends
            on both.
    """

    name: str
    folder: str
    num_layers: int
    hidden_size: int
    final_norm: str
    weights: str

    def is_other(self, other: _Noted) -> bool:
        """Whether two are known to be different."""
        if (self.num_layers, self.hidden_size) != (other.num_layers, other.hidden_size):
            return True
        if _run_of(self) == _run_of(other) != "":
            return self.weights != other.weights
        return "" not in (self.final_norm, other.final_norm) and self.final_norm != other.final_norm


def note_teachers(context: Context) -> None:
    """Note the run's teachers in its arguments, and warn, on rank 0, where those of its checkpoint were others.

    A checkpoint without such a note is of an older version.
    """
    args, stored = context.args, context.stored_student
    own = list(_own(context))
    setattr(args, _NOTED, [dataclasses.asdict(each) for each in own])
    goes_on = stored is not None and stored.flag == "--load" and stored.path.name != RELEASE
    if stored is None or not goes_on or args.finetune or args.skip_train or args.rank != 0:
        return
    try:
        before = [_Noted(**each) for each in getattr(stored.args, _NOTED, [])]
    except TypeError:  # of another version
        return
    for line in _differences(before, own):
        warnings.warn(
            f"--load {stored.folder}: {line}. What the student learns changes here; if that is not meant, give the "
            "teacher of the run that saved it",
            stacklevel=2,
        )


def _own(context: Context) -> Iterator[_Noted]:
    live = context.stored_teacher
    if live is not None:
        seen = TeacherIdentity.read(live.path, live.args)
        yield _Noted("", live.folder, seen.num_layers, seen.hidden_size, seen.final_norm, "")
    for named in context.teacher_stores:
        known = named.store.identity
        weights = f"{known.engine} {known.ran.get('dtype')} {known.weights}"
        folder = str(named.store.path)
        yield _Noted(named.name, folder, known.num_layers, known.hidden_size, known.final_norm, weights)


def _differences(before: list[_Noted], own: list[_Noted]) -> Iterator[str]:
    """Yield in words each teacher that another one has taken the place of, or that has come or gone."""
    if not before or not own:  # one of both runs learns without a teacher
        return
    there, here = ({each.name: each for each in noted} for noted in (before, own))
    for name in sorted(there.keys() | here.keys()):
        called = f"the teacher {name}".rstrip()
        if name not in here or name not in there:
            names = ", ".join(sorted(filter(None, there))) or "one without a name"
            yield f"{called} is {'gone' if name in there else 'new'}; the run that saved it had {names}"
        elif there[name].is_other(here[name]):
            yield f"{called} was another one, {there[name].folder}, not {here[name].folder}"


def _run_of(noted: _Noted) -> str:
    """Return the engine and dtype with which a hash of weights can be compared."""
    return noted.weights.rpartition(" ")[0]
