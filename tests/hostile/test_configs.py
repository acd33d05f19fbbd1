"""Values of the wrong kind are refused, with file, field, value and what is allowed, before anything is built."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training import argument_utils, checkpointing

from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.experts import Experts
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.student import parse_layers
from megatron_fdd.data.tokenizer_identity import identity_of_folder
from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.like_flags import READ_TO_BUILD, READ_TO_LOAD, check_like_flags
from megatron_fdd.host.model_fields import ARCHITECTURE, check_stored_args
from tests.convert import toys
from tests.harness.command_lines import training_parser
from tests.hostile import configs

CASES = [
    (variant, field, value, allowed)
    for variant, field, values, allowed in configs.FIELDS
    for value in values
    if not (field in ("head_dim", "num_key_value_heads", "n_inner") and value is None)
]


def arguments_of(config: dict[str, Any]) -> dict[str, Any]:
    return family_of(config).megatron_args(config)


@pytest.mark.parametrize(("variant", "field", "value", "allowed"), CASES, ids=lambda each: shown(each)[:30])
def test_a_field_of_the_wrong_kind(variant: str, field: str, value: Any, allowed: str) -> None:
    started_s = time.process_time()
    with pytest.raises(ValueError, match="config.json has") as refused:
        arguments_of({**configs.config_of(variant), field: value})
    assert str(refused.value).startswith(
        f'config.json has "{field}": {shown(value)}, which must be {allowed}'
    )
    assert time.process_time() - started_s < 1


@pytest.mark.parametrize(("variant", "changes", "message"), configs.TOGETHER)
def test_fields_that_do_not_fit_together(variant: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments_of({**configs.config_of(variant), **changes})


def test_the_largest_values_are_taken_at_once() -> None:
    most = {"num_hidden_layers": 10_000, "hidden_size": 1_000_000, "num_attention_heads": 10_000}
    config = configs.config_of("plain") | most | {"num_key_value_heads": 1, "vocab_size": 100_000_000}
    started_s = time.process_time()
    assert arguments_of(config)["num_layers"] == 10_000
    assert len(family_of(config).rows(config)) > 60_000
    assert time.process_time() - started_s < 5


@pytest.mark.parametrize("variant", [*toys.VARIANTS, "gpt2"])
def test_nothing_right_is_refused(variant: str) -> None:
    """Neither a config, nor the arguments that are made of it."""
    config = configs.config_of(variant)
    args = arguments_of(config)
    stored = argparse.Namespace(**{**family_of(config).fixed, **args})
    assert check_stored_args(stored, "--load x") is stored
    if "num_experts" in args:
        assert Experts.of_args(stored).count == args["num_experts"]


def test_megatrons_defaults_are_right() -> None:
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    defaults = vars(parser.parse_args([]))
    unset = {name for name in ("num_layers", "hidden_size", "num_attention_heads") if defaults[name] is None}
    wrong = {
        name: defaults[name]
        for name in ARCHITECTURE.keys() & defaults
        if not ARCHITECTURE[name].fits(defaults[name])
    }
    assert wrong.keys() <= unset, wrong


def test_stored_texts_are_those_of_megatrons_flags() -> None:
    """What a checkpoint may name is what the flag of the same name takes: of another word Megatron makes nothing."""
    choices = {action.dest: action.choices for action in training_parser()._actions}
    for name in (
        "position_embedding_type",
        "rope_type",
        "normalization",
        "softmax_type",
        "moe_router_score_function",
    ):
        assert choices[name]
        assert all(ARCHITECTURE[name].fits(word) for word in choices[name]), name
        assert not ARCHITECTURE[name].fits("x")


@pytest.mark.parametrize(("name", "value", "allowed"), configs.ARGUMENTS, ids=lambda each: shown(each)[:30])
def test_a_stored_argument_of_the_wrong_kind(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match="--teacher-load x") as refused:
        check_stored_args(configs.stored_args(**{name: value}), "--teacher-load x")
    assert str(refused.value).startswith(
        f"--teacher-load x: stores {name} = {shown(value)}, which must be {allowed}"
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (5, "its arguments are 5, not those that Megatron stores"),
        (argparse.Namespace(num_layers=2, hidden_size=8), "stores no num_attention_heads"),
        (configs.with_odd_name(), "stores an argument named 5, which is no name"),
        (
            configs.stored_args(num_experts=4, moe_router_topk=5),
            "moe_router_topk = 5, .* at most .* experts, 4",
        ),
        (configs.stored_args(num_experts=10**5, num_layers=11), "1,000,000 in all 11 layers"),
    ],
)
def test_arguments_that_describe_no_model(args: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"--load x: .*{message}"):
        check_stored_args(args, "--load x")


@pytest.mark.parametrize(
    ("value", "allowed"),
    [("yes", "true or false"), (5, "true or false"), ({"a": 1}, "true or false"), (True, None), (None, None)],
)
def test_other_stored_arguments_are_like_their_flags(value: Any, allowed: str | None) -> None:
    args = configs.stored_args(bf16=value, own={"a": 1}, data_path=["x"], unread={"b": 2})
    defaults = {"bf16": False, "data_path": None, "unread": 3}
    read = {"bf16", "own", "data_path"}
    if allowed is None:
        check_like_flags(args, defaults, "--load x", read)
        return
    with pytest.raises(ValueError, match=rf"^--load x: stores bf16 = .*, which must be {allowed}: "):
        check_like_flags(args, defaults, "--load x", read)


def named_in(function: Callable[..., Any], namespaces: set[str], calls: set[str]) -> set[str]:
    """The names that Megatron's source reads of some namespaces, or passes to functions of its own."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in namespaces:
            found.add(node.attr)
        elif isinstance(node, ast.Call):
            name, texts = (
                ast.unparse(node.func),
                [each for each in node.args if isinstance(each, ast.Constant)],
            )
            if name in calls or (name in ("getattr", "hasattr") and ast.unparse(node.args[0]) in namespaces):
                found |= {str(each.value) for each in texts if isinstance(each.value, str)}
    return found


def test_what_megatron_reads_of_stored_arguments() -> None:
    """The table has every name that Megatron's source has, and no other."""
    stored, calls = {"checkpoint_args", "ckpt_args", "state_dict['args']"}, {"_set_arg", "_compare"}
    loading = (
        checkpointing.load_args_from_checkpoint,
        checkpointing.load_checkpoint,
        checkpointing.check_checkpoint_args,
        checkpointing._maybe_setup_gpt_to_hybrid_load,
    )
    assert set().union(*(named_in(each, stored, calls) for each in loading)) == READ_TO_LOAD
    building = (
        argument_utils.gpt_config_from_args,
        argument_utils.core_transformer_config_from_args,
        argument_utils._apply_yarn_config_from_args,
    )
    named = set().union(*(named_in(each, {"args"}, set()) for each in building))
    fields = {field.name for field in dataclasses.fields(MLATransformerConfig)}
    assert named | fields == READ_TO_BUILD


@pytest.mark.parametrize(("file", "message"), configs.SHARDS, ids=lambda each: shown(each)[:30])
def test_an_index_that_names_no_file_of_its_folder(file: Any, message: str, tmp_path: Path) -> None:
    toys.write_json(tmp_path / "config.json", configs.config_of("plain"))
    (tmp_path / "model").mkdir()
    index = configs.write_index(tmp_path, {"a": file})
    with pytest.raises(
        ValueError, match=re.escape(f"{index} names ") + ".*" + message.removeprefix("names ")
    ):
        _ = HfFolder(tmp_path).tensors


def test_links_into_a_cache_are_followed(tmp_path: Path) -> None:
    """The folders of a hub's cache are links to files elsewhere, named by their hashes."""
    plain = toys.make_llama(tmp_path / "model", tokenizer=False)
    before = {name: HfFolder(plain).read(name).clone() for name in HfFolder(plain).tensors}
    configs.link_to_cache(plain, tmp_path / "cache")
    assert (plain / "model.safetensors").is_symlink()
    after = HfFolder(plain)
    assert all(after.read(name).equal(value) for name, value in before.items())
    assert len(before) > 10


@pytest.mark.parametrize("name", configs.TOKENIZERS)
def test_a_tokenizer_of_another_type(name: str, tmp_path: Path) -> None:
    write, message = configs.TOKENIZERS[name]
    write(tmp_path)
    with pytest.raises(ValueError, match=message) as refused:
        identity_of_folder(tmp_path)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("text", ["", "0-100000000", "\u00b2", "1" * 5000, "0-", "-1", "1,,2"])
def test_layers_of_a_student(text: str) -> None:
    with pytest.raises(ValueError, match=r"^--layers .*(is neither a layer|must lie within)"):
        parse_layers(text, 30)
