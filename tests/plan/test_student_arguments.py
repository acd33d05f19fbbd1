"""Megatron's arguments as this package sets them."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_fdd.plan import student_arguments as arguments


@pytest.mark.parametrize("module", ["argparse", "module_that_nobody_has"])
def test_a_fusion_is_on_only_where_its_kernel_is(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fusions = ("gradient_accumulation_fusion", "masked_softmax_fusion")
    monkeypatch.setattr(arguments, "_APEX_KERNELS", dict.fromkeys(fusions, module))
    args = Namespace(use_distributed_optimizer=False, **dict.fromkeys(fusions, True))
    arguments.force_values(args)
    assert [getattr(args, fusion) for fusion in fusions] == 2 * [module == "argparse"]


@pytest.mark.parametrize("kernel", [None, print])
def test_rotary_embeddings_are_fused_only_by_transformer_engine(
    kernel: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arguments.rope_utils, "fused_apply_rotary_pos_emb", kernel)
    args = Namespace(use_distributed_optimizer=False, apply_rope_fusion=True)
    arguments.force_values(args)
    assert args.apply_rope_fusion == (kernel is not None)
