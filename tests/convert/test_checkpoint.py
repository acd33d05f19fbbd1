"""Checkpoints in Megatron's own format: its training code loads them at any layout, and what it saves converts back."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.serialization import get_crc32_options

from megatron_fdd import convert
from megatron_fdd.convert import streaming_save
from megatron_fdd.host.checkpoint import find_checkpoint, read_checkpoint_args
from megatron_fdd.host.file_sums import SUMS_FILE
from tests.convert import mcore, toys
from tests.harness.ranks import Layout, distributed, run_on_ranks

pytestmark = pytest.mark.tier("default")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model of odd sizes and import it on one rank, with 99 tokens padded to 128."""
    folder = tmp_path_factory.mktemp("saved")
    run_on_ranks(mcore.make_checkpoint, Layout(tp=1), {"folder": folder, "variant": "plain"})
    return folder


def _stock_load(saved: Path, flags: list[str]) -> None:
    model, args, iteration = mcore.from_stock_megatron(saved / "mcore", flags)
    assert iteration == 0
    assert args.consumed_train_samples == 0
    assert args.tokenizer_model == str(saved / "mcore" / "tokenizer")
    expected = toys.hf_logits(saved / "source", toys.TOKENS)
    got = mcore.logits(model, toys.TOKENS)
    assert (got[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        (1, []),
        (1, ["--finetune"]),
        (2, ["--no-load-optim", "--no-load-rng"]),
        (3, ["--finetune", "--padded-vocab-size", "384"]),
    ],
)
def test_megatron_training_loads_it(saved: Path, ranks: int, flags: list[str]) -> None:
    run_on_ranks(_stock_load, Layout(tp=ranks), {"saved": saved, "flags": flags})


def _crc32_while_writing(folder: Path) -> None:
    asked: list[bool] = []
    write = streaming_save._write_item

    def spy(*arguments: Any) -> Any:
        asked.append(get_crc32_options())
        return write(*arguments)

    with mock.patch.object(streaming_save, "_write_item", spy):
        convert.hf_to_mcore(folder / "source", folder / "again")
    assert set(asked) == {False}
    assert get_crc32_options()


def test_no_crc32_is_written_and_others_have_theirs(saved: Path, tmp_path: Path) -> None:
    """torch looks at none when it loads; every other test here loads such files."""
    (tmp_path / "source").symlink_to(saved / "source")
    run_on_ranks(_crc32_while_writing, Layout(ranks=1), {"folder": tmp_path})


def _own_args_load(saved: Path, padded_vocab_size: int) -> None:
    model, _ = mcore.from_own_args(saved / "mcore", padded_vocab_size=padded_vocab_size)
    expected = toys.hf_logits(saved / "source", toys.TOKENS)
    got = mcore.logits(model, toys.TOKENS)
    assert (got[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE


@pytest.mark.parametrize(("ranks", "padded_vocab_size"), [(2, 256), (3, 384), (2, 100)])
def test_its_args_build_it_at_other_padding(saved: Path, ranks: int, padded_vocab_size: int) -> None:
    arguments = {"saved": saved, "padded_vocab_size": padded_vocab_size}
    run_on_ranks(_own_args_load, Layout(tp=ranks), arguments)


@pytest.mark.parametrize("ranks", [2, 3])
def test_export_at_another_layout(saved: Path, tmp_path: Path, ranks: int) -> None:
    arguments = {"load": saved / "mcore", "hf_out": tmp_path / "back", "max_shard_size": "40KB"}
    run_on_ranks(convert.mcore_to_hf, Layout(tp=ranks), arguments)
    files = sorted((tmp_path / "back").glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    run_on_ranks(convert.mcore_to_hf, Layout(tp=1), {**arguments, "hf_out": tmp_path / "alone"})
    for path in [
        *files,
        tmp_path / "back" / "checksums.json",
        tmp_path / "back" / "model.safetensors.index.json",
    ]:
        assert path.read_bytes() == (tmp_path / "alone" / path.name).read_bytes(), path.name
    assert toys.tensor_hashes(tmp_path / "back") == toys.tensor_hashes(saved / "source")


def _world_alone(saved: Path, back: Path) -> None:
    """Convert without Megatron's parallel state, so that the conversion makes it and ends it."""
    from megatron.core import parallel_state

    convert.mcore_to_hf(saved / "mcore", back, dtype="bfloat16")
    assert not parallel_state.model_parallel_is_initialized()
    assert torch.distributed.is_initialized()


def test_export_in_another_dtype(saved: Path, tmp_path: Path) -> None:
    run_on_ranks(_world_alone, Layout(ranks=2), {"saved": saved, "back": tmp_path / "back"})
    assert {text.split()[0] for text in toys.tensor_hashes(tmp_path / "back").values()} == {"torch.bfloat16"}
    assert toys.read_json(tmp_path / "back" / "config.json")["torch_dtype"] == "bfloat16"


@distributed(tp=1)
def test_args_are_complete_and_plain(tmp_path: Path) -> None:
    mcore.make_checkpoint(tmp_path, "llama3")
    checkpoint = find_checkpoint(str(tmp_path / "mcore"), "--load")
    args = vars(read_checkpoint_args(checkpoint, "--load"))
    expected = {
        "num_query_groups": 6,
        "group_query_attention": True,
        "kv_channels": 10,
        "layernorm_epsilon": 3e-4,
        "use_rope_scaling": True,
        "rope_scaling_factor": 32.0,
        "rotary_base": 500000,
        "qk_layernorm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "vocab_size": 99,
        "padded_vocab_size": 128,
        "params_dtype": torch.float32,
    }
    assert {name: args[name] for name in expected} == expected
    owners = {type(value).__module__.split(".")[0] for value in args.values()}
    assert owners <= {"builtins", "torch", "megatron", "signal"}


def _train_a_step(saved: Path, out: Path) -> torch.Tensor:
    """Do one optimizer step and save it with Megatron's own function; return the trained model's logits."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.training.checkpointing import save_checkpoint

    model, args, _ = mcore.from_stock_megatron(saved / "mcore", ["--save", str(out), "--save-interval", "1"])
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=0.01), [wrapped])
    length = toys.TOKENS.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    wrapped(toys.TOKENS, torch.arange(length)[None], mask, labels=toys.TOKENS).mean().backward()
    wrapped.finish_grad_sync()
    optimizer.step()
    args.vocab_size = None  # as in a run that takes the padded size from the checkpoint
    save_checkpoint(1, [wrapped], optimizer, None, 0)
    return mcore.logits(model, toys.TOKENS)[..., :99]


def test_a_trained_checkpoint_goes_back(saved: Path, tmp_path: Path) -> None:
    arguments = {"saved": saved, "out": tmp_path / "trained"}
    trained = run_on_ranks(_train_a_step, Layout(tp=2), arguments)[0]
    # hf/ and tokenizer/ are found beside the checkpoint that the run started from.
    export = {"load": tmp_path / "trained", "hf_out": tmp_path / "back"}
    run_on_ranks(convert.mcore_to_hf, Layout(tp=1), export)
    exported = toys.hf_logits(tmp_path / "back", toys.TOKENS)
    assert (exported - trained).abs().max() < toys.LOGIT_TOLERANCE
    assert (exported - toys.hf_logits(saved / "source", toys.TOKENS)).abs().max() > 0.1


def test_exported_folder_loads_by_the_auto_classes(saved: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arguments = {"load": saved / "mcore", "hf_out": tmp_path / "back"}
    run_on_ranks(convert.mcore_to_hf, Layout(tp=1), arguments)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    ids = tokenizer("the student", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]).strip() == "the student"
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    assert tokenizer.chat_template is not None
    assert model.generation_config.temperature == 0.6


NORM = "decoder.layers.{}weight"
LOCAL_NORM, ENGINE_NORM = NORM.format("mlp.linear_fc1.layer_norm_"), NORM.format("pre_mlp_layernorm.")


def _forget(checkpoint: Path, key: str) -> None:
    """Change the checkpoint as if it had been written without this tensor."""
    (checkpoint / SUMS_FILE).unlink(missing_ok=True)
    path = checkpoint / ".metadata"
    index = pickle.loads(path.read_bytes())
    del index.state_dict_metadata[key]
    index.storage_data = {place: info for place, info in index.storage_data.items() if place.fqn != key}
    path.write_bytes(pickle.dumps(index))


@pytest.mark.parametrize("kept", [LOCAL_NORM, ENGINE_NORM])
@distributed(tp=1)
def test_the_norm_before_experts_has_the_names_of_both_implementations(tmp_path: Path, kept: str) -> None:
    from megatron.core import dist_checkpointing

    mcore.make_checkpoint(tmp_path, "qwen3_moe")
    checkpoint = tmp_path / "mcore" / "release"
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    assert {LOCAL_NORM, ENGINE_NORM} <= set(stored)
    assert "decoder.layers.input_layernorm.weight" not in stored
    # A run with one implementation saves only that implementation's name.
    _forget(checkpoint, LOCAL_NORM if kept == ENGINE_NORM else ENGINE_NORM)
    model, _ = mcore.from_own_args(tmp_path / "mcore")
    expected = toys.hf_logits(tmp_path / "source", toys.TOKENS)
    assert (mcore.logits(model, toys.TOKENS)[..., :99] - expected).abs().max() < toys.LOGIT_TOLERANCE
    assert convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "back").unchanged == len(
        toys.tensor_hashes(tmp_path / "source")
    )
    _forget(checkpoint, kept)
    with pytest.raises(ValueError, match=r"Missing in it: decoder.layers.mlp.linear_fc1.layer_norm_weight"):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "again")


@distributed(tp=1)
def test_weights_that_the_table_does_not_know(tmp_path: Path) -> None:
    """A bias that the args exclude is listed, not left out."""
    mcore.make_checkpoint(tmp_path, "qwen2")
    model, args = mcore.from_own_args(tmp_path / "mcore")
    args.add_qkv_bias = False
    mcore.save(tmp_path / "other", model, args)
    seed = toys.read_json(tmp_path / "source" / "config.json")
    seed |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    toys.write_json(tmp_path / "llama.json", seed)
    given = {"hf_config": tmp_path / "llama.json", "tokenizer": tmp_path / "source"}
    with pytest.raises(ValueError, match=r"not used: decoder.layers.self_attention.linear_qkv.bias"):
        convert.mcore_to_hf(tmp_path / "other", tmp_path / "out", **given)
