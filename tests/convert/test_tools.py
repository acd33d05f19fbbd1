"""The three tools as a user runs them, and their messages when something is wrong."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file

from megatron_fdd import convert
from megatron_fdd.convert import checksums
from megatron_fdd.convert.hf_writer import check_new_folder, new_folder
from megatron_fdd.host.checkpoint import TRACKER_FILE
from megatron_fdd.host.file_sums import SUMS_FILE
from megatron_fdd.host.unpickling import trust_checkpoints
from tests.convert import mcore, toys
from tests.convert.toy_vocabularies import make_student, make_teacher
from tests.harness import forked_python
from tests.harness.ranks import Layout, distributed, run_on_ranks
from tests.hostile.checkpoints import UNLISTED, untrusting

TOOLS = Path(__file__).parents[2] / "tools"


def _run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [forked_python.python(), str(TOOLS / tool), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)


def _main(tool: str, *words: str) -> int:
    """Run a tool's command in this process and return its exit status."""
    command = importlib.import_module(f"megatron_fdd.cli.{tool}").command
    with pytest.raises(SystemExit) as stopped:
        command(list(words))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.tier("default")
def test_there_and_back(tmp_path: Path) -> None:
    source = toys.make_llama(tmp_path / "source")
    saved, back = tmp_path / "mcore", tmp_path / "back"
    there = _run("hf_to_mcore.py", "--hf-model", source, "--save", saved)
    assert there.returncode == 0, there.stderr
    assert there.stdout.splitlines()[-1].endswith(
        f"a student: --pretrained-checkpoint {saved}, a teacher: --teacher-load {saved}"
    )
    again = _run("mcore_to_hf.py", "--load", saved, "--hf-out", back, "--max-shard-size", "50KB")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == (
        f"{back}: 30 tensors of {saved}, ready for from_pretrained; 30 are bit for bit those imported"
    )
    assert toys.tensor_hashes(back) == toys.tensor_hashes(source)


def test_init_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toys.make_llama(tmp_path / "source", tokenizer=False)
    command = ["--hf-model", str(source), "--num-layers", "2", "--hf-out", str(tmp_path / "student")]
    assert _main("init_student", *command, "--no-score") == 0
    first, pairs = capsys.readouterr().out.splitlines()[-2:]
    assert first.endswith("2 layers of " + str(source) + ": 0,2")
    assert pairs == "pairs of layers with one origin, for the training: --fdd-layer-pairs 1:1"
    assert _main("init_student", *command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert "not empty" in error


def test_a_narrower_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = toys.make_llama(tmp_path / "source"), tmp_path / "text.jsonl"
    text.write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 20)
    command = ["--from", str(source), "--ffn-hidden-size", "40", "--calibration-text", str(text), "--hf-out"]
    assert _main("init_student", *command, str(tmp_path / "new"), "--layers", "0,2") == 0
    first, scored, _pairs, bits = capsys.readouterr().out.splitlines()[-4:]
    assert first.endswith(f"2 layers of {source}: 0,2; ffn-hidden-size 40")
    assert re.fullmatch(rf"scored on \d windows of 64 tokens of {text}", scored)
    assert re.fullmatch(r"bits a byte, of a text of 860 bytes: .* before, .* now, without training", bits)
    assert toys.read_json(tmp_path / "new" / "config.json")["intermediate_size"] == 40
    text.write_text('{"text": "the fox"}\n')
    assert _main("init_student", *command, str(tmp_path / "short")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"--calibration-text .*text.jsonl is too short \(the text has \d+ tokens, one window needs 65: give more",
        error,
    )
    text.write_text('{"text": " "}\n')
    assert _main("init_student", *command, str(tmp_path / "empty")) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("text.jsonl: holds no text; give another")
    assert not (tmp_path / "short").exists()


def test_a_dense_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, text = toys.make_llama(tmp_path / "source", "qwen3_moe"), tmp_path / "text.jsonl"
    text.write_text('{"text": "the quick brown fox jumps over the lazy dog"}\n' * 20)
    command = ["--hf-model", str(source), "--calibration-text", str(text), "--layers", "0,2"]
    dense = [*command, "--dense-ffn-hidden-size", "40", "--hf-out"]
    assert _main("init_student", *dense, str(tmp_path / "new")) == 0
    first, fitted, _pairs, bits = capsys.readouterr().out.splitlines()[-4:]
    assert first.endswith(f"2 layers of {source}: 0,2; a qwen3 with 40 of 144 channels in each MLP")
    few = r", \d\.\d tokens for a channel; ten fit better: --calibration-samples 7, if the text has them"
    assert re.fullmatch(rf"fitted to \d windows of 64 tokens of {text}{few}", fitted)
    assert re.fullmatch(r"bits a byte, of a text of 860 bytes: .* before, .* now, without training", bits)
    with mock.patch("transformers.AutoModelForCausalLM.from_pretrained", side_effect=AssertionError):
        few = [*command, "--dense-ffn-hidden-size", "70", "--calibration-samples", "1", "--hf-out"]
        assert _main("init_student", *few, str(tmp_path / "few")) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert "--dense-ffn-hidden-size 70: 1 windows of 64 tokens of" in told
    assert not (tmp_path / "few").exists()


def test_a_student_with_a_teachers_vocabulary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = make_student(tmp_path / "student"), make_teacher(tmp_path / "teacher")
    (tmp_path / "text.jsonl").write_text('{"text": "the fox quit."}\n')
    command = ["--from", str(student), "--vocabulary-of", str(teacher), "--hf-out"]
    text = ["--validation-text", str(tmp_path / "text.jsonl")]
    assert _main("init_student", *command, str(tmp_path / "new"), *text) == 0
    first, rows, bits = capsys.readouterr().out.splitlines()[-3:]
    assert first == f"{tmp_path}/new: {student} with the vocabulary of {teacher}"
    assert re.fullmatch(
        r"500 rows: \d+ kept, \d+ made of their old pieces, \d+ without pieces",
        rows,
    )
    number = r"\d+\.\d{3} \(\d+ tokens\)"
    assert re.fullmatch(
        f"bits a byte, of a text of 13 bytes: {number} before, {number} now, without training", bits
    )
    assert _main("init_student", *command, str(tmp_path / "quick"), "--no-score") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/quick: {student} with the vocabulary of {teacher}",
        rows,
    ]
    with mock.patch("megatron_fdd.evaluate.bits.compare_bits", side_effect=ValueError("no such class")):
        assert _main("init_student", *command, str(tmp_path / "other")) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == rows
    assert (
        f"warning: {tmp_path}/other is written, and its bits a byte are not known: no such class" in shown.err
    )
    assert _main("init_student", *command, str(tmp_path / "new")) == 1
    assert "not empty" in capsys.readouterr().err.splitlines()[-1]
    (tmp_path / "text.jsonl").write_text('{"text": " "}\n')
    assert _main("init_student", *command, str(tmp_path / "none"), *text) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("text.jsonl: holds no text; give another")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--vocabulary-of t --layers 0",
        "--vocabulary-of t --hidden-size 8 --calibration-text {file}",
        "--vocabulary-of t --dense-ffn-hidden-size 8 --calibration-text {file}",
        "--hidden-size 8 --dense-ffn-hidden-size 8 --calibration-text {file}",
        "--hidden-size 8",
        "--dense-ffn-hidden-size 8",
        "--layers 0 --calibration-text {file}",
        "--vocabulary-of t --no-score --validation-text {file}",
    ],
)
def test_flags_of_a_student_that_exclude_each_other(
    words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_text("")
    given = words.format(file=tmp_path / "text").split()
    assert _main("init_student", "--from", "s", "--hf-out", str(tmp_path / "new"), *given) == 2
    assert "Error: " in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tool", ["hf_to_mcore", "mcore_to_hf", "init_student"])
def test_help_and_usage_errors(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(tool, "--help") == 0
    assert "examples:" in capsys.readouterr().out
    assert _main(tool) == 2


class _StopError(BaseException):
    """A stand-in for anything that ends a process before it is done."""


@distributed(tp=1)
def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    mcore.make_checkpoint(tmp_path, "plain")
    before = sorted(tmp_path.rglob("*"))
    written: list[str] = []

    def bytes_of(tensor: torch.Tensor) -> memoryview:
        written.append("")
        if len(written) > 5:
            raise _StopError
        return checksums.bytes_of(tensor)

    stopping = mock.patch("megatron_fdd.convert.hf_writer.bytes_of", bytes_of)
    with stopping, pytest.raises(_StopError):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "out", max_shard_size="1KB")
    assert len(written) == 6
    saving = mock.patch("megatron_fdd.convert.mcore_checkpoint.save_model", side_effect=_StopError)
    with saving, pytest.raises(_StopError):
        convert.hf_to_mcore(tmp_path / "source", tmp_path / "again")
    assert sorted(tmp_path.rglob("*")) == before


@distributed(tp=1)
def test_values_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    source, load = toys.make_llama(tmp_path / "source"), tmp_path / "mcore"
    names = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    for name, value in zip(names, (float("nan"), -float("inf")), strict=True):
        weights = load_file(source / "model.safetensors")
        spoilt = {**weights, name: weights[name].clone()}
        spoilt[name].view(-1)[3] = value
        save_file(spoilt, source / "model.safetensors")
        told = rf"{name}: 1 of {spoilt[name].numel()} values are not finite"
        with pytest.raises(ValueError, match=f"{source}: .*{told.removeprefix('model')}"):
            convert.hf_to_mcore(source, load)
        with pytest.raises(ValueError, match=told):
            convert.init_student(source, [0, 1], tmp_path / "student")
        with mock.patch("megatron_fdd.convert.hf_source.check_finite"):
            convert.hf_to_mcore(source, load)
        with pytest.raises(ValueError, match=told):
            convert.mcore_to_hf(load, tmp_path / "out")
        shutil.rmtree(load)
        save_file(weights, source / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


@distributed(tp=1)
def test_values_too_large_for_a_dtype_are_refused(tmp_path: Path) -> None:
    source = toys.make_llama(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    weights["model.norm.weight"][0] = 70000.0
    save_file(weights, source / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight: 1 of .* not finite .*float16 is too narrow"):
        convert.hf_to_mcore(source, tmp_path / "mcore", dtype="float16")
    convert.hf_to_mcore(source, tmp_path / "mcore")
    with pytest.raises(ValueError, match="model.norm.weight: 1 of .* not finite .*a wider --dtype"):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "out", dtype="float16")


def _exports(load: Path, out: Path, message: str, **options: str | Path) -> None:
    with pytest.raises(ValueError, match=message):
        convert.mcore_to_hf(load, out, **options)
    assert not out.exists()


@distributed(tp=1)
def test_an_unlisted_class_is_exported_where_it_is_trusted(tmp_path: Path) -> None:
    """The class is in `common.pt`, for which Megatron asks torch for no kind of unpickling."""
    mcore.make_checkpoint(tmp_path, "plain")
    release = tmp_path / "mcore" / "release"
    state = dist_checkpointing.load_common_state_dict(str(release))
    torch.save({**state, "of_a_fork": UNLISTED}, release / "common.pt")
    (release / SUMS_FILE).unlink(missing_ok=True)
    told = r"common\.pt names the class fractions\.Fraction, .* give --fdd-trust-checkpoint$"
    with untrusting():
        _exports(tmp_path / "mcore", tmp_path / "out", told)
        trust_checkpoints()
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "out")


@distributed(tp=1)
def test_what_cannot_be_exported(tmp_path: Path) -> None:
    mcore.make_checkpoint(tmp_path, "plain")
    load, out, source = tmp_path / "mcore", tmp_path / "out", tmp_path / "source"
    _exports(tmp_path / "nowhere", out, f"the folder does not exist .no {TRACKER_FILE}")
    _exports(source / "config.json", out, f"a file, not a folder .no {TRACKER_FILE}")
    _exports(load, out, "5GB", max_shard_size="huge")
    _exports(load, out, "--hf-config .*no such file", hf_config=tmp_path / "nowhere")
    _exports(load, out, "--tokenizer .*not a folder with a tokenizer", tokenizer=tmp_path)
    toys.write_json(tmp_path / "wide.json", toys.llama_config(vocab_size=129))
    _without_vocab_size(load, tmp_path / "other")
    _exports(tmp_path / "other", out, "pass --hf-config")
    _exports(tmp_path / "other", out, "pass --tokenizer", hf_config=source)
    options = {"hf_config": tmp_path / "wide.json", "tokenizer": source}
    _exports(tmp_path / "other", out, "128 vocabulary rows, fewer than the vocab_size 129", **options)
    data = next((load / "release").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    _exports(load, out, "--load .*truncated")
    (load / TRACKER_FILE).write_text("12")
    _exports(load, out, "iter_0000012: .metadata is missing")


def _without_vocab_size(load: Path, save: Path) -> None:
    """Save the same weights as a run does that knows only the padded size of the vocabulary."""
    model, args = mcore.from_own_args(load)
    args.vocab_size = args.tokenizer_model = None
    mcore.save(save, model, args)


@distributed(tp=1)
def test_a_model_that_is_no_llama(tmp_path: Path) -> None:
    mcore.make_checkpoint(tmp_path, "attention_bias")
    load, out = tmp_path / "mcore", tmp_path / "out"
    model, args = mcore.from_own_args(load)
    args.qk_layernorm, args.softmax_type = True, "off-by-one"
    mcore.save(tmp_path / "other", model, args)
    told = r"qk_layernorm = True \(needs False\), softmax_type"
    _exports(tmp_path / "other", out, told, hf_config=load / "hf", tokenizer=load / "tokenizer")
    model, args = mcore.from_own_args(load)
    model.decoder.layers[1].mlp.linear_fc2.bias.data.fill_(0.5)
    mcore.save(tmp_path / "trained", model, args)
    given = {"hf_config": load / "hf", "tokenizer": load / "tokenizer"}
    _exports(tmp_path / "trained", out, r"layers.1.mlp.linear_fc2.bias, which are not zero", **given)
    args.num_layers = 4
    mcore.save(tmp_path / "deeper", model, args)
    _exports(
        tmp_path / "deeper",
        out,
        r"deeper.*layer_norm_weight has the shape \[3, 48\], and \[4, 48\] in the model",
        **given,
    )


def _import_wrong_shapes(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"v_proj.weight of shape \[60, 47\] does not fit config.json"):
        convert.hf_to_mcore(folder / "hf", folder / "mcore")
    assert [path.name for path in folder.iterdir()] == ["hf"]


@pytest.mark.tier("default")
def test_shapes_that_do_not_fit(tmp_path: Path) -> None:
    from megatron_fdd.convert.hf_folder import HfFolder

    source = HfFolder(toys.make_llama(tmp_path / "hf", tokenizer=False))
    tensors = {name: source.read(name) for name in source.tensors}
    tensors["model.layers.1.self_attn.v_proj.weight"] = torch.ones(60, 47)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    run_on_ranks(_import_wrong_shapes, Layout(tp=1), {"folder": tmp_path})


def _import_a_damaged_copy(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"layers.2.mlp.up_proj.weight is not what checksums.json says"):
        convert.hf_to_mcore(folder / "hf", folder / "mcore")
    assert sorted(path.name for path in folder.iterdir()) == ["hf", "start"]


@pytest.mark.tier("default")
def test_a_flipped_bit_in_a_folder_with_checksums(tmp_path: Path) -> None:
    convert.init_student(toys.make_llama(tmp_path / "start"), [0, 1, 2], tmp_path / "hf")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    run_on_ranks(_import_and_remove, Layout(ranks=2), {"folder": tmp_path})
    tensors["model.layers.2.mlp.up_proj.weight"].view(torch.int32)[3, 5] ^= 1
    save_file(tensors, path, metadata={"format": "pt"})
    run_on_ranks(_import_a_damaged_copy, Layout(ranks=2), {"folder": tmp_path})


def _import_and_remove(folder: Path) -> None:
    """The undamaged folder is accepted."""
    convert.hf_to_mcore(folder / "hf", folder / "mcore")
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder / "mcore")


def _apart(folder: Path) -> None:
    """Each rank has its own file system, and the second one has a folder that a killed run left."""
    rank = torch.distributed.get_rank()
    own = folder / f"node{rank}"
    (own / ".out.incomplete").mkdir(parents=True)
    with pytest.raises(ValueError, match="not the same folder for every rank"):
        convert.mcore_to_hf(folder / "mcore", own / "out")
    with pytest.raises(ValueError, match="not the same folder for every rank"):
        convert.hf_to_mcore(folder / "source", own / "out")
    assert not (own / "out").exists()


@pytest.mark.tier("default")
def test_folders_that_ranks_do_not_share(tmp_path: Path) -> None:
    run_on_ranks(mcore.make_checkpoint, Layout(tp=1), {"folder": tmp_path, "variant": "plain"})
    run_on_ranks(_apart, Layout(ranks=2), {"folder": tmp_path})


def _fail_on_one_rank(folder: Path, place: str, rank: int) -> None:
    """An error on one rank becomes every rank's error, and no files are left."""
    message = "RuntimeError: the disk of one rank"
    failing = torch.distributed.get_rank() == rank
    effect = {"side_effect": RuntimeError("the disk of one rank")} if failing else {}
    before = sorted(folder.rglob("*"))
    torch.distributed.barrier()
    with mock.patch(f"megatron_fdd.convert.{place}", **effect) if failing else contextlib.nullcontext():
        is_import = place.startswith(("to_mcore", "hf_source"))
        convert_one = convert.hf_to_mcore if is_import else convert.mcore_to_hf
        source = folder / ("source" if is_import else "mcore")
        with pytest.raises(ValueError, match=message):
            convert_one(source, folder / "out")
    torch.distributed.barrier()
    assert sorted(folder.rglob("*")) == before


FAILURES = [
    ("hf_source.check_names", 1),
    ("hf_source.HfFolder", 0),
    ("hf_source.digest", 1),
    ("to_mcore.write_companions", 0),
    ("table_export.family_of", 1),
    ("to_hf.write_index", 0),
    ("to_hf.copy_files", 0),
    ("mcore_checkpoint.StoredWeights.read", 1),
]


@pytest.mark.tier("default")
@pytest.mark.parametrize(("place", "rank"), FAILURES)
def test_what_fails_on_one_rank_is_told_by_all(tmp_path: Path, place: str, rank: int) -> None:
    # Every rank reads the biases that the model lacks, so that reading fails before writing.
    run_on_ranks(mcore.make_checkpoint, Layout(tp=1), {"folder": tmp_path, "variant": "attention_bias"})
    arguments = {"folder": tmp_path, "place": place, "rank": rank}
    run_on_ranks(_fail_on_one_rank, Layout(ranks=2), arguments)


@distributed(tp=1)
def test_a_checkpoint_of_two_dtypes(tmp_path: Path) -> None:
    """A float32 norm among bfloat16 weights is not rounded unless the user asks for it."""
    mcore.make_checkpoint(tmp_path, "bfloat16")
    model, args = mcore.from_own_args(tmp_path / "mcore")
    norm = model.decoder.final_layernorm.weight
    norm.data = norm.data.float() + 1e-4
    mcore.save(tmp_path / "mixed", model, args)
    given = {"hf_config": tmp_path / "source", "tokenizer": tmp_path / "source"}
    _exports(tmp_path / "mixed", tmp_path / "out", r"mixes dtypes .*final_layernorm.weight.*--dtype", **given)
    exported = convert.mcore_to_hf(tmp_path / "mixed", tmp_path / "out", dtype="float32", **given)
    assert exported.unchanged is None
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"], norm)


def test_where_a_folder_cannot_appear(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "link", "--save") as unfinished:  # as if the target of the link had been given
        (unfinished / "config.json").touch()
    assert [path.name for path in (tmp_path / "real").iterdir()] == ["config.json"]
    with mock.patch("os.path.ismount", return_value=True), pytest.raises(ValueError, match="mount point"):
        check_new_folder(tmp_path / "new", "--save")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("inline_container.cc: pos")]
)
def test_a_full_disk_is_named_with_its_flag(tmp_path: Path, error: Exception) -> None:
    """torch's writer reports it in its own words, and dist_checkpointing hides the type of both errors."""
    source, new = toys.make_llama(tmp_path / "source"), tmp_path / "new"
    with (
        mock.patch("megatron_fdd.convert.streaming_save._write_item", side_effect=error),
        pytest.raises(ValueError, match=rf"^--save {new}: cannot be written: .*; make room there"),
    ):
        convert.hf_to_mcore(source, new)
    convert.hf_to_mcore(source, tmp_path / "mcore")
    full = mock.patch(
        "megatron_fdd.convert.hf_writer.bytes_of", side_effect=OSError(28, "No space left on device")
    )
    for write in (
        lambda: convert.init_student(source, [0], new),
        lambda: convert.mcore_to_hf(tmp_path / "mcore", new),
    ):
        with (
            full,
            pytest.raises(ValueError, match=rf"^--hf-out {new}: cannot be written: .*; make room there"),
        ):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mcore", "source"]


@pytest.mark.tier("default")
def test_a_file_that_found_no_room_does_not_crash_the_end(tmp_path: Path) -> None:
    """torch's broken writer would crash when Python collects it."""
    source = toys.make_llama(tmp_path / "source", tokenizer=False)
    words = ["import", "--hf-model", str(source), "--save", str(tmp_path / "new"), "--config-only"]
    script = (
        "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\n"
        f"from megatron_fdd.cli import main\nmain({words}, prog_name='fdd')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: --save {tmp_path}/new: cannot be written: File too large (")
    assert result.returncode == 1
