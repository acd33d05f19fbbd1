"""The flags that a rehearsal adds to a recipe's own."""

from __future__ import annotations

import sys

import pytest
from megatron.training.arguments import parse_args

from megatron_fdd.host.rehearsal import add_flags


def _parsed(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.setattr(sys, "argv", ["train", *add_flags(flags)])
    return parse_args()


def _check(args: object, **expected: object) -> None:
    assert {name: getattr(args, name) for name in expected} == expected


def test_megatron_understands_every_added_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    args = _parsed(["--num-layers", "3"], monkeypatch)
    _check(args, num_layers=3, transformer_impl="local", distributed_backend="gloo", num_workers=0)
    _check(args, use_cpu_initialization=True, gradient_accumulation_fusion=False, apply_rope_fusion=False)
    _check(args, masked_softmax_fusion=False, bias_swiglu_fusion=False, bias_dropout_fusion=False)
    # The unfused GELU would be another function.
    _check(args, bias_gelu_fusion=True)
    assert args.attention_backend.name == "unfused"


def test_what_needs_a_gpu_is_overruled_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = ["--transformer-impl", "transformer_engine", "--distributed-backend=nccl", "--tp-comm-overlap"]
    with pytest.warns(UserWarning, match="transformer_engine, --distributed-backend nccl, --tp-comm-overlap"):
        args = _parsed(recipe, monkeypatch)
    _check(args, transformer_impl="local", distributed_backend="gloo", tp_comm_overlap=False)


def test_fp8_of_a_recipe_is_left_out_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = "--fp8-format hybrid --fp8-recipe=blockwise --bf16 --first-last-layers-bf16 --lr 0.1".split()
    with pytest.warns(UserWarning, match="--fp8-format hybrid, --fp8-recipe blockwise"):
        args = _parsed(recipe, monkeypatch)
    _check(args, fp8=None, fp8_recipe="delayed", bf16=True, first_last_layers_bf16=False, lr=0.1)
    with pytest.warns(UserWarning, match="--teacher-fp8-format e4m3"):
        kept = add_flags(["--teacher-fp8-format", "e4m3", "--teacher-fp8-recipe=mxfp8", "--bf16"])
    assert kept[0] == "--bf16"
    padding = ["--moe-router-padding-for-quantization", "--moe-router-padding-for-fp8"]  # refused without FP8
    with pytest.warns(UserWarning, match=padding[0]):
        assert not set(padding) & set(add_flags(padding))


def test_a_plan_knows_of_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    import megatron_fdd.config

    recipe = (
        "--fdd-dry-run --fp8-format hybrid --teacher-fp8-format=e4m3 --first-last-layers-bf16 --bf16".split()
    )
    monkeypatch.setattr(sys, "argv", ["train", *add_flags(recipe)])
    args = parse_args(lambda parser: megatron_fdd.config.add_fdd_args(parser) or parser)
    _check(args, fp8="hybrid", teacher_fp8_format="e4m3", first_last_layers_bf16=True)
    _check(args, transformer_impl="transformer_engine", distributed_backend="gloo", apply_rope_fusion=False)


def test_graphs_are_left_out_but_for_those_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="CPUs: --cuda-graph-impl local, --optimizer-cpu-offload$"):
        recipe = add_flags(["--cuda-graph-impl", "local", "--optimizer-cpu-offload", "--bf16"])
    assert recipe[0] == "--bf16"
    assert add_flags(["--cuda-graph-impl=full_iteration"])[0] == "--cuda-graph-impl=full_iteration"


def test_what_runs_anywhere_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    _check(
        _parsed(["--num-workers=2", "--hidden-dropout", "0.3"], monkeypatch),
        num_workers=2,
        hidden_dropout=0.3,
    )


def test_no_flags_at_all() -> None:
    assert add_flags([]) == add_flags(add_flags([]))


@pytest.mark.filterwarnings("error")
def test_adding_twice_adds_once() -> None:
    once = add_flags(["--lr", "-1e-3", "--bf16"])
    assert add_flags(once) == once
