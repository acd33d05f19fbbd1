"""Megatron's arguments as this package sets them."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_fdd import arguments


@pytest.mark.parametrize("module", ["argparse", "module_that_nobody_has"])
def test_a_fusion_is_on_only_where_its_kernel_is(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "WGRAD_KERNEL", module)
    args = Namespace(use_distributed_optimizer=False, gradient_accumulation_fusion=True)
    arguments.force_values(args)
    assert args.gradient_accumulation_fusion == (module == "argparse")
