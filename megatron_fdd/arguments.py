"""Megatron's arguments as this package needs them: the student's architecture, forced values, refusals.

Everything here runs before the first collective, on every rank alike.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Mapping, Sequence

from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.models.gpt import GPTModelConfig
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_fdd.checkpoint import find_checkpoint, has_checkpoint, is_same_folder, read_checkpoint_args

# What shapes a GPT's function beside its weights. `load_args_from_checkpoint` of 0.19.2 knows about half of it.
ARCHITECTURE = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups",
    "group_query_attention", "kv_channels", "position_embedding_type", "rotary_base", "rotary_percent",
    "rotary_interleaved", "rotary_seq_len_interpolation_factor", "use_rope_scaling", "rope_scaling_factor",
    "rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim", "yarn_original_max_position_embeddings",
    "yarn_beta_fast", "yarn_beta_slow", "yarn_correction_range_round_to_int",
    "no_rope_freq", "add_bias_linear", "add_qkv_bias", "swiglu", "squared_relu", "quick_geglu", "bias_gelu_fusion",
    "untie_embeddings_and_output_weights", "normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma",
    "qk_layernorm", "qk_l2_norm", "apply_query_key_layer_scaling", "apply_residual_connection_post_layernorm",
    "softmax_type", "window_size", "window_attn_skip_freq", "glu_linear_offset", "activation_func_clamp_value",
    "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
    "attention_output_gate",
    "num_experts", "moe_layer_freq", "moe_ffn_hidden_size", "moe_router_topk", "moe_router_pre_softmax",
    "moe_router_score_function", "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk",
    "moe_router_enable_expert_bias", "moe_apply_probs_on_input", "moe_latent_size", "moe_mlp_glu_interleave_size",
    "moe_shared_expert_intermediate_size", "moe_shared_expert_gate", "moe_shared_expert_glu_interleave_size",
)  # fmt: skip


# On by default, and Megatron fails in the first step where apex, whose kernels they are, has not been built.
_APEX_KERNELS = {
    "gradient_accumulation_fusion": "fused_weight_gradient_mlp_cuda",
    "masked_softmax_fusion": "scaled_upper_triang_masked_softmax_cuda",
}
_FP8_FLAGS = "--fp8-format, --teacher-fp8-format, --te-precision-config-file"
_GET_TE = "install it (docs/support.md says how)"

Refusal = tuple[Callable[[argparse.Namespace], bool], str]


def _uses_fp8(args: argparse.Namespace) -> bool:
    return bool(args.fp8 or args.teacher_fp8_format or args.te_precision_config_file)


def _lacks_transformer_engine(args: argparse.Namespace) -> bool:
    """A plan can be made anywhere."""
    return not args.fdd_dry_run and importlib.util.find_spec("transformer_engine") is None


def _has_no_fused_adam() -> bool:
    return all(importlib.util.find_spec(name) is None for name in ("transformer_engine", "apex"))


# (when, why and what to do instead).
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
        "a soft-capped head (final_logit_softcapping) is not linear, which Gram matrices and fused losses "
        "rely on; models of such a family cannot be distilled yet",
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


def refuse(args: argparse.Namespace, whose: str = "") -> None:
    """Refuse what would silently distil nothing, or something else.

    Args:
        args: parsed, not necessarily validated.
        whose: put before the message, when the arguments are not the command line's.

    Raises:
        ValueError: the first refusal that applies.
    """
    for applies, message in REFUSALS:
        if applies(args):
            raise ValueError(whose + message)


def complete_student_args(
    args: argparse.Namespace, defaults: Mapping[str, object]
) -> argparse.Namespace | None:
    """Take what `--use-checkpoint-args` forgets of the student's architecture from its checkpoint.

    Args:
        args: parsed, not yet validated; changed in place.
        defaults: the parser's default of every flag.

    Returns:
        The arguments in the checkpoint that the student starts from; None when it starts from scratch.

    Raises:
        ValueError: no checkpoint where one is named, one that is not whole, or a flag that contradicts it.
    """
    directory, flag = student_checkpoint(args)
    if directory is None:
        if args.use_checkpoint_args:
            raise ValueError(
                f"--use-checkpoint-args has nothing to read: --load {args.load} holds no checkpoint yet; "
                "name the student to start from with --pretrained-checkpoint DIR"
            )
        return None
    stored = read_checkpoint_args(find_checkpoint(directory, flag, to_plan=args.fdd_dry_run), flag)
    given = {name: value for name, value in vars(args).items() if value != defaults.get(name, value)}
    # Of a vocabulary that Megatron took from a tokenizer, a checkpoint keeps the padded size only.
    fixed = ARCHITECTURE + ("vocab_size",) * (getattr(stored, "vocab_size", None) is not None)
    check_same_model(args, stored, [name for name in fixed if name in given])
    if args.use_checkpoint_args:
        load_args_from_checkpoint(args, load_arg=flag.removeprefix("--").replace("-", "_"))
        for name in ARCHITECTURE:
            if hasattr(stored, name):
                setattr(args, name, getattr(stored, name))
        # Megatron lets the checkpoint overrule --tokenizer-model, --hidden-dropout and more.
        vars(args).update(given)
    _set_vocabulary(args, stored)
    return stored


def check_same_model(
    args: argparse.Namespace, stored: argparse.Namespace, names: Sequence[str] = ARCHITECTURE
) -> None:
    """Compare the student that the flags describe with the one in its checkpoint.

    Raises:
        ValueError: any of the fields `names` differs; a checkpoint that lacks a field cannot contradict it.
    """
    differences = [
        f"{name} is {getattr(args, name)} here and {getattr(stored, name)} there"
        for name in names
        if hasattr(stored, name)
        and getattr(stored, name) != getattr(args, name)
        # Without a plain GELU it is a matter of speed.
        and (name != "bias_gelu_fusion" or has_plain_gelu(stored))
    ]
    if differences:
        directory, flag = student_checkpoint(args)
        raise ValueError(
            f"{flag} {directory}: the flags and the checkpoint describe different models: "
            f"{'; '.join(differences)}. Leave those flags out and give --use-checkpoint-args"
        )


def has_plain_gelu(args: argparse.Namespace) -> bool:
    """Whether `bias_gelu_fusion` shapes the model: fused, Megatron's GELU has tanh, else erf."""
    other = any(getattr(args, name, False) for name in ("swiglu", "squared_relu", "quick_geglu"))
    return not other and getattr(args, "add_bias_linear", True)


def force_values(args: argparse.Namespace) -> None:
    """What distillation relies on, whatever the flags say. Plain values: they go into the checkpoint."""
    # One divisor for every stage and rank, and no factor of data or context parallelism in any gradient.
    args.calculate_per_token_loss = True
    # So that a run can go on at another layout.
    args.dist_ckpt_optim_fully_reshardable = args.use_distributed_optimizer
    # Megatron's check would stop one rank inside a collective; ours stops all, before the optimizer.
    args.check_for_nan_in_loss_and_grad = False
    for fusion, kernel in _APEX_KERNELS.items():
        if importlib.util.find_spec(kernel) is None:
            setattr(args, fusion, False)
    if rope_utils.fused_apply_rotary_pos_emb is None:  # TransformerEngine's
        args.apply_rope_fusion = False


def model_config(args: argparse.Namespace) -> GPTModelConfig:
    """Megatron's model configuration of these arguments, with what `gpt_config_from_args` forgets.

    0.19.2 passes `--use-rope-scaling` on and leaves the factor at its default.
    """
    config = gpt_config_from_args(args)
    config.rope_scaling_factor = args.rope_scaling_factor
    return config


def planned_layers(args: argparse.Namespace) -> tuple[int, ...]:
    """`chunk_layers` of these arguments, wherever the plan is made.

    Without TransformerEngine Megatron's configuration refuses FP8 of experts, which has no part in how layers are cut.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        args = argparse.Namespace(**{**vars(args), "fp8": None, "fp8_param_gather": False})
    return chunk_layers(model_config(args).transformer)


def chunk_layers(config: TransformerConfig) -> tuple[int, ...]:
    """How many layers each chunk holds of a model with this configuration, in depth order.

    With virtual stages chunk c is on pipeline stage c % stages.
    """
    stages = config.pipeline_model_parallel_size
    virtual = config.virtual_pipeline_model_parallel_size
    layout = config.pipeline_model_parallel_layout
    order = [(stage, part) for part in range(virtual or 1) for stage in range(stages)]
    if layout is None:
        return tuple(
            get_num_layers_to_build(config, None if virtual is None else part, stage) for stage, part in order
        )
    # With a layout Megatron's function answers for the calling rank, whatever stage it is asked about.
    assert isinstance(layout, PipelineParallelLayerLayout)
    return tuple(layout.layout[stage][part].count(LayerType.decoder) for stage, part in order)


def check_length(args: argparse.Namespace, whose: str, positions: int | None) -> None:
    """Refuse sequences longer than a model takes.

    Args:
        whose: names the model.
        positions: its bound; None when it is not known yet.

    Raises:
        ValueError: names the length, the bound and whose it is.
    """
    if None not in (args.seq_length, positions) and args.seq_length > positions:
        raise ValueError(
            f"--seq-length {args.seq_length} is longer than {whose} takes ({positions} positions); lower it"
        )


def student_checkpoint(args: argparse.Namespace) -> tuple[str | None, str]:
    """The folder to start from, and the flag that names it."""
    if args.load is not None and has_checkpoint(args.load):
        return args.load, "--load"
    if args.pretrained_checkpoint is not None:
        return args.pretrained_checkpoint, "--pretrained-checkpoint"
    # `--load X --save X` is how Megatron's scripts start afresh and resume with one command.
    starts_afresh = args.load is None or is_same_folder(args.load, args.save)
    return (None if starts_afresh else args.load), "--load"


def _set_vocabulary(args: argparse.Namespace, stored: argparse.Namespace) -> None:
    """Keep the model's own vocabulary size; pad it for this run's tensor-parallel size."""
    vocab_size = getattr(stored, "vocab_size", None)
    if vocab_size is None:
        return
    args.vocab_size = vocab_size
    args.padded_vocab_size = calculate_padded_vocab_size(
        vocab_size, args.make_vocab_size_divisible_by, args.tensor_model_parallel_size, logging_enabled=False
    )
