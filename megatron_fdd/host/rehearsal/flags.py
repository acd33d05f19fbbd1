"""The command-line flags of Megatron that a rehearsal needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from megatron_fdd.host.process import is_first_rank

# Megatron's default, or a recipe's value, may need a GPU: these values replace whatever was given.
_FORCED: dict[str, str] = {
    "--transformer-impl": "local",
    "--distributed-backend": "gloo",
    "--attention-backend": "unfused",
}
# Not --no-bias-gelu-fusion: it would select another function (erf instead of tanh), and the fusion runs anywhere.
_SWITCHES = (
    "--use-cpu-initialization",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-dropout-fusion",
    "--no-rope-fusion",
)
# A worker process for each loader costs a rehearsal more time than the reading.
_PREFERRED: dict[str, str] = {"--num-workers": "0"}
# Faster ways to the same numbers that need a GPU, or processes that a rehearsal does not start.
_DROPPED = (
    "--async-save",
    "--tp-comm-overlap",
    "--cross-entropy-loss-fusion",
    "--moe-permute-fusion",
    "--moe-router-fusion",
    "--use-precision-aware-optimizer",
    "--optimizer-cpu-offload",
)
# The same for flags with a value: which values are dropped (an empty tuple: all).
_DROPPED_PAIRS: dict[str, tuple[str, ...]] = {"--cuda-graph-impl": ("local", "transformer_engine")}
# Flags for TransformerEngine. A plan keeps them: it builds nothing, and must show what they mean.
_FP8 = ("--first-last-layers-bf16", "--moe-router-padding-for-fp8", "--moe-router-padding-for-quantization")
_FP8_PAIRS: dict[str, tuple[str, ...]] = dict.fromkeys(
    (
        *("--fp8-format", "--fp8-recipe", "--teacher-fp8-format", "--teacher-fp8-recipe"),
        "--te-precision-config-file",
    ),
    (),
)
_MODULES, _PLAN = "--transformer-impl", "--fdd-dry-run"


def add_flags(argv: list[str]) -> list[str]:
    """Return a copy of `argv` (flags as in sys.argv) with which Megatron's own parser sets up a rehearsal.

    A flag of a recipe that needs a GPU is overruled, with a warning on rank 0. Calling this twice is harmless.
    """
    plans = _PLAN in argv
    forced = {flag: value for flag, value in _FORCED.items() if not (plans and flag == _MODULES)}
    switches = _DROPPED if plans else _DROPPED + _FP8
    pairs = _DROPPED_PAIRS if plans else _DROPPED_PAIRS | _FP8_PAIRS

    def is_dropped(flag: str, value: str) -> bool:
        return flag in switches or (flag in pairs and value in (pairs[flag] or (value,)))

    given = _given(argv)
    overruled = [f"{flag} {value}".rstrip() for flag, value in given if forced.get(flag, value) != value]
    overruled += [f"{flag} {value}".rstrip() for flag, value in given if is_dropped(flag, value)]
    if overruled and is_first_rank():
        warnings.warn(f"no effect in a rehearsal on CPUs: {', '.join(overruled)}", stacklevel=2)
    kept = _without(argv, is_dropped)
    last = dict(_given(kept))
    for flag, value in forced.items():
        if last.get(flag) != value:
            kept += [flag, value]  # argparse takes the last value of a flag that is given twice
    for flag, value in _PREFERRED.items():
        if flag not in last:
            kept += [flag, value]
    return kept + [switch for switch in _SWITCHES if switch not in last]


def _without(argv: list[str], is_dropped: Callable[[str, str], bool]) -> list[str]:
    """Return the words without the dropped flags and their values."""
    kept, words = [], iter(zip(argv, [*argv[1:], "--"], strict=False))
    for word, following in words:
        flag, separator, value = word.partition("=")
        if not word.startswith("--") or not is_dropped(flag, value if separator else following):
            kept.append(word)
        elif not separator and not following.startswith("--"):
            next(words)
    return kept


def _given(argv: list[str]) -> list[tuple[str, str]]:
    """Return the flags in `argv` with their first value ("" for a switch), also when written `--flag=value`."""
    pairs = []
    for word, following in zip(argv, [*argv[1:], "--"], strict=False):  # without flags, one more
        if word.startswith("--"):
            flag, separator, value = word.partition("=")
            pairs.append((flag, value if separator or following.startswith("--") else following))
    return pairs
