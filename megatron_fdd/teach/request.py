"""The command line of a producer: its own flags, and those of the training whose data it reads."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, get_args

from megatron_fdd.config import FddConfig, add_fdd_args
from megatron_fdd.data.store.identity import TapForm
from megatron_fdd.host.given_name import fault_of
from megatron_fdd.losses.pairs import sample_blocks
from megatron_fdd.teach.following import Following, add_stream_flags, following
from megatron_fdd.teach.vllm.flags import ServerRequest, add_flags, server_request
from megatron_fdd.teach.words import STORES, cut, teachers_of

ENGINES = ("megatron", "transformers", "vllm")
DTYPES = ("bfloat16", "float32")
# Flags of a training that a producer has no use for, and how many words stand behind each; None: up to the next flag.
_NOT_HERE = {
    STORES: None,
    **dict.fromkeys(("--load", "--save", "--save-interval", "--pretrained-checkpoint", "--ckpt-step"), 1),
    **dict.fromkeys(("--teacher-load", "--teacher-lens", "--fdd-metrics-file"), 1),
    **dict.fromkeys(("--use-checkpoint-args", "--finetune", "--async-save"), 0),
}
# Flags that choose blocks, which are read here.
_CHOICE = ("--fdd-layers", "--fdd-layer-rule", "--fdd-layer-pairs")
_UNCOUNTED = (
    "how much such a training reads cannot be told beforehand; give the --train-iters and --global-batch-size that "
    "read as much"
)
# Flags that are refused, and why.
_WRONG_HERE = {
    "--phase-transition-iterations": _UNCOUNTED,
    "--step-batch-size-schedule": _UNCOUNTED,
    "--rampup-batch-size": "this Megatron ignores it, and fdd train refuses it; leave it out",
    "--fdd-dry-run": "is for a training; fdd teach has --dry-run",
}
_STUDENTS = "is the student's precision; leave it out, or give --teacher-fp8-format for a teacher in FP8"
_QUANTISED = "leave it out: this engine runs a quantised checkpoint as it is, and others in --dtype"
_WRONG_BY_ENGINE = {
    "megatron": {"--fp8-format": _STUDENTS, "--fp8-recipe": _STUDENTS},
    **dict.fromkeys(
        ("transformers", "vllm"), {"--teacher-fp8-format": _QUANTISED, "--teacher-fp8-recipe": _QUANTISED}
    ),
}
# The training's own.
_BATCH_SIZES = ("--global-batch-size", "--eval-global-batch-size")
_MOST_PARTS = 10**6


@dataclass(frozen=True, slots=True)
class TeachRequest:
    """What a producer is asked for.

    Attributes:
        blocks: given with --blocks; None: by `choice`.
        choice: those of the training's flags that choose its layers.
        form: None: the teacher's own precision.
        part: number of this producer's part, and of all parts.
        batch_tokens: most tokens of a forward pass, padding included, in one replica.
        dry_run: whether the work is only told.
        follow: the stream to work for; None: the training's data, all of them.
        log_folder: of the ranks' logs; None: a new one.
        device_map, dtype: those of the engine `transformers`; dtype None: as the form asks; dtype also of `vllm`.
        server: that of the engine `vllm`; None: none is named.
        teachers: names of data sets and the stores of their teachers, where the training has several.
        flags: the training's, without those that a producer has no use for, or has read.
    """

    engine: str
    teacher: Path
    store: Path
    blocks: tuple[int, ...] | None
    choice: tuple[str, ...]
    form: TapForm | None
    part: tuple[int, int]
    batch_tokens: int
    dry_run: bool
    follow: Following | None
    log_folder: Path | None
    device_map: str
    dtype: str | None
    teachers: tuple[tuple[str, str], ...]
    server: ServerRequest | None
    flags: tuple[str, ...]


def parser() -> argparse.ArgumentParser:
    """Make the parser of a producer's own flags."""
    made = argparse.ArgumentParser(
        prog="fdd teach",
        allow_abbrev=False,
        description="Run a teacher on the text of a training, and store its features for it.",
    )
    made.add_argument("--engine", choices=ENGINES, required=True, help="what runs the teacher")
    made.add_argument(
        "--teacher",
        type=_path,
        required=True,
        metavar="T",
        help="its Megatron checkpoint; transformers, vllm: its Hugging Face folder",
    )
    made.add_argument(
        "--store", type=_path, required=True, metavar="S", help="folder of the store; made, or added to"
    )
    made.add_argument(
        "--blocks",
        type=_blocks,
        metavar="B,B,...",
        help="blocks of the teacher, 1-based; the last one is always added (default: those of the training's "
        "--fdd-layers and --fdd-layer-rule, or --fdd-layer-pairs)",
    )
    made.add_argument(
        "--form",
        choices=get_args(TapForm),
        help="how a hidden state is packed; int8 keeps the 8 largest entries of a token in bf16 (default: as the "
        "teacher computes, bf16 or float32)",
    )
    made.add_argument(
        "--part",
        type=_part,
        default=(0, 1),
        metavar="I/N",
        help="compute part I, from 0, of N equal parts, which other producers share (0/1)",
    )
    made.add_argument(
        "--batch-tokens",
        type=int,
        default=16384,
        metavar="N",
        help="tokens of one forward pass, padding included (%(default)s)",
    )
    made.add_argument(
        "--dry-run",
        action="store_true",
        help="say what there is to compute, load no teacher, and write nothing into the store",
    )
    add_stream_flags(made.add_argument_group("streams"))
    made.add_argument(
        "--log-folder",
        type=_path,
        metavar="FOLDER",
        help="where each rank's log goes (default: a new folder for temporary files)",
    )
    _add_transformers(made.add_argument_group("engine transformers"))
    add_flags(made.add_argument_group("engine vllm (has never run against a real vLLM)"))
    return made


def _add_transformers(own: argparse._ArgumentGroup) -> None:
    own.add_argument(
        "--device-map",
        default="auto",
        metavar="auto|cpu|JSON",
        help="where the teacher's parts go: GPU numbers, cpu or disk by their names; auto fills GPUs first (auto)",
    )
    own.add_argument(
        "--dtype",
        choices=DTYPES,
        help="what the teacher computes in, engine vllm too (float32 with --form float32, else bfloat16)",
    )


def named_engine(words: Sequence[str]) -> str | None:
    """Return the value of --engine, before anything else is read; None without."""
    known = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    known.add_argument("--engine")
    try:
        engine: str | None = known.parse_known_args(list(words))[0].engine
    except argparse.ArgumentError:
        return None
    return engine


def parse(words: Sequence[str]) -> TeachRequest:
    """Read a producer's command line.

    Raises:
        ValueError: a flag is missing or has a wrong value; names it.
    """
    own = parser()
    own.error = _refuse  # type: ignore[method-assign]
    given, flags = own.parse_known_args(list(words))
    named = {word.partition("=")[0] for word in flags}
    for flag, why in (_WRONG_HERE | _WRONG_BY_ENGINE[given.engine]).items():
        if flag in named:
            raise ValueError(f"{flag}: {why}")
    if given.batch_tokens < 1:
        raise ValueError(f"--batch-tokens {given.batch_tokens}: must be at least 1")
    if given.engine == "megatron" and (given.dtype or given.device_map != "auto"):
        flag = f"--dtype {given.dtype}" if given.dtype else f"--device-map {given.device_map}"
        raise ValueError(
            f"{flag}: leave it out: with --engine megatron the layout and the precision are those of Megatron's flags"
        )
    return TeachRequest(
        engine=given.engine,
        teacher=given.teacher,
        store=given.store,
        blocks=given.blocks,
        form=given.form,
        part=given.part,
        batch_tokens=given.batch_tokens,
        dry_run=given.dry_run,
        follow=following(given),
        log_folder=given.log_folder,
        device_map=given.device_map,
        dtype=given.dtype,
        teachers=teachers_of(flags),
        server=server_request(given),
        choice=tuple(cut(flags, dict.fromkeys(_CHOICE, 1))[1]),
        flags=tuple(cut(flags, _NOT_HERE | dict.fromkeys(_CHOICE, 1))[0]),
    )


def chosen_blocks(request: TeachRequest, num_layers: int) -> list[int]:
    """Return the teacher's blocks that are stored, increasing; the last block of the teacher is one of them.

    Args:
        num_layers: of the teacher.

    Raises:
        ValueError: the teacher has no such blocks.
    """
    blocks, flag = request.blocks, "--blocks"
    if blocks is None:
        flag = "--fdd-layer-pairs"
        known = add_fdd_args(argparse.ArgumentParser(allow_abbrev=False, add_help=False))
        known.error = _refuse  # type: ignore[method-assign]
        config = FddConfig.from_args(known.parse_args(list(request.choice)))
        if config.layer_pairs is None:
            blocks = tuple(sample_blocks(config.layer_rule, config.layers, num_layers, "teacher"))
        else:
            blocks = tuple(teacher for _, teacher in config.layer_pairs)
    wrong = [block for block in blocks if not 1 <= block <= num_layers]
    if wrong:
        raise ValueError(
            f"{flag}: the teacher has the blocks 1 to {num_layers}, and no block {wrong[0]}; name those that it has"
        )
    return sorted({*blocks, num_layers})


def batch_sizes(request: TeachRequest) -> tuple[int, int]:
    """Return the training's batch sizes, of training and of evaluation: they say how many samples are read.

    Raises:
        ValueError: the flags do not name one.
    """
    known = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    known.error = _refuse  # type: ignore[method-assign]
    for flag in _BATCH_SIZES:
        known.add_argument(flag, type=int)
    given, _ = known.parse_known_args(list(request.flags))
    if given.global_batch_size is None or given.global_batch_size < 1:
        raise ValueError(
            "--global-batch-size: give the training's, which with --train-iters says how much of the data it reads"
        )
    return given.global_batch_size, given.eval_global_batch_size or given.global_batch_size


def _path(text: str) -> Path:
    """Refuse a path that is no name, such as an empty one, which would mean the current folder."""
    fault = fault_of(text)
    if fault is not None:
        raise argparse.ArgumentTypeError(fault)
    return Path(text)


def _blocks(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of block numbers such as 5,10,15")
    return tuple(int(word) for word in text.split(","))


def _part(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,7})/([0-9]{1,7})", text)
    number, count = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 0 <= number < count <= _MOST_PARTS:
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with I from 0 to N - 1, such as 0/8")
    return number, count


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message} (see fdd teach --help)")
