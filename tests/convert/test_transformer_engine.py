"""Checkpoints that are the same for Megatron's local modules and for TransformerEngine's modules, in both directions.

TransformerEngine puts norms into linears and experts into one module, under other parameter names. If it is not
installed, the tests use only its Python code, as `tests/transformer_engine` does: nothing is computed here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from megatron_fdd import convert
from tests.convert import toys
from tests.convert.toy_gpt2 import make_gpt2
from tests.transformer_engine import PYTHON

pytestmark = pytest.mark.tier("all")

ROOT = Path(__file__).parents[2]
VARIANTS = (
    "plain",
    "tied",
    "biases",
    "qwen2",
    "qwen3",
    "mistral_window",
    "bfloat16",
    "olmo2",
    "gemma3_text",
    "cohere2",
    "hunyuan_v1_dense",
)
MIXTURES = (
    *("mixtral", "qwen3_moe", "qwen3_moe_mixed", "granitemoe", "ernie4_5_moe"),
    *("qwen2_moe", "glm4_moe", "gpt_oss", "deepseek_v3_yarn"),
)


@pytest.mark.skipif(
    not PYTHON.is_dir() and not any(distributions(name="transformer_engine")),
    reason="needs TransformerEngine, or its Python: source tools/env.sh",
)
def test_there_and_back_is_bit_identical(tmp_path: Path) -> None:
    pairs: list[str] = []
    for name in (*VARIANTS, *MIXTURES, "gpt2"):
        source = tmp_path / name
        make_gpt2(source) if name == "gpt2" else toys.make_llama(source, name)
        convert.hf_to_mcore(source, tmp_path / f"{name}-mcore")
        pairs += [str(tmp_path / f"{name}-mcore"), str(tmp_path / f"{name}-te")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
    }
    command = [sys.executable, "-m", "tests.convert.te_model", *pairs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    for name in (*VARIANTS, *MIXTURES, "gpt2"):
        for kind in ("plain", "grouped") if name in MIXTURES else ("plain",):
            back = tmp_path / f"{name}-{kind}-back"
            convert.mcore_to_hf(tmp_path / f"{name}-te" / kind, back, hf_config=tmp_path / name)
            assert toys.tensor_hashes(back) == toys.tensor_hashes(tmp_path / name), (name, kind)
