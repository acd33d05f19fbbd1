"""Checkpoints, command lines and whole conversions, each changed at random and given to the code of the tools."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import click
import megatron.training.global_vars as megatron_globals
from megatron.core import num_microbatches_calculator

from megatron_fdd import convert
from megatron_fdd.cli.init_student import command as student_command
from megatron_fdd.cli.report import command as report_command
from megatron_fdd.convert.families import family_of
from megatron_fdd.host.checkpoint import find_checkpoint, read_checkpoint_args, term_shapes
from megatron_fdd.host.model_fields import check_stored_args
from megatron_fdd.plan.run import prepare_run
from tests.convert import toys
from tests.entry.command import COMMON
from tests.hostile import configs, mutate
from tests.hostile.fuzz_inputs import root_of

_READ = frozenset(configs.ALL_ARGUMENTS)
_FLAGS = """
    fdd-layers fdd-layer-pairs fdd-temperature fdd-alpha fdd-beta fdd-kd-weight fdd-divergence fdd-sample-
    tokens fdd-tokens fdd-warmup-iters fdd-lens-head tensor-model-parallel-size pipeline-model-parallel-size
    train-samples context-parallel-size expert-model-parallel-size num-layers hidden-size seq-length global-
    batch-size lr min-lr weight-decay adam-beta1 clip-grad seed eval-iters eval-interval save-interval lr-
    decay-style rotary-base recompute-granularity num-workers lr-warmup-fraction log-interval exit-interval
    init-method-std split
""".split()


def imported(rng: random.Random, folder: Path) -> None:
    """Convert a folder to a checkpoint, with or without its weights."""
    place = root_of(folder)
    shutil.copytree(place / rng.choice(("teacher-hf", "moe-hf")), folder / "hf")
    path = folder / "hf/config.json"
    path.write_text(mutate.json_text(rng, json.loads(path.read_text())))
    act = convert.config_to_mcore if rng.random() < 0.5 else convert.hf_to_mcore
    act(folder / "hf", folder / "out")


def stored_arguments(rng: random.Random, folder: Path) -> None:
    """Make a config.json of a checkpoint's arguments."""
    place = root_of(folder)
    name = rng.choice(("teacher", "moe"))
    args = _stored_args(place / name)
    for each in rng.sample(sorted(_READ & vars(args).keys()), rng.choice((1, 1, 2, 4))):
        setattr(args, each, copy.deepcopy(rng.choice(mutate.HOSTILE)))
    check_stored_args(args, "--load x")
    seed = toys.read_json(place / f"{name}-hf/config.json")
    family_of(seed).hf_config(seed, args)


def _stored_args(checkpoint: Path) -> Namespace:
    return copy.deepcopy(read_checkpoint_args(find_checkpoint(str(checkpoint), "--load"), "--load"))


def checkpoint(rng: random.Random, folder: Path) -> None:
    """Read index, objects and arguments of a checkpoint."""
    shutil.copytree(root_of(folder) / "student", folder / "student")
    path = rng.choice(sorted(path for path in (folder / "student/release").iterdir() if path.is_file()))
    path.write_bytes(mutate.raw(rng, path.read_bytes()))
    if rng.random() < 0.2:
        tracker = folder / "student/latest_checkpointed_iteration.txt"
        tracker.write_bytes(mutate.raw(rng, tracker.read_bytes()))
    found = find_checkpoint(str(folder / "student"), "--load")
    check_stored_args(read_checkpoint_args(found, "--load"), "--load")
    term_shapes(found, "--load")


def _run_flags(folder: Path) -> list[str]:
    place = root_of(folder)
    given = ["--load", place / "student", "--teacher-load", place / "teacher", "--data-path", place / "text"]
    given += ["--split", "80,20,0", "--tokenizer-type", "HuggingFaceTokenizer", "--transformer-impl", "local"]
    given += [
        "--tokenizer-model",
        place / "teacher/tokenizer",
        "--save-interval",
        2,
        "--save",
        folder / "save",
    ]
    return [
        *COMMON,
        *map(str, given),
        "--fdd-metrics-file",
        str(folder / "metrics.jsonl"),
    ]


def _plan(given: list[str], stored: Callable[[Namespace], None] = lambda _: None) -> None:
    """Prepare a run; `stored` changes the arguments that checkpoints store."""

    def read(path: Path, flag: str) -> Namespace:
        args = read_checkpoint_args(path, flag)
        stored(args)
        return args

    megatron_globals.destroy_global_vars()
    num_microbatches_calculator.unset_num_microbatches_calculator()
    with (
        mock.patch.object(sys, "argv", ["distill", *given]),
        mock.patch("megatron_fdd.plan.context.read_checkpoint_args", read),
    ):
        prepare_run()


def flags(rng: random.Random, folder: Path) -> None:
    """Prepare a run from its command line."""
    given = _run_flags(folder)
    for _ in range(rng.choice((1, 1, 2))):
        kind, at = rng.random(), rng.randrange(len(given))
        while given[at].startswith("-") and kind < 0.5:
            at = rng.randrange(len(given))
        if kind < 0.5:
            given[at] = _word(rng)
        elif kind < 0.6:
            del given[at]
        else:
            given += [f"--{rng.choice(_FLAGS)}", _word(rng)]
    if rng.random() < 0.5:
        given.append("--fdd-dry-run")
    _plan(given)


def trained(rng: random.Random, folder: Path) -> None:
    """Prepare a run whose student or teacher stores arguments of another kind."""
    left = [rng.random() < 0.5, True]  # the student's checkpoint is read first

    def change(args: Namespace) -> None:
        if left.pop(0):
            left.clear()
            left.extend((False, False))
            names = sorted(vars(args) if rng.random() < 0.5 else _READ & vars(args).keys())
            setattr(args, rng.choice(names), copy.deepcopy(rng.choice(mutate.HOSTILE)))

    _plan([*_run_flags(folder), *["--fdd-dry-run"] * rng.randrange(2)], change)


def exported(rng: random.Random, folder: Path) -> None:
    """Export a checkpoint with arguments of another kind."""
    args = _stored_args(root_of(folder) / "teacher")
    for each in rng.sample(sorted(_READ & vars(args).keys()), rng.choice((1, 1, 2))):
        setattr(args, each, copy.deepcopy(rng.choice(mutate.HOSTILE)))
    with mock.patch("megatron_fdd.host.checkpoint.read_checkpoint_args", return_value=args):
        convert.mcore_to_hf(root_of(folder) / "teacher", folder / "out")


def _word(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return str(rng.choice((0, 1, -1, 2, 3, 8, 0.5, 1e-9, 1e9, 10**6, 2**31, 2**63, math.nan, math.inf)))
    return str(rng.choice(mutate.HOSTILE)).replace("\0", "")[:200] or ""


def commands(rng: random.Random, folder: Path) -> None:
    """Run a command with a wrong word."""
    place = root_of(folder)
    if rng.random() < 0.5:
        given = [
            "--hf-model",
            place / "teacher-hf",
            "--hf-out",
            folder / "out",
            "--layers",
            "0-1",
            "--max-shard-size",
            "1MB",
        ]
        command: click.Command = student_command
    else:
        given = [place / "text.jsonl", "--out", folder / "out"]
        command = report_command
    words = [str(word) for word in given]
    at = rng.randrange(len(words))
    words[at] = _word(rng)
    os.chdir(folder)
    try:
        command.main(words, standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from error
    except SystemExit as end:
        if end.code not in (0, 1):
            raise
    finally:
        os.chdir(folder.parent)
