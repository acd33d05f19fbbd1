"""A checkpoint without weights: it has the arguments of a real one, and serves only for planning."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_fdd import convert
from megatron_fdd.convert.hf_folder import SINGLE_FILE
from megatron_fdd.host.checkpoint import find_checkpoint, read_checkpoint_args
from tests.convert import toys
from tests.harness.ranks import Layout, run_on_ranks

pytestmark = pytest.mark.tier("default")


def _both(folder: Path) -> None:
    """Convert, on every rank, a folder with weights, and then its config after the weights are gone."""
    source = folder / "source"
    convert.hf_to_mcore(source, folder / "whole", vocabulary_divisor=64)
    (source / SINGLE_FILE).unlink(missing_ok=True)
    convert.config_to_mcore(source, folder / "plan", vocabulary_divisor=64)


@pytest.mark.parametrize("variant", ["qwen3_moe", "bfloat16"])
def test_the_arguments_are_those_of_a_conversion(tmp_path: Path, variant: str) -> None:
    toys.make_llama(tmp_path / "source", variant)
    run_on_ranks(_both, Layout(ranks=1), {"folder": tmp_path})
    whole, plan = (
        vars(read_checkpoint_args(find_checkpoint(str(tmp_path / name), "--load", to_plan=True), "--load"))
        for name in ("whole", "plan")
    )
    assert plan.pop("tokenizer_model") == str(tmp_path / "plan/tokenizer")
    assert whole.pop("tokenizer_model") == str(tmp_path / "whole/tokenizer")
    assert plan == whole
    assert (tmp_path / "plan/tokenizer/tokenizer.json").is_file()
    assert (tmp_path / "plan/hf/config.json").is_file()
    assert find_checkpoint(str(tmp_path / "whole"), "--load").is_dir()
    with pytest.raises(
        ValueError, match=r"--teacher-load .*plan: holds .* no weights .*without --config-only"
    ):
        find_checkpoint(str(tmp_path / "plan"), "--teacher-load")


def _refused(folder: Path, dtype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert.config_to_mcore(folder, folder / "plan", dtype=dtype)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    for name, value, message in (
        ("torch_dtype", "float8_e4m3fn", "float8_e4m3fn.*--dtype"),
        ("model_type", "bloom", "ALiBi"),
    ):
        toys.write_json(tmp_path / "config.json", toys.llama_config(**{name: value}))
        arguments = {"folder": tmp_path, "dtype": "checkpoint", "message": message}
        run_on_ranks(_refused, Layout(ranks=2), arguments)
