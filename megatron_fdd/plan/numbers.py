"""Checks of Megatron's numbers and schedules: the flags that a run needs, and the values that training can use."""

from __future__ import annotations

import argparse
import math
import re

from megatron_fdd.plan.context import Context


def check_given(context: Context) -> None:
    """Refuse a run without the flags that every run needs and that have no default.

    Raises:
        ValueError: names every flag that is missing.
    """
    refuse_missing(context.args)


def refuse_missing(args: argparse.Namespace) -> None:
    """Refuse flags of a training among which one is missing that has no default.

    Raises:
        ValueError: names every flag that is missing.
    """
    missing = {
        "--seq-length N (a checkpoint's own is the longest that its model takes)": args.seq_length is None,
        "--micro-batch-size N": args.micro_batch_size is None,
        "--lr X": args.lr is None and not args.skip_train,
        "--train-iters N or --train-samples N": (
            args.train_iters is None and args.train_samples is None and not args.skip_train
        ),
        "--eval-interval N (even at --eval-iters 0; Megatron has no default for it)": (
            args.eval_interval is None and not args.skip_train
        ),
    }
    unit = _unit(args)
    missing[f"--lr-wsd-decay-{unit} N (the last part of --lr-decay-style WSD)"] = (
        args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None and not args.skip_train
    )
    flags = [flag for flag, is_missing in missing.items() if is_missing]
    if flags:
        raise ValueError(f"not given: {'; '.join(flags)}")


def _unit(args: argparse.Namespace) -> str:
    """Return in what Megatron counts the schedules, as its flags say it."""
    return "samples" if args.train_samples else "iters"


# Megatron's numbers by their names in `args`. Not named here: at least 0, because nearly all are counts or shares.
# What Megatron divides by, counts with or cuts into: at least 1.
_FROM_ONE = frozenset(
    """
    micro_batch_size global_batch_size eval_micro_batch_size eval_global_batch_size train_samples
    seq_length encoder_seq_length decoder_seq_length max_position_embeddings
    num_layers encoder_num_layers decoder_num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups
    kv_channels vocab_size make_vocab_size_divisible_by rotary_base rotary_seq_len_interpolation_factor
    moe_router_topk moe_ffn_hidden_size moe_router_num_groups moe_router_group_topk moe_upcycling_granularity
    tensor_model_parallel_size pipeline_model_parallel_size context_parallel_size hierarchical_context_parallel_sizes
    expert_model_parallel_size expert_tensor_parallel_size tensor_parallel_num_weight_shards
    expert_tensor_parallel_num_weight_shards num_distributed_optimizer_instances
    num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank microbatch_group_size_per_vp_stage
    decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers recompute_num_layers
    log_interval eval_interval tensorboard_log_interval tensorboard_queue_size log_memory_interval
    save_interval save_retain_interval save_params_interval
    save_activations_interval save_tokens_per_expert_interval save_wgrads_interval save_dgrads_interval
    gpu_sniff_test_interval adlr_autoresume_interval
    check_weight_hash_across_dp_replicas_interval
    lr_decay_iters lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples
    distributed_timeout_minutes distributed_timeout_seconds_after_init num_dataset_builder_threads dist_ckpt_workers
    moe_layer_freq window_attn_skip_freq linear_attention_freq
    seed ddp_num_buckets ddp_bucket_size fp8_interval fp8_amax_history_len muon_num_ns_steps replication_factor
    """.split()
)
_ABOVE_ZERO = frozenset("adam_eps init_method_std rotary_percent rope_scaling_factor".split())
_BELOW_ONE = frozenset(
    """
    adam_eps hidden_dropout attention_dropout adam_beta1 adam_beta2 lr_warmup_fraction sgd_momentum muon_momentum
    lion_beta1 lion_beta2
    """.split()
)
_MAY_BE_NEGATIVE = frozenset(
    """
    window_size glu_linear_offset moe_router_force_biased fp8_margin null_tokenizer_pad_id async_ckpt_cpu_priority
    rl_default_top_k
    inference_batch_times_seqlen_threshold inference_dynamic_batching_num_cuda_graphs
    """.split()
)
# Above these a run would only fill the memory, or blow up its weights.
_MOST = {
    "num_layers": 10_000,
    "make_vocab_size_divisible_by": 10**6,
    "train_iters": 10**7,
    "eval_iters": 10**7,
    "num_workers": 128,  # processes, for each rank
    "weight_decay": 1_000,
    "rotary_base": 10**15,
    **dict.fromkeys(("train_samples", "lr_decay_samples", "lr_warmup_samples"), 10**13),
    "seed": 2**31 - 1,
}
_MOST_OF_ALL = 2**32
# Flags with other names than their values in `args`.
_FLAGS = {
    "layernorm_epsilon": "norm_epsilon",
    "microbatch_group_size_per_vp_stage": "microbatch_group_size_per_virtual_pipeline_stage",
}


def check_numbers(context: Context) -> None:
    """Refuse numbers among Megatron's flags with which no training works.

    Raises:
        ValueError: names the flags whose value is not finite, too small or too large.
    """
    args = context.args
    wrong = []
    for name, given in vars(args).items():
        is_pattern = isinstance(given, list) and name.endswith("_freq")  # of zeros and ones, for each layer
        for value in given if isinstance(given, list | tuple) else [given]:
            bound = None if is_pattern else _broken_bound(name, value, args.skip_train)
            if bound:
                wrong.append(f"--{_FLAGS.get(name, name).replace('_', '-')} {value}: must be {bound}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _broken_bound(name: str, value: object, skips_training: bool) -> str | None:
    """Return in words the bound that a value breaks."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if name.startswith(("fdd_", "teacher_")):
        return None  # `FddConfig` has their bounds
    from_one = name in _FROM_ONE or (name == "train_iters" and not skips_training)
    if name not in _MAY_BE_NEGATIVE and value < from_one:
        return f"at least {int(from_one)}"
    if name in _ABOVE_ZERO and value <= 0:
        return "above 0"
    if name in _BELOW_ONE and value >= 1:
        return "below 1"
    most = _MOST.get(name, _MOST_OF_ALL if isinstance(value, int) else math.inf)
    return f"at most {most}" if value > most else None


def check_schedule(context: Context) -> None:
    """Refuse values in the wrong order, such as a --min-lr above --lr; Megatron at most asserts this, and late.

    Raises:
        ValueError: names both flags.
    """
    args = context.args
    for low, high, is_below in (
        ("min_lr", "lr", False),
        ("lr_warmup_init", "lr", False),
        ("decoupled_min_lr", "decoupled_lr", False),
        ("start_weight_decay", "end_weight_decay", False),
        ("lr_warmup_iters", "lr_decay_iters" if args.lr_decay_iters else "train_iters", True),
        ("lr_warmup_samples", "lr_decay_samples" if args.lr_decay_samples else "train_samples", True),
    ):
        start, end = getattr(args, low), getattr(args, high)
        if args.skip_train or None in (start, end) or start < end or (start == end and not is_below):
            continue
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in ((low, start), (high, end))]
        raise ValueError(f"{flags[0]}: must be {'below' if is_below else 'at most'} {flags[1]}")
    _refuse_early_decay(args)


def _refuse_early_decay(args: argparse.Namespace) -> None:
    """Refuse a last part of --lr-decay-style WSD that begins inside of the warm-up: the rate would fall in one step."""
    unit = _unit(args)
    last_part = getattr(args, f"lr_wsd_decay_{unit}")
    end_flag = f"lr_decay_{unit}" if getattr(args, f"lr_decay_{unit}") else f"train_{unit}"
    end = getattr(args, end_flag)
    if args.lr_decay_style != "WSD" or args.skip_train or None in (last_part, end):
        return
    warmup = getattr(args, f"lr_warmup_{unit}")
    if args.lr_warmup_fraction is not None:
        warmup = math.ceil(args.lr_warmup_fraction * end)
    if last_part > end - warmup:
        raise ValueError(
            f"--lr-wsd-decay-{unit} {last_part}: must be at most {end - warmup}, what the warm-up of {warmup} leaves "
            f"of --{end_flag.replace('_', '-')} {end}"
        )


def check_shares(context: Context) -> None:
    """Refuse shares of the data that are no numbers, and data paths that name no data.

    Raises:
        ValueError: names the flag and its value.
    """
    args = context.args
    if args.split is not None:
        texts = args.split.split(",")
        # Megatron takes every run of digits and points for a number: 9e1,10 would be 9, 1 and 10.
        shares = [_share(text) if re.fullmatch(r"[.0-9]+", text.strip()) else None for text in texts]
        if None in shares or not 1 <= len(shares) <= 3 or not sum(filter(None, shares)):
            raise ValueError(
                f"--split {args.split}: must be up to three numbers, of which one is above 0, as in 95,5,0"
            )
    for name in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words, flag = getattr(args, name), f"--{name.replace('_', '-')}"
        if words == []:
            raise ValueError(f"{flag}: names no data; give a prefix, or pairs of a weight and a prefix")
        for weight in words[::2] if words and len(words) % 2 == 0 else ():
            if _is_number(weight) and not _share(weight):
                raise ValueError(
                    f"{flag} {weight}: a weight must be a finite number above 0; or leave its data out"
                )


def _share(text: str) -> float | None:
    """Return a finite number of at least 0; None for any other text."""
    number = float(text) if _is_number(text) else -1.0
    return number if 0 <= number < math.inf else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
