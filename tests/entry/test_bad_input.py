"""Mistakes of users: each ends in one clear error on rank 0, exit status 1 on every rank, and no training step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_fdd.config import add_fdd_args
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.host.like_flags import READ_HERE, READ_TO_BUILD, READ_TO_LOAD
from megatron_fdd.host.model_fields import _STORED
from megatron_fdd.step.teacher.arguments import is_teachers_own
from tests.convert import toys
from tests.entry import damage
from tests.entry.checks import assert_refused
from tests.entry.command import Patch, run, trained
from tests.entry.conftest import Toys
from tests.hostile.checkpoints import UNLISTED

# Flags that are wrong by themselves, and the value, bound and remedy that the error must name. The configuration and
# the layer plan have one row each; their other refusals are in their own tests.
WRONG_FLAGS = {
    "teacher folder missing": (
        "--teacher-load /nowhere",
        r"--teacher-load /nowhere.*does not exist.*fdd import",
    ),
    "student folder missing": ("--load /nowhere", r"--load /nowhere.*does not exist.*fdd import"),
    "tokenizer missing": ("--tokenizer-model /nowhere", r"--tokenizer-model /nowhere does not exist"),
    "data missing": ("--data-path /nowhere/text", r"/nowhere/text"),
    "K too large": (
        "--fdd-layers 4",
        r"--fdd-layers 4 needs a student of at least 5 layers, it has 4.*at most 3",
    ),
    "pairs unreadable": ("--fdd-layer-pairs 2-4,3:4", r"'2-4' is not STUDENT:TEACHER"),
    "sequence too long": ("--seq-length 65", r"--seq-length 65 is longer than the student takes \(64"),
    "unknown flag": ("--fdd-alhpa 1", r"--fdd-alhpa.*--help"),
    "unknown choice": ("--fdd-kd-divergence tv", r"--fdd-kd-divergence.*'tv'.*fkl.*--help"),
    "not a number": ("--fdd-alpha much", r"--fdd-alpha.*'much'"),
    "negative weight": ("--fdd-alpha -1", r"--fdd-alpha -1\.0: must be at least 0"),
    "batch does not divide": ("--global-batch-size 6", r"global_batch_size \(6\) must be divisible"),
    "batch not given": ("--micro-batch-size 0", r"--micro-batch-size 0: must be at least 1"),
    "heads do not divide": ("--tensor-model-parallel-size 2 --num-attention-heads 3", r"num_attention_heads"),
    "metrics file is a folder": ("--fdd-metrics-file /tmp", r"--fdd-metrics-file /tmp.*folder"),
    "other epsilon": ("--norm-epsilon 1e-6", r"layernorm_epsilon is 1e-06 here and 0\.0003 there"),
    "other rope base": ("--rotary-base 77", r"rotary_base is 77 here and 500000"),
    "other depth": ("--num-layers 3", r"num_layers is 3 here and 4 there"),
    "context parallelism by layer": (
        "--context-parallel-size 2 --cp-comm-type p2p p2p p2p p2p",
        r"Megatron refuses the teacher of these flags: .*cp_comm_type",
    ),
    "other vocabulary": ("--vocab-size 500", r"vocab_size is 500 here and 99 there"),
}


@pytest.mark.parametrize("name", WRONG_FLAGS)
def test_wrong_flags(name: str, toy: Toys) -> None:
    flags, pattern = WRONG_FLAGS[name]
    [endings] = run(toy.command(*flags.split()))
    assert_refused(endings, pattern)


# A function from a folder to flags that name something damaged, made in the folder; and the error's text.
DAMAGED: dict[str, tuple[Callable[[Toys, Path], list[object]], str]] = {
    "teacher cut short": (
        lambda toy, folder: ["--teacher-load", damage.cut(toy.teacher, folder / "t")],
        r"--teacher-load .*\.distcp has \d+ bytes and needs \d+; the checkpoint is truncated",
    ),
    "student cut short": (
        lambda toy, folder: ["--load", damage.cut(toy.student, folder / "s")],
        r"--load .*\.distcp has \d+ bytes and needs \d+; the checkpoint is truncated",
    ),
    "teacher without index": (
        lambda toy, folder: ["--teacher-load", damage.without_index(toy.teacher, folder / "t")],
        r"--teacher-load .*\.metadata is missing",
    ),
    "student without index": (
        lambda toy, folder: ["--load", damage.without_index(toy.student, folder / "s")],
        r"--load .*\.metadata is missing",
    ),
    "unreadable tracker": (
        lambda toy, folder: ["--load", damage.with_tracker(toy.student, folder / "s", "")],
        r"--load .*latest_checkpointed_iteration\.txt says ''.*newest whole iter_ folder",
    ),
    "empty student folder": (
        lambda toy, folder: ["--load", folder],
        r"--load .* holds no Megatron checkpoint",
    ),
    "all-zero weight": (
        lambda toy, folder: ["--teacher-load", damage.with_tensor(*zeroed(toy, folder), 0.0)],
        r"cannot teach. Weights that are all zero: decoder\.layers\.2\.mlp\.linear_fc2\.weight\. Not finite: none",
    ),
    "weight is not a number": (
        lambda toy, folder: ["--teacher-load", damage.with_tensor(*zeroed(toy, folder), float("nan"))],
        r"all zero: none\. Not finite: decoder\.layers\.2\.mlp\.linear_fc2\.weight\. Convert it again",
    ),
    "weights without a place": (
        lambda toy, folder: [
            "--teacher-load",
            changed(toy, folder, untie_embeddings_and_output_weights=False),
        ],
        r"In the checkpoint but not used: output_layer\.weight\. In the model but not filled: none",
    ),
    "places without a weight": (
        lambda toy, folder: ["--teacher-load", changed(toy, folder, qk_layernorm=True)],
        r"not used: none\. In the model but not filled: .*q_layernorm\.weight",
    ),
    "teacher of another width": (
        lambda toy, folder: ["--teacher-load", changed(toy, folder, ffn_hidden_size=68)],
        r"--teacher-load .*own arguments describe.*\[6, 132, 48\].*\(6, 136, 48\).*linear_fc1",
    ),
    "teacher of another depth": (
        lambda toy, folder: ["--teacher-load", changed(toy, folder, num_layers=7)],
        r"--teacher-load .*own arguments describe.*shape mismatch",
    ),
    "damaged teacher weights": (
        lambda toy, folder: ["--teacher-load", damage.scratched(toy.teacher, folder / "t", "embedding.")],
        r"--teacher-load .* are damaged \(its bytes hold no saved tensors\)",
    ),
    "damaged student weights": (
        lambda toy, folder: ["--load", damage.scratched(toy.student, folder / "s", "embedding.")],
        r"--load .*: the student's checkpoint could not be read: its bytes hold no saved tensors",
    ),
    "a flipped bit in the teacher": (
        lambda toy, folder: ["--teacher-load", damage.flipped(toy.teacher, folder / "t")],
        r"--teacher-load .*\.distcp has other bytes than when it was saved",
    ),
    "a flipped bit in the student": (
        lambda toy, folder: ["--load", damage.flipped(toy.student, folder / "s")],
        r"--load .*\.distcp has other bytes than when it was saved",
    ),
    "damaged student arguments": (
        lambda toy, folder: ["--load", damage.scratched(toy.student, folder / "s", "common_state")],
        r"--load .*__0_0\.distcp: common_state/shard_0_1 cannot be read .*the copy is damaged",
    ),
    "a dense teacher that claims experts": (
        lambda toy, folder: ["--teacher-load", changed(toy, folder, num_experts=4)],
        r"--teacher-load .*own arguments describe",
    ),
    "a student whose layers are code": (
        lambda toy, folder: ["--load", damage.with_args(toy.student, folder / "s", spec=["os", "system"])],
        r"--load: the model was built with --spec os system, and nothing is imported by a name out of a checkpoint",
    ),
    "a teacher whose layers are code": (
        lambda toy, folder: ["--teacher-load", changed(toy, folder, spec=["os", "system"])],
        r"--teacher-load: the model was built with --spec os system, and nothing is imported",
    ),
    "hybrid teacher": (
        lambda toy, folder: ["--teacher-load", changed(toy, folder, hybrid_layer_pattern="M*")],
        r"--teacher-load: only GPTModel offers taps",
    ),
    "soft-capped teacher": (
        lambda toy, folder: ["--teacher-load", changed(toy, folder, final_logit_softcapping=30.0)],
        r"--teacher-load: a soft-capped head \(final_logit_softcapping 30\).*fdd import",
    ),
    "short teacher": (
        lambda toy, folder: ["--teacher-load", changed(toy, folder, max_position_embeddings=8)],
        r"--seq-length 16 is longer than the teacher \(.*\) takes \(8 positions\)",
    ),
    "small teacher vocabulary": (
        lambda toy, folder: ["--teacher-load", changed(toy, folder, vocab_size=9)],
        r"vocabulary mismatch: the teacher has 9 tokens",
    ),
    "checkpoint without args": (
        lambda toy, folder: ["--teacher-load", damage.without_args(toy.teacher, folder / "t")],
        r"--teacher-load .* stores no arguments",
    ),
}


def zeroed(toy: Toys, folder: Path) -> tuple[Path, Path, str]:
    return toy.root / "teacher-hf", folder / "t", "model.layers.2.mlp.down_proj.weight"


def changed(toy: Toys, folder: Path, **changes: object) -> Path:
    return damage.with_args(toy.teacher, folder / "t", **changes)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(name: str, toy: Toys, tmp_path: Path) -> None:
    make_flags, pattern = DAMAGED[name]
    [endings] = run(toy.command(*make_flags(toy, tmp_path)))
    assert_refused(endings, pattern)


@pytest.mark.parametrize("flag", ["--teacher-load", "--load", "--pretrained-checkpoint"])
@pytest.mark.parametrize("more", [[], ["--fdd-dry-run"]], ids=["train", "plan"])
def test_a_checkpoint_that_runs_code(flag: str, more: list[str], toy: Toys, tmp_path: Path) -> None:
    source = toy.teacher if flag == "--teacher-load" else toy.student
    folder = damage.with_payload(source, tmp_path / "t", tmp_path / "sign")
    command = toy.command(*more)
    if flag == "--pretrained-checkpoint":
        place = command.index("--load")
        del command[place : place + 2]
    [endings] = run([*command, flag, str(folder)])
    assert_refused(endings, rf"{flag} .*\.metadata names the class posix\.mkdir, which is on no list")
    assert not (tmp_path / "sign").exists()


@pytest.mark.parametrize("flag", ["--teacher-load", "--load", "--pretrained-checkpoint"])
def test_an_unlisted_class_is_loaded_where_it_is_trusted(flag: str, toy: Toys, tmp_path: Path) -> None:
    """The class is in `common.pt`, for which Megatron asks torch for no kind of unpickling."""
    source = toy.teacher if flag == "--teacher-load" else toy.student
    command = toy.command("--train-iters", 1)
    if flag == "--pretrained-checkpoint":
        place = command.index("--load")
        del command[place : place + 2]
    command += [flag, str(damage.with_args(source, tmp_path / "t", seed_of_a_fork=UNLISTED))]
    untrusting = [Patch("megatron_fdd.host.unpickling", "_is_trusting", False)]
    refused, loaded = run(command, [*command, "--fdd-trust-checkpoint"], patches=untrusting, environment={})
    assert_refused(refused, rf"{flag} .*common\.pt names the class fractions\.Fraction, which is on no list")
    assert [ending.status for ending in loaded] == [0, 0], loaded[0].err


def test_a_flipped_bit_is_loaded_by_somebody_who_knows(toy: Toys, tmp_path: Path) -> None:
    """The bit is in the last place of a weight."""
    folder = damage.flipped(toy.teacher, tmp_path / "t")
    command = toy.command("--teacher-load", folder, "--train-iters", 1)
    refused, loaded = run(command, [*command, "--fdd-skip-checksums"])
    assert_refused(
        refused, r"has other bytes than when it was saved: .* --fdd-skip-checksums loads it as it is"
    )
    assert [ending.status for ending in loaded] == [0, 0], loaded[0].err
    assert f"and --teacher-load {folder}/release were not compared with their sums" in loaded[0].out


def test_an_object_that_runs_code_beside_the_weights(toy: Toys, tmp_path: Path) -> None:
    """A rank alone does not look at it, and nothing is loaded before one has."""
    folder = damage.with_object(toy.teacher, tmp_path / "t", tmp_path / "sign")
    command = toy.command("--teacher-load", folder)
    patches = [Patch("megatron_fdd.distill", "build_teacher", load_nothing)]
    for endings in run(command, [*command, "--fdd-dry-run"], patches=patches):
        assert_refused(endings, r"--teacher-load .*__9_0\.distcp: rng_state/.* names the class posix\.mkdir")
    assert not (tmp_path / "sign").exists()


def load_nothing(*_: object) -> None:
    raise AssertionError("a check comes first")


def test_stored_arguments_that_nobody_reads_may_be_anything(toy: Toys, tmp_path: Path) -> None:
    """A fork of Megatron may store what it likes under the names of other flags."""
    defaults = vars(add_fdd_args(add_megatron_arguments(argparse.ArgumentParser())).parse_args([]))
    typed = {name for name, value in defaults.items() if isinstance(value, bool | int | float | str)}
    known = _STORED.keys() | READ_HERE
    unread = {
        "--load": typed - known - READ_TO_LOAD,
        "--teacher-load": typed - known - set(filter(is_teachers_own, READ_TO_BUILD)),
    }
    assert min(map(len, unread.values())) > 300
    flags: list[object] = []
    for flag, source in (("--load", toy.student), ("--teacher-load", toy.teacher)):
        changes = dict.fromkeys(unread[flag], {"of": "a fork"})
        flags += [flag, damage.with_args(source, tmp_path / flag, **changes)]
    trained(toy.command(*flags, "--train-iters", 1))


@pytest.mark.parametrize("added", [20, 100])
def test_tokenizer_with_more_ids_than_the_student_has(added: int, toy: Toys, tmp_path: Path) -> None:
    tokenizer = damage.other_tokenizer(tmp_path / "t", added=added)
    [endings] = run(toy.mock_command("--tokenizer-model", tokenizer))
    assert_refused(endings, rf"the tokenizer .*t\) has {90 + added} tokens, the student only 99 embeddings")


def test_teacher_with_another_tokenizer(toy: Toys, tmp_path: Path) -> None:
    teacher = damage.copied(toy.teacher, tmp_path / "t")
    path = teacher / "tokenizer" / "tokenizer.json"
    content = toys.read_json(path)
    vocabulary = content["model"]["vocab"]
    first, second = [token for token, index in vocabulary.items() if index in (40, 41)]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    toys.write_json(path, content)
    [endings] = run(toy.command("--teacher-load", teacher))
    assert_refused(
        endings,
        r"the teacher's tokenizer .* is not the run's .*: id 40 is '.*' in the teacher and '.*' in this run "
        r"\(2 ids mean different tokens\)",
    )


def test_data_and_student_of_another_tokenizer(toy: Toys, tmp_path: Path) -> None:
    """For every pair that must agree, the error names the first difference, the same on both ranks."""
    student = damage.copied(toy.student, tmp_path / "s")
    path = student / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|chat|>", "<|User|>"))
    apart = damage.other_tokenizer(tmp_path / "apart", added=1)
    content = toys.read_json(apart / "tokenizer.json")
    content["normalizer"] = {"type": "Lowercase"}
    toys.write_json(apart / "tokenizer.json", content)
    larger = damage.other_tokenizer(tmp_path / "larger", added=2)
    for name, tokenizer in (("apart", apart), ("larger", larger)):
        (tmp_path / "text.txt").write_text("the quick brown fox <|1|>\n\n" * 200)
        encode = EncodeSettings(TokenizerSettings("HuggingFaceTokenizer", str(tokenizer)), "text")
        files = (str(tmp_path / "text.txt"),)
        prepare(PrepareSettings(files, str(tmp_path / f"text-{name}"), encode, separator="blank-line"))
    results = run(
        toy.command("--load", student),
        toy.command("--data-path", tmp_path / "text-apart"),
        toy.command("--data-path", tmp_path / "text-larger", "--tokenizer-model", larger),
    )
    for endings, pattern in zip(
        results,
        (
            r"the student's tokenizer .*id 90 is '<\|User\|>' in the student and '<\|chat\|>' in this run",
            r"text-apart was prepared with a tokenizer that is not this run's: the probe line "
            r'"case" gets '
            r"other ids: .*tokenizer.json that differ: normaliser",
            r"text-larger has the token id 91, and the teacher's tokenizer has 91 ids \(0 to 90\)",
        ),
        strict=True,
    ):
        assert len(endings) == 2
        assert_refused(endings, pattern)


def test_flags_without_use_checkpoint_args_must_describe_the_checkpoint(toy: Toys) -> None:
    command = [word for word in toy.command() if word != "--use-checkpoint-args"]
    shape = (
        "--num-layers 4 --hidden-size 32 --ffn-hidden-size 44 --num-attention-heads 4 --kv-channels 8".split()
    )
    shape += "--max-position-embeddings 64".split()
    [endings] = run([*command, *shape])
    assert_refused(endings, r"swiglu is False here and True there.*--use-checkpoint-args")
