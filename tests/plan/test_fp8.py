"""FP8 of student and teacher: the effect of their flags, and the shapes that TransformerEngine would refuse late."""

from __future__ import annotations

import pickle
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import pytest
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from megatron_fdd.config import FddConfig
from megatron_fdd.host.checkpoint import read_extra_states
from megatron_fdd.host.role import Role
from megatron_fdd.plan import fp8_scales
from megatron_fdd.plan.context import Context, Model, StoredModel
from megatron_fdd.plan.fp8 import check_fp8_shapes
from megatron_fdd.plan.fp8_scales import check_student_scales
from megatron_fdd.step.teacher.arguments import teacher_args

RUN = Namespace(
    padded_vocab_size=128, pipeline_model_parallel_size=1, expert_model_parallel_size=1, num_experts=None,
    transformer_impl="transformer_engine", fp8="hybrid", fp8_recipe="delayed", fp8_param_gather=True, bf16=True,
    teacher_fp8_format=None, teacher_fp8_recipe="tensorwise", first_last_layers_bf16=True,
    num_layers_at_start_in_bf16=2, num_layers_at_end_in_bf16=1, use_cpu_initialization=True,
)  # fmt: skip


def test_a_teacher_follows_neither_the_student_nor_its_own_training() -> None:
    stored = Namespace(num_layers=8, fp8="e4m3", fp8_recipe="delayed", fp8_output_proj=True)
    stored.te_precision_config_file = "per-layer.yaml"
    teacher = teacher_args(stored, RUN)
    assert (teacher.fp8, teacher.fp8_param_gather, teacher.use_cpu_initialization) == (None, False, True)
    assert teacher_args(stored, RUN).te_precision_config_file is None
    run = Namespace(**{**vars(RUN), "fp8": None, "teacher_fp8_format": "e4m3", "teacher_fp8_recipe": "mxfp8"})
    teacher = teacher_args(stored, run)
    assert (teacher.fp8, teacher.fp8_recipe) == ("e4m3", "mxfp8")
    assert not teacher.fp8_output_proj
    assert (teacher.fp8_param_gather, teacher.use_cpu_initialization) == (True, False)  # no copy in bf16
    assert (teacher.first_last_layers_bf16, teacher.num_layers_at_start_in_bf16) == (True, 2)
    run.teacher_fp8_recipe = "delayed"
    assert not teacher_args(
        stored, run
    ).first_last_layers_bf16  # Megatron's delayed scaling has all layers in FP8


MODEL = Namespace(
    fp8="e4m3", fp8_recipe="tensorwise", num_layers=4, hidden_size=64, num_attention_heads=8, kv_channels=None,
    group_query_attention=False, num_query_groups=1, attention_output_gate=False, multi_latent_attention=False,
    ffn_hidden_size=160, seq_length=48, micro_batch_size=1, tensor_model_parallel_size=1, context_parallel_size=1,
    sequence_parallel=False, num_experts=None, moe_layer_freq=1, moe_ffn_hidden_size=None, moe_latent_size=None,
    moe_shared_expert_intermediate_size=None, expert_tensor_parallel_size=None, first_last_layers_bf16=False,
    num_layers_at_start_in_bf16=1, num_layers_at_end_in_bf16=1, swiglu=True, moe_router_topk=2,
    pipeline_model_parallel_size=1, expert_model_parallel_size=1,
)  # fmt: skip


# Every layer has experts, so that no matrix is as wide as ffn_hidden_size.
MIXTURE = {
    "num_experts": 4,
    "moe_ffn_hidden_size": 160,
    "ffn_hidden_size": 161,
    "tensor_model_parallel_size": 4,
}
ONE_EXPERT_RANK = {**MIXTURE, "expert_tensor_parallel_size": 1}
# Queries, keys and values are (8 + 2 x 1) x 8 / 2 = 40 wide.
ONE_GROUP = {"group_query_attention": True, "num_query_groups": 1, "tensor_model_parallel_size": 2}
LATENT = {"multi_latent_attention": True, "kv_channels": 10, "q_lora_rank": 20, "kv_lora_rank": 10}
LATENT |= {"qk_head_dim": 6, "qk_pos_emb_head_dim": 4, "v_head_dim": 10}
BF16_ENDS = {"first_last_layers_bf16": True}


def model(**changes: object) -> Namespace:
    return Namespace(**{**vars(MODEL), **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fp8": None, "hidden_size": 63},
        {"num_layers": None},
        {"hidden_size": None},
        {"num_attention_heads": None},
        {"ffn_hidden_size": None},
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"fp8_recipe": "mxfp8", "seq_length": 32},
        ONE_EXPERT_RANK,
        {**ONE_EXPERT_RANK, "moe_shared_expert_intermediate_size": 64, "moe_latent_size": 48},
        LATENT,
        {**BF16_ENDS, "num_layers": 2, "seq_length": 20},
        {**ONE_EXPERT_RANK, **BF16_ENDS, "moe_layer_freq": [0, 1, 1, 0]},
    ],
)
def test_shapes_that_fit(changes: dict[str, object]) -> None:
    check_fp8_shapes(Model(Role.STUDENT, model(**changes), None))
    check_fp8_shapes(Model(Role.TEACHER, model(**changes), None))


@pytest.mark.parametrize(
    "changes", [{"seq_length": 24}, {"seq_length": 48, "context_parallel_size": 2}, ONE_GROUP]
)
def test_shapes_that_fit_a_frozen_model_alone(changes: dict[str, object]) -> None:
    check_fp8_shapes(Model(Role.TEACHER, model(**changes), None))
    with pytest.raises(
        ValueError, match=r"for the student: .* (24|40) .*\(of 16\)\. .* leave --fp8-format out"
    ):
        check_fp8_shapes(Model(Role.STUDENT, model(**changes), None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 20}, r"tensorwise for the teacher: .*: 20 tokens of a micro-batch on a rank \(of 8\)\. Cha"),
        ({"seq_length": 40, "context_parallel_size": 2}, r"20 tokens"),
        (
            {"sequence_parallel": True, "tensor_model_parallel_size": 4},
            r"12 tokens of a micro-batch on a sequence-parallel rank \(of 8\), feed-forward width / tensor .* 4 40 ",
        ),
        ({"tensor_model_parallel_size": 4}, r": feed-forward width / tensor parallel 4 40 \(of 16\)\. Change --tens"),
        (MIXTURE, r": experts' width / expert tensor parallel 4 40 \(of 16\)\."),
        ({**MIXTURE, "moe_layer_freq": 2, "expert_tensor_parallel_size": 1}, r": feed-forward width / .* 4 40 "),
        ({**ONE_EXPERT_RANK, "moe_shared_expert_intermediate_size": 96}, r"shared experts' width / .* 4 24 "),
        ({**ONE_EXPERT_RANK, "moe_latent_size": 40}, r"experts' latent width 40 "),
        ({**ONE_EXPERT_RANK, **BF16_ENDS, "moe_layer_freq": [1, 0, 1, 1]}, r"feed-forward width / .* 4 40 "),
        ({"kv_channels": 5}, r": attention width / tensor parallel 1 40 \(of 16\)"),
        ({"group_query_attention": True, "kv_channels": 2}, r"keys and values / tensor parallel 1 20 \(of 8\)"),
        ({"group_query_attention": True, "kv_channels": 2, "attention_output_gate": True}, r"parallel 1 36 "),
        ({"hidden_size": 72}, r": hidden size 72 \(of 16\), attention width / tensor parallel 1 72 \(of 16\)"),
        ({"hidden_size": 72, "kv_channels": 8}, r": hidden size 72 \(of 16\)\. Leave --teacher-fp8-format out"),
        ({"fp8_recipe": "mxfp8"}, r"mxfp8 for the teacher: .*: 48 tokens of a micro-batch on a rank \(of 32\)"),
        ({**ONE_GROUP, "fp8_recipe": "mxfp8", "seq_length": 32}, r"values / tensor parallel 2 40 \(of 32\), "),
        ({"seq_length": 20}, r"Change --seq-length, --micro-batch-size, or leave --teacher-fp8-format out"),
    ],
)  # fmt: skip
def test_shapes_that_do_not(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_fp8_shapes(Model(Role.TEACHER, model(**changes), None))
    with pytest.raises(ValueError, match="for the student"):
        check_fp8_shapes(Model(Role.STUDENT, model(**changes), None))


EXPERTS = Namespace(
    fp8="hybrid", fp8_recipe="delayed", num_experts=8, moe_grouped_gemm=True, expert_model_parallel_size=2,
    transformer_impl="transformer_engine",
)  # fmt: skip


def test_a_student_resumes_grouped_experts_scales_as_they_were_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8_scales, "_holds_scales", lambda _stored: True)
    monkeypatch.setenv("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE", "1")

    def check(**changes: object) -> None:
        args = Namespace(**vars(EXPERTS) | changes)
        stored = StoredModel("S", "--load", Path("S/iter_0000001"), EXPERTS)
        check_student_scales(Context(FddConfig(teacher_load="T"), args, stored_student=stored))

    check()
    other = {"expert_model_parallel_size": 4}
    with pytest.raises(ValueError, match="size 2; at 4 .* use --expert-model-parallel-size 2, or the recipe"):
        check(**other)
    for harmless in (
        {"fp8": None},
        {"fp8_recipe": "tensorwise"},
        {"moe_grouped_gemm": False},
        {"num_experts": None},
    ):
        check(**other, **harmless)


def test_extra_states_are_read_from_files_opened_once(tmp_path: Path) -> None:
    """A checkpoint may have thousands of experts, on a file system where opening a file is slow."""
    stored, contents = {}, {"__0_0.distcp": b"", "__1_0.distcp": b""}
    for expert in range(6):
        name = f"__{expert % 2}_0.distcp"
        for key in (f"mlp.{expert}._extra_state/shard_0_1", f"mlp.{expert}.weight"):
            data = f"<{key}>".encode()
            stored[MetadataIndex(key)] = _StorageInfo(name, len(contents[name]), len(data))
            contents[name] += data
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, storage_data=stored)))
    with patch.object(Path, "open", autospec=True, side_effect=Path.open) as opened:
        found = list(read_extra_states(tmp_path, "--load"))
    assert sorted(found) == [f"<mlp.{expert}._extra_state/shard_0_1>".encode() for expert in range(6)]
    assert opened.call_count == 1 + 2  # the index
