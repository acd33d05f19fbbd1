"""FP8 of student and teacher: whose flags go where, and which shapes TransformerEngine would refuse late."""

from __future__ import annotations

from argparse import Namespace

import pytest

from megatron_fdd.preflight import check_fp8_shapes
from megatron_fdd.teacher.arguments import teacher_args

RUN = Namespace(
    padded_vocab_size=128, pipeline_model_parallel_size=1, expert_model_parallel_size=1, num_experts=None,
    transformer_impl="transformer_engine", fp8="hybrid", fp8_recipe="delayed", fp8_param_gather=True, bf16=True,
    teacher_fp8_format=None, teacher_fp8_recipe="tensorwise", first_last_layers_bf16=True,
    num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=1,
)  # fmt: skip


def test_a_teacher_follows_neither_the_student_nor_its_own_training() -> None:
    stored = Namespace(num_layers=8, fp8="e4m3", fp8_recipe="delayed", fp8_output_proj=True)
    assert teacher_args(stored, RUN).fp8 is None
    run = Namespace(**{**vars(RUN), "fp8": None, "teacher_fp8_format": "e4m3", "teacher_fp8_recipe": "mxfp8"})
    teacher = teacher_args(stored, run)
    assert (teacher.fp8, teacher.fp8_recipe) == ("e4m3", "mxfp8")
    assert (teacher.fp8_output_proj, teacher.fp8_param_gather) == (False, False)
    assert (teacher.first_last_layers_bf16, teacher.num_layers_at_start_in_bf16) == (True, 2)
    run.teacher_fp8_recipe = "delayed"
    assert not teacher_args(
        stored, run
    ).first_last_layers_bf16  # Megatron's delayed scaling has all layers in FP8


MODEL = Namespace(
    fp8="e4m3", fp8_recipe="tensorwise", num_layers=4, hidden_size=64, num_attention_heads=4, kv_channels=None,
    ffn_hidden_size=160, seq_length=24, micro_batch_size=1, tensor_model_parallel_size=1, context_parallel_size=1,
    num_experts=None, moe_layer_freq=1, moe_ffn_hidden_size=None, expert_tensor_parallel_size=None,
)  # fmt: skip


# Every layer has experts: no matrix is as wide as ffn_hidden_size.
MIXTURE = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 160,
    "ffn_hidden_size": 161,
    "tensor_model_parallel_size": 4,
}


def model(**changes: object) -> Namespace:
    return Namespace(**{**vars(MODEL), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fp8": None, "hidden_size": 63},
        {"ffn_hidden_size": None},
        {"tensor_model_parallel_size": 2},
        {"fp8_recipe": "mxfp8", "seq_length": 32},
        {**MIXTURE, "expert_tensor_parallel_size": 1},
    ],
)
def test_shapes_that_fit(changes: dict[str, object]) -> None:
    check_fp8_shapes(model(**changes), "the student")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 20}, r"tensorwise for the student: .*: 20 tokens of a micro-batch on a rank \(of 8\)\."),
        ({"seq_length": 40, "context_parallel_size": 2}, r"20 tokens"),
        ({"tensor_model_parallel_size": 4}, r": feed-forward width / tensor parallel 4 40 \(of 16\)\."),
        (MIXTURE, r": experts' width / expert tensor parallel 4 40 \(of 16\)\."),
        ({**MIXTURE, "moe_layer_freq": 2, "expert_tensor_parallel_size": 1}, r": feed-forward width / .* 4 40 "),
        ({"kv_channels": 10}, r": attention width / tensor parallel 1 40 \(of 16\)"),
        ({"hidden_size": 72}, r": hidden size 72 \(of 16\), attention width / tensor parallel 1 72 \(of 16\)"),
        ({"fp8_recipe": "mxfp8"}, r"mxfp8 for the student: .*: 24 tokens of a micro-batch on a rank \(of 32\)"),
    ],
)  # fmt: skip
def test_shapes_that_do_not(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fp8_shapes(model(**changes), "the student")
