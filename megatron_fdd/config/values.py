"""The values of single flags: how texts are read, and the bounds of numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

from megatron_fdd.config.flags import Bound
from megatron_fdd.host.given_name import fault_of
from megatron_fdd.ops.divergence import DIVERGENCES


def parse_layer_pairs(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """Read `"2:4,4:9"` as `((2, 4), (4, 9))`; None stays None.

    Raises:
        ValueError: the text is not a comma-separated list of STUDENT:TEACHER block numbers.
    """
    if text is None:
        return None
    pairs = []
    for item in text.split(","):
        student, colon, teacher = item.partition(":")
        if not (colon and student.strip().isdecimal() and teacher.strip().isdecimal()):
            raise ValueError(
                f"--fdd-layer-pairs {text!r}: {item!r} is not STUDENT:TEACHER, "
                "two 1-based block numbers such as 2:4,4:9"
            )
        pairs.append((int(student), int(teacher)))
    return tuple(pairs)


def parse_teacher_stores(words: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Read `["code=S1", "maths=S2"]` as `(("code", "S1"), ("maths", "S2"))`, and `["S"]` as `(("", "S"),)`.

    A word alone that names a folder is one, whatever signs it has.

    Raises:
        ValueError: one of several words is not NAME=DIR with a name that a folder can have, or a name is there twice.
    """
    if words is not None and len(words) == 1 and ("=" not in words[0] or os.path.isdir(words[0])):
        return (("", words[0]),)
    stores: dict[str, str] = {}
    for word in words or ():
        name, _, folder = word.partition("=")
        if not name or not folder:
            raise ValueError(
                f"--fdd-teacher-store {word}: each of several must be NAME=DIR, a name of data sets and the store of "
                "their teacher"
            )
        fault = fault_of(folder)
        if fault is not None:
            raise ValueError(
                f"--fdd-teacher-store {word!r}: give the name of a folder behind {name}=: {fault}"
            )
        if name in stores:
            raise ValueError(
                f"--fdd-teacher-store {word}: {name} has the store {stores[name]} already; give it one"
            )
        stores[name] = folder
    return tuple(stores.items())


def divergences() -> dict[str, str]:
    """Return formula and explanation of every divergence that is known by now."""
    return {name: f"{kind.formula}, {kind.explanation}" for name, kind in DIVERGENCES.items()}


def default_mixes() -> str:
    """Name the built-in divergences that have a mix, each with its own."""
    mixes = {name: kind.default_mix for name, kind in DIVERGENCES.items() if kind.default_mix is not None}
    return ", ".join(f"{name} {mix}" for name, mix in mixes.items())


def parse_term_weights(words: Sequence[str] | None) -> tuple[tuple[str, float], ...]:
    """Read `["mine=0.5"]` as `(("mine", 0.5),)`; `check_terms` later refuses a name that no term has.

    Raises:
        ValueError: anything but NAME=WEIGHT, a weight out of bounds, or a name twice.
    """
    weights: dict[str, float] = {}
    for word in words or ():
        name, _, number = word.partition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not name or not WEIGHT.holds(weight):
            raise ValueError(f"--fdd-term {word}: must be NAME=WEIGHT, the weight {WEIGHT.text}")
        if name in weights:
            raise ValueError(f"--fdd-term {word}: {name} has a weight already, {weights[name]:g}; give one")
        weights[name] = weight
    return tuple(weights.items())


AT_LEAST_0 = Bound("at least 0", lambda value: value >= 0)
ABOVE_0 = Bound("above 0, and finite", lambda value: 0 < value < math.inf)
AT_LEAST_1 = Bound("at least 1", lambda value: value >= 1)
WEIGHT = Bound("at least 0, and finite", lambda value: 0 <= value < math.inf)
MIX = Bound("between 0 and 1", lambda value: 0 < value < 1)
PROBABILITY = Bound("at least 0 and below 1", lambda value: 0 <= value < 1)
SHARE = Bound("above 0, and at most 1", lambda value: 0 < value <= 1)
# Outside these bounds float32 is too coarse. Above, the difference of two log-probabilities times temperature**2 is not
# exact enough (a loss is off by a few thousandths at 100, by a twentieth and more at 1000); below, the gradient of jsd
# is not (it is off by a few hundredths at 0.001).
TEMPERATURE = Bound(
    "from 0.01 to 100, where float32 is fine enough for the losses", lambda value: 0.01 <= value <= 100
)
