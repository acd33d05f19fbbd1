"""The flags of Megatron with which distillation would silently learn nothing, or something wrong."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable

from megatron_fdd.plan.context import Context

_FP8_FLAGS = "--fp8-format, --teacher-fp8-format, --te-precision-config-file"
_GET_TE = "install it (docs/support.md says how)"

Refusal = tuple[Callable[[argparse.Namespace], bool], str]


def _uses_fp8(args: argparse.Namespace) -> bool:
    return bool(args.fp8 or args.teacher_fp8_format or args.te_precision_config_file)


def _lacks_transformer_engine(args: argparse.Namespace) -> bool:
    """Whether TransformerEngine is missing; False for a dry run, which can plan without it."""
    return not args.fdd_dry_run and importlib.util.find_spec("transformer_engine") is None


def _has_no_fused_adam() -> bool:
    return all(importlib.util.find_spec(name) is None for name in ("transformer_engine", "apex"))


# Each row: when to refuse; why, and what to do instead.
REFUSALS: tuple[Refusal, ...] = (
    (
        lambda a: bool(a.mtp_num_layers),
        "--mtp-num-layers: multi-token prediction does not pass taps on (Megatron fails inside it); "
        "train the student without it",
    ),
    (
        lambda a: bool(a.overlap_moe_expert_parallel_comm),
        "--overlap-moe-expert-parallel-comm: its schedule never asks the layers for taps; leave it out",
    ),
    (
        lambda a: a.cuda_graph_impl == "full_iteration",
        "--cuda-graph-impl full_iteration: would capture the teacher inside the student's graph; "
        "use local, transformer_engine or none",
    ),
    (
        lambda a: a.moe_expert_rank_capacity_factor is not None,
        "--moe-expert-rank-capacity-factor: re-runs the step, teacher and losses included; leave it out",
    ),
    (
        lambda a: bool(a.use_megatron_fsdp or a.use_torch_fsdp2),
        "--use-megatron-fsdp, --use-torch-fsdp2: the head that the losses read is sharded away; "
        "use --use-distributed-optimizer",
    ),
    (
        lambda a: bool(a.defer_embedding_wgrad_compute),
        "--defer-embedding-wgrad-compute: expects the output layer's own backward pass; leave it out",
    ),
    (
        lambda a: bool(a.hybrid_context_parallel),
        "--hybrid-context-parallel: moves tokens between ranks behind the teacher's back; leave it out",
    ),
    (
        lambda a: a.logits_load_dir is not None or a.logits_save_dir is not None,
        "--logits-load-dir, --logits-save-dir: Megatron's own offline distillation; "
        "use it without --teacher-load, through Megatron's pretrain script",
    ),
    (
        lambda a: bool(a.use_mup),
        "--use-mup: scales logits outside the head that the lens reads; train without it",
    ),
    (
        lambda a: _uses_fp8(a) and a.transformer_impl != "transformer_engine",
        f"{_FP8_FLAGS}: Megatron's local modules would compute in bf16 without a word; "
        "use --transformer-impl transformer_engine",
    ),
    (
        lambda a: _uses_fp8(a) and _lacks_transformer_engine(a),
        f"{_FP8_FLAGS}: TransformerEngine is not installed, and without it Megatron would compute in bf16 without a "
        f"word; {_GET_TE}",
    ),
    (
        lambda a: bool(a.fp8_param_gather),
        "--fp8-param-gather: Megatron would take the optimizer's float32 weights from the rounded ones when it starts "
        "from weights alone, as every distillation does; leave it out",
    ),
    (
        lambda a: a.dataloader_type == "external",
        "--dataloader-type external: takes the datasets for loaders, which Megatron then cannot read; leave it out",
    ),
    (
        lambda a: a.ckpt_convert_format is not None,
        "--ckpt-convert-format: Megatron writes the checkpoint again and ends, and nothing is distilled; leave it out",
    ),
    (
        lambda a: bool(a.config_logger_dir),
        "--config-logger-dir: Megatron fails when it writes a model's configuration there, which holds process groups; "
        "leave it out: rank 0's log in SAVE/logs/ has every argument",
    ),
    (
        lambda a: bool(a.ddp_average_in_collective),
        "--ddp-average-in-collective: gradients get their one divisor after they are summed; leave it out",
    ),
    (
        lambda a: a.ckpt_format not in (None, "torch_dist"),
        "--ckpt-format: only torch_dist can be read and written at every layout; leave it out",
    ),
    (
        lambda a: a.non_persistent_ckpt_type in ("local", "in_memory"),
        "--non-persistent-ckpt-type local, in_memory: nothing here reads or checks such a checkpoint; use global",
    ),
    (
        lambda a: a.rampup_batch_size is not None,
        "--rampup-batch-size: this Megatron ignores it; give --step-batch-size-schedule and --train-samples",
    ),
    (
        lambda a: bool(a.train_samples) and bool(a.train_iters) and a.step_batch_size_schedule is None,
        "--train-samples with --train-iters: Megatron counts a training in one of the two; leave the other out",
    ),
    (
        lambda a: a.step_batch_size_schedule is not None and a.train_iters is not None,
        "--step-batch-size-schedule with --train-iters: Megatron counts warm-up and decay as if every batch were one "
        "micro-batch of each rank, and the rate would be 0 long before the end; give --train-samples",
    ),
    (
        lambda a: a.fp4 is not None,
        "--fp4-format: nothing here knows it yet; use --fp8-format",
    ),
    (
        lambda a: a.transformer_impl not in (None, "local") and _lacks_transformer_engine(a),
        "--transformer-impl transformer_engine (Megatron's default): TransformerEngine is not installed; "
        f"{_GET_TE}, or give --transformer-impl local",
    ),
    (
        lambda a: bool(a.optimizer_cuda_graph) and _has_no_fused_adam(),
        "--optimizer-cuda-graph: neither TransformerEngine nor apex is installed, and the Adam that takes their place "
        "cannot be captured; leave it out",
    ),
    (
        lambda a: bool(a.fp8_output_proj),
        "--fp8-output-proj: the fused losses multiply with the head in its own precision; leave it out",
    ),
    (
        lambda a: getattr(a, "final_logit_softcapping", None) is not None,
        "a soft-capped head (final_logit_softcapping): the losses know a cap from the model's family alone; import "
        "the model with `fdd import`, or add its family (docs/extend/family.md)",
    ),
    (
        lambda a: a.hybrid_layer_pattern is not None,
        "--hybrid-layer-pattern: only GPTModel offers taps; use a GPT-style student",
    ),
    (
        lambda a: bool(a.fp16),
        "--fp16: the losses' gradients are formed before the loss scale and would underflow; use --bf16",
    ),
    (
        lambda a: a.context_parallel_size > 1 and a.dataloader_inter_document_masking,
        "--dataloader-inter-document-masking with --context-parallel-size above 1: every document would have "
        "to be a multiple of twice that size; use one of the two",
    ),
)


def check_refusals(context: Context) -> None:
    """Refuse flags with which a run would silently distil nothing, or something wrong.

    Raises:
        ValueError: the first of `REFUSALS` that applies.
    """
    for applies, message in REFUSALS:
        if applies(context.args):
            raise ValueError(message)
