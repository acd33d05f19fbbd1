"""The teacher's Megatron arguments: its checkpoint's own, with this run's layout and precision."""

from __future__ import annotations

import argparse
import copy

from megatron_fdd.host.layer_specs import NAME, SPEC_ARGS

# This run decides where and how the teacher runs; the checkpoint decides what the teacher computes.
# Every field with "parallel" in its name is taken from this run too.
_FROM_RUN = (
    "rank", "world_size", "gtp_weight_remat_size", "params_dtype", "bf16", "fp16", "transformer_impl",
    "attention_backend", "use_cpu_initialization", "persist_layer_norm", "masked_softmax_fusion",
    "bias_swiglu_fusion", "bias_dropout_fusion", "apply_rope_fusion",
    "gradient_accumulation_fusion", "deterministic_mode", "distributed_backend", "no_persist_layer_norm",
    "micro_batch_size", "global_batch_size", "seq_length", "decoder_seq_length", "cp_comm_type", "seed",
    "calculate_per_token_loss", "make_vocab_size_divisible_by", "moe_token_dispatcher_type", "moe_enable_deepep",
    "moe_flex_dispatcher_backend", "moe_flex_dispatcher_num_sms", "moe_permute_fusion", "moe_router_fusion",
    "first_last_layers_bf16", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "fp8_margin",
)  # fmt: skip

# The teacher is frozen and in evaluation mode: no noise, no recompute, no graphs, no buffers of another width.
_FORCED = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "moe_input_jitter_eps": None,
    "moe_aux_loss_coeff": 0.0,
    "moe_z_loss_coeff": None,
    "moe_router_force_load_balancing": False,
    "moe_router_force_biased": None,
    "moe_router_padding_for_fp8": False,
    "moe_router_padding_for_quantization": False,
    "moe_enable_routing_replay": False,
    "moe_shared_expert_overlap": False,
    "moe_expert_rank_capacity_factor": None,
    "moe_paged_stash": False,
    "moe_single_grouped_weight": False,
    "moe_single_grouped_bias": False,
    "init_model_with_meta_device": False,
    "moe_layer_recompute": False,
    "overlap_dispatch_backward_with_experts_wgrad": False,
    "mtp_num_layers": None,
    "perform_initialization": False,
    "recompute_granularity": None,
    "recompute_method": None,
    "recompute_num_layers": None,
    "distribute_saved_activations": False,
    "cpu_offloading_num_layers": 0,
    "tp_comm_overlap": False,
    "cuda_graph_impl": "none",
    "fp4": None,
    "te_precision_config_file": None,
    "fp8_output_proj": False,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "fp8_quantizer_factory": None,
    "virtual_pipeline_model_parallel_size": None,
    "num_layers_per_virtual_pipeline_stage": None,
    "pipeline_model_parallel_layout": None,
    "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None,
    "overlap_p2p_comm": False,
    "yaml_cfg": None,
}


# A dense model must not inherit these from a student with experts, if its checkpoint does not set them.
_DENSE = {
    "num_experts": None,
    "moe_ffn_hidden_size": None,
    "moe_layer_freq": 1,
    "moe_shared_expert_intermediate_size": None,
    "moe_grouped_gemm": False,
    "moe_router_enable_expert_bias": False,
    "moe_router_load_balancing_type": "none",
}
# These types change the routing; all others only name the loss that balances the load in training.
_ROUTERS = ("sinkhorn", "quantile_balancing")


def teacher_args(
    checkpoint_args: argparse.Namespace, run_args: argparse.Namespace, *, expert_size: int | None = None
) -> argparse.Namespace:
    """Return the arguments with which this run builds the teacher.

    The vocabulary is padded like the student's, so that both heads are cut at the same boundaries.

    Args:
        checkpoint_args: the arguments stored in the teacher's checkpoint.
        run_args: this run's validated arguments (the student's), including `--teacher-fp8-*`.
        expert_size: number of ranks that share a layer's experts; None: the student's number, or 1 for a dense teacher.

    Raises:
        ValueError: the teacher cannot be built with this run's modules.
    """
    args = argparse.Namespace(**{**vars(run_args), **copy.deepcopy(vars(checkpoint_args))})
    for name, value in vars(run_args).items():
        if _is_runs(name):
            setattr(args, name, value)
    is_latent = getattr(args, "multi_latent_attention", False)
    if args.transformer_impl == "local" and is_latent and getattr(checkpoint_args, NAME, None) is None:
        raise ValueError(
            "--teacher-load: the teacher's attention is multi-latent, which Megatron's own layers have only with "
            "TransformerEngine: run on GPUs with --transformer-impl transformer_engine, or import the teacher with "
            "fdd import, which gives it this package's layers"
        )
    for name, value in _FORCED.items():
        setattr(args, name, value)
    args.fp8, args.fp8_recipe = run_args.teacher_fp8_format, run_args.teacher_fp8_recipe
    args.fp8_param_gather = bool(args.fp8)  # Megatron's name for weights that exist only in FP8
    if args.fp8:
        args.use_cpu_initialization = False  # a CPU could not round the weights to FP8
    if uses_delayed_scaling(args):
        args.first_last_layers_bf16 = False  # one FP8 context is around all layers, as Megatron asserts
    for name in SPEC_ARGS:  # an older checkpoint lacks them, and the student may have some
        setattr(args, name, getattr(checkpoint_args, name, None))
    args.padded_vocab_size = run_args.padded_vocab_size
    if args.pipeline_model_parallel_size > 1:
        args.pipeline_model_parallel_layout = even_layout(args.num_layers, args.pipeline_model_parallel_size)
    has_experts = bool(getattr(checkpoint_args, "num_experts", None))
    if expert_size is None:
        expert_size = run_args.expert_model_parallel_size if has_experts else 1
    args.expert_model_parallel_size = expert_size
    if has_experts:
        _set_experts(args)
    else:
        vars(args).update(_DENSE)
    return args


def is_teachers_own(name: str) -> bool:
    """Whether the teacher is built with an argument as its checkpoint stores it."""
    return not _is_runs(name) and name not in _FORCED


def _is_runs(name: str) -> bool:
    return name in _FROM_RUN or "parallel" in name


def uses_delayed_scaling(args: argparse.Namespace) -> bool:
    """Whether these arguments run a model in FP8 with scales from earlier steps."""
    return bool(args.fp8) and args.fp8_recipe == "delayed"


def _set_experts(args: argparse.Namespace) -> None:
    """Set how this run computes the teacher's experts."""
    if args.moe_token_dispatcher_type == "allgather":  # Megatron's default, even in a run without experts
        args.moe_token_dispatcher_type = "alltoall"
    if args.moe_router_load_balancing_type not in _ROUTERS:
        args.moe_router_load_balancing_type = "none"
    if args.transformer_impl == "local":
        args.moe_grouped_gemm = False


def even_layout(num_layers: int, num_stages: int) -> str:
    """Return the most even layout of layers over stages, first stages fuller; Megatron's default needs a divisor."""
    counts = [num_layers // num_stages + (stage < num_layers % num_stages) for stage in range(num_stages)]
    stages = ["t" * count for count in counts]
    stages[0], stages[-1] = "E" + stages[0], stages[-1] + "L"
    return "|".join(stages)
