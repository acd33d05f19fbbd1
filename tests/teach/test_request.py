"""The command line of a producer: its own flags, and a whole training command behind them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from megatron_fdd.teach.request import TeachRequest, batch_sizes, chosen_blocks, parse, parser

OWN = "--engine megatron --teacher T --store S".split()
TRAINING = (
    "--seq-length 16 --micro-batch-size 2 --global-batch-size 8 --train-iters 3 --eval-iters 1 --split 80,20,0 "
    "--data-path 0.5 a 0.5 b --lr 3e-3 --seed -1 --tensor-model-parallel-size 2 --sequence-parallel --bf16"
).split()
NOT_HERE = (
    "--load L --save=D --save-interval 5 --pretrained-checkpoint P --ckpt-step 4 --teacher-load T --teacher-lens N "
    "--fdd-teacher-store S --fdd-metrics-file M --use-checkpoint-args --finetune --async-save"
).split()


def request(*more: str) -> TeachRequest:
    return parse([*OWN, *TRAINING, *more])


def test_the_flags_of_a_training_stay_in_their_order() -> None:
    made = parse([*OWN[:2], *TRAINING[:7], *OWN[2:], *TRAINING[7:]])
    assert made.flags == request().flags == tuple(TRAINING)
    assert (made.engine, made.teacher, made.store) == ("megatron", Path("T"), Path("S"))
    assert (made.form, made.part, made.blocks, made.batch_tokens, made.choice) == (
        None,  # by the teacher's precision
        (0, 1),
        None,
        16384,
        (),
    )


def test_a_whole_training_command_may_be_pasted() -> None:
    """What a producer has no use for goes, with as many words as it has."""
    for place in range(0, len(TRAINING), 5):
        if TRAINING[place].startswith("--"):
            assert parse([*OWN, *TRAINING[:place], *NOT_HERE, *TRAINING[place:]]).flags == tuple(TRAINING)


def test_several_teachers_of_a_training_are_known() -> None:
    """Then a producer computes its own data sets alone; with one store for all it computes all."""
    several = request("--fdd-teacher-store", "code=S1", "maths=S2", "--fdd-alpha", "1")
    assert several.teachers == (("code", "S1"), ("maths", "S2"))
    assert several.flags == (*TRAINING, "--fdd-alpha", "1")
    assert request("--fdd-teacher-store", "S1").teachers == ()
    assert request("--fdd-teacher-store=code=S1").teachers == (("code", "S1"),)


def test_flags_that_choose_blocks_are_kept_apart() -> None:
    made = request("--fdd-layers", "2", "--fdd-layer-rule=paper", "--fdd-alpha", "1")
    assert made.choice == ("--fdd-layers", "2", "--fdd-layer-rule=paper")
    assert made.flags == (*TRAINING, "--fdd-alpha", "1")


@pytest.mark.parametrize(
    ("flags", "blocks"),
    [
        ("--blocks 5,1,5", [1, 5, 12]),
        ("--blocks 12", [12]),
        ("--fdd-layer-pairs 1:3,2:7", [3, 7, 12]),
        ("--fdd-layers 3 --fdd-layer-rule linspace", [3, 6, 9, 12]),
        ("--fdd-layers 2 --blocks 4", [4, 12]),
    ],
)
def test_blocks_are_those_of_the_training_or_given(flags: str, blocks: list[int]) -> None:
    assert chosen_blocks(request(*flags.split()), 12) == blocks


@pytest.mark.parametrize("flags", ["--blocks 0", "--blocks 13", "--blocks 5,99", "--fdd-layer-pairs 1:13"])
def test_blocks_that_the_teacher_lacks_are_refused(flags: str) -> None:
    with pytest.raises(ValueError, match="the teacher has the blocks 1 to 12, and no block (0|13|99)"):
        chosen_blocks(request(*flags.split()), 12)


@pytest.mark.parametrize(
    "flags", ["--fdd-layers 99", "--fdd-layers 0", "--fdd-layers x", "--fdd-layer-pairs 1"]
)
def test_a_choice_that_is_none_is_refused(flags: str) -> None:
    with pytest.raises(ValueError, match="--fdd-layer") as caught:
        chosen_blocks(request(*flags.split()), 12)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "part"), [("0/1", (0, 1)), ("7/8", (7, 8)), ("00/2", (0, 2))])
def test_a_part(text: str, part: tuple[int, int]) -> None:
    assert request("--part", text).part == part


REFUSED = {
    "--part 1/1": "argument --part: '1/1' must be I/N with I from 0 to N - 1",
    "--part 8/8": "argument --part",
    "--part -1/8": "argument --part",
    "--part 0/0": "argument --part",
    "--part 1": "argument --part",
    "--part 1/2/3": "argument --part",
    "--part 0/99999999": "argument --part",
    "--part ١/2": "argument --part",
    "--part=": "argument --part",
    "--blocks 1,": "argument --blocks: '1,' is no list of block numbers such as 5,10,15",
    "--blocks -1": "argument --blocks",
    "--blocks 1.5": "argument --blocks",
    "--blocks=": "argument --blocks",
    "--blocks 12345678": "argument --blocks",
    "--form int4": "argument --form: invalid choice: 'int4'",
    "--engine sglang": "argument --engine: invalid choice: 'sglang'",
    "--batch-tokens 0": "--batch-tokens 0: must be at least 1",
    "--batch-tokens -5": "--batch-tokens -5: must be at least 1",
    "--batch-tokens many": "argument --batch-tokens: invalid int value",
    "--store": "argument --store: expected one argument",
    "--store=": "argument --store: its value is empty (an unset variable?); give one",
    "--teacher=": "argument --teacher: its value is empty",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_a_wrong_value_is_one_line_with_the_flag(flags: str) -> None:
    with pytest.raises(ValueError, match=re.escape(REFUSED[flags])) as caught:
        parse([*OWN, *TRAINING, *flags.split()])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--engine", "--teacher", "--store"])
def test_what_is_needed_must_be_there(flag: str) -> None:
    at = OWN.index(flag)
    with pytest.raises(ValueError, match=f"required: {flag} .see fdd teach --help"):
        parse([*OWN[:at], *OWN[at + 2 :], *TRAINING])


def test_flags_are_not_abbreviated() -> None:
    """`--form` is a producer's own; a longer or shorter flag of a training is not."""
    assert request("--for", "x", "--blocksize", "4").flags == (*TRAINING, "--for", "x", "--blocksize", "4")


def test_batch_sizes_are_the_trainings() -> None:
    assert batch_sizes(request()) == (8, 8)
    assert batch_sizes(request("--eval-global-batch-size=4")) == (8, 4)
    at = TRAINING.index("--global-batch-size")
    for words in ([], ["--global-batch-size", "0"]):
        with pytest.raises(ValueError, match="--global-batch-size: give the training's"):
            batch_sizes(parse([*OWN, *TRAINING[:at], *words, *TRAINING[at + 2 :]]))
    with pytest.raises(ValueError, match="--global-batch-size: invalid int value: 'x'"):
        batch_sizes(parse([*OWN, "--global-batch-size", "x"]))


WRONG_HERE = {
    "megatron": {
        "--phase-transition-iterations 1,2": "how much .*; give the --train-iters",
        "--step-batch-size-schedule=0:8": "how much .*; give the --train-iters",
        "--rampup-batch-size 2 2 99": "this Megatron ignores it, and fdd train refuses it; leave it out",
        "--fdd-dry-run": "is for a training; fdd teach has --dry-run",
        "--fp8-format e4m3": "is the student's precision; leave it out, or give --teacher-fp8-format",
        "--fp8-recipe=tensorwise": "is the student's precision",
    },
    "transformers": {
        "--fdd-dry-run": "is for a training; fdd teach has --dry-run",
        "--teacher-fp8-format e4m3": "leave it out: this engine runs a quantised checkpoint as it is",
        "--teacher-fp8-recipe=mxfp8": "leave it out",
    },
}


@pytest.mark.parametrize(
    ("engine", "flags"), [(name, each) for name in WRONG_HERE for each in WRONG_HERE[name]]
)
def test_flags_that_mean_nothing_here_are_refused(engine: str, flags: str) -> None:
    name = flags.replace("=", " ").split()[0]
    with pytest.raises(ValueError, match=f"^{name}: {WRONG_HERE[engine][flags]}"):
        parse(["--engine", engine, *OWN[2:], *TRAINING, *flags.split()])


def test_the_students_precision_is_not_the_engine_transformers_matter() -> None:
    assert parse(["--engine", "transformers", *OWN[2:], *TRAINING, "--fp8-format", "e4m3"])


def test_a_dry_run_and_a_folder_of_logs() -> None:
    assert (request().dry_run, request().log_folder) == (False, None)
    made = request("--dry-run", "--log-folder", "L")
    assert (made.dry_run, made.log_folder, made.flags) == (True, Path("L"), tuple(TRAINING))


def test_torchrun_takes_no_flag_of_a_producer_for_its_own() -> None:
    """It looks at all words of its command line, and knows a flag by its beginning."""
    for action in parser()._actions:
        for flag in action.option_strings:
            if flag not in ("-h", "--help"):
                given = get_args_parser().parse_args(["-m", "megatron_fdd.teach", flag, "x"])
                assert given.training_script_args == [flag, "x"]


def test_a_server_is_an_address_and_a_folder(tmp_path: Path) -> None:
    vllm = ["--engine", "vllm", *OWN[2:], *TRAINING]
    assert parse(vllm).server is None
    server = parse([*vllm, "--url", "https://node7/api/v1/", "--hidden-states", str(tmp_path)]).server
    assert server is not None
    assert (server.url, server.folder, server.port) == ("https://node7/api", tmp_path, 443)


WRONG_SERVERS = {
    "--url http://node7:8000": "--url: give --hidden-states, the folder of its files, too",
    "--hidden-states .": "--hidden-states: give --url, the server's address, too",
    "--url node7:8000 --hidden-states .": "--url node7:8000: is no address of a server; give one such as",
    "--url http://node7:x --hidden-states .": "--url http://node7:x: is no address",
    "--url http:// --hidden-states .": "--url http://: is no address",
    "--url http://node7 --hidden-states nowhere": "--hidden-states nowhere: there is no such folder here; give",
    "--device-map cpu": "--device-map cpu: leave it out: with --engine vllm the layout is that of vLLM's own",
    "--engine megatron --url http://node7": "--url: is for --engine vllm; leave it out with --engine megatron",
}


@pytest.mark.parametrize("flags", WRONG_SERVERS)
def test_a_wrong_server_is_one_line_with_the_flag(flags: str) -> None:
    with pytest.raises(ValueError, match=re.escape(WRONG_SERVERS[flags])):
        parse(["--engine", "vllm", *OWN[2:], *TRAINING, *flags.split()])
