"""What Megatron would say late, without a number or without a remedy: said first, on every rank alike."""

from __future__ import annotations

import argparse
import math
import os
import warnings
from pathlib import Path

from megatron_fdd.config import FddConfig
from megatron_fdd.host.checkpoint import RELEASE, find_checkpoint
from megatron_fdd.host.rehearsal import is_wanted as is_rehearsal_wanted
from megatron_fdd.host.role import Role
from megatron_fdd.losses.terms import first_tap
from megatron_fdd.plan.experts import has_expert_optimizer
from megatron_fdd.plan.fp8 import check_expert_scales, check_trusted, holds_scales
from megatron_fdd.plan.student_arguments import student_checkpoint
from megatron_fdd.step.teacher.arguments import even_layout


def check_kernels(kind: str) -> None:
    """Triton's kernels run on a GPU.

    Raises:
        ValueError: they are asked for in a rehearsal.
    """
    if kind == "triton" and is_rehearsal_wanted():
        raise ValueError(
            "--fdd-kernels triton needs a GPU, and this run rehearses on CPUs: leave the flag out (auto chooses)"
        )


def check_given(args: argparse.Namespace) -> None:
    """The flags that every run needs and that have no default. Before a checkpoint's arguments are taken.

    Raises:
        ValueError: names the flag that is missing.
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
    flags = [flag for flag, is_missing in missing.items() if is_missing]
    if flags:
        raise ValueError(f"not given: {'; '.join(flags)}")


# The smallest value of what Megatron divides by, counts with or takes a root of, by the name in its namespace.
_SMALLEST = {
    **dict.fromkeys(("micro_batch_size", "global_batch_size", "seq_length", "train_samples"), 1),
    **dict.fromkeys(
        ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"), 1
    ),
    **dict.fromkeys(("expert_model_parallel_size", "expert_tensor_parallel_size"), 1),
    **dict.fromkeys(("log_interval", "eval_interval", "tensorboard_log_interval"), 1),
    **dict.fromkeys(("save_interval", "save_retain_interval", "exit_interval"), 1),
    **dict.fromkeys(("lr_decay_iters", "lr_decay_samples", "distributed_timeout_minutes"), 1),
    **dict.fromkeys(("eval_iters", "num_workers", "seed"), 0),
    **dict.fromkeys(("lr_warmup_iters", "lr_warmup_samples", "lr_warmup_fraction", "lr_warmup_init"), 0),
    **dict.fromkeys(("lr", "min_lr", "weight_decay", "clip_grad", "adam_beta1", "adam_beta2", "adam_eps"), 0),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), 0),
}
_PARTS = ("hidden_dropout", "attention_dropout", "adam_beta1", "adam_beta2", "lr_warmup_fraction")  # below 1


def check_numbers(args: argparse.Namespace) -> None:
    """Whether Megatron's numbers are numbers that a training can count with.

    Raises:
        ValueError: names the flags whose value is not finite, too small or too large.
    """
    smallest = {**_SMALLEST, "train_iters": 0 if args.skip_train else 1}
    wrong = []
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        if isinstance(value, float) and not math.isfinite(value):
            wrong.append(f"{flag}: must be a finite number")
        elif isinstance(value, (int, float)) and value < smallest.get(name, -math.inf):
            wrong.append(f"{flag}: must be at least {smallest[name]}")
        elif isinstance(value, (int, float)) and name in _PARTS and value >= 1:
            wrong.append(f"{flag}: must be below 1")
    if wrong:
        raise ValueError("; ".join(wrong))


def check_schedule(args: argparse.Namespace) -> None:
    """Refuse a learning rate or a weight decay that would rise from above its end; Megatron only asserts, and late.

    Raises:
        ValueError: names both flags.
    """
    for low, high, is_below in (
        ("min_lr", "lr", False),
        ("lr_warmup_init", "lr", False),
        ("start_weight_decay", "end_weight_decay", False),
        ("lr_warmup_iters", "lr_decay_iters" if args.lr_decay_iters else "train_iters", True),
        ("lr_warmup_samples", "lr_decay_samples" if args.lr_decay_samples else "train_samples", True),
    ):
        start, end = getattr(args, low), getattr(args, high)
        if args.skip_train or None in (start, end) or start < end or (start == end and not is_below):
            continue
        flags = [f"--{name.replace('_', '-')} {value}" for name, value in ((low, start), (high, end))]
        raise ValueError(f"{flags[0]}: must be {'below' if is_below else 'at most'} {flags[1]}")


def check_local_attention(args: argparse.Namespace, role: Role) -> None:
    """What Megatron's local attention lacks; a rehearsal's has all of it.

    Of a sliding window it forgets the window where it is fused, and the mask where it is not.

    Raises:
        ValueError: the run shares or packs sequences, or the model has windows of which a part would be forgotten.
    """
    if args.transformer_impl != "local" or is_rehearsal_wanted():
        return
    needed = ["--context-parallel-size above 1"] if args.context_parallel_size > 1 else []
    needed += ["--dataloader-inter-document-masking"] if args.dataloader_inter_document_masking else []
    if needed:
        raise ValueError(
            f"{', '.join(needed)}: Megatron's local attention cannot; use --transformer-impl transformer_engine"
        )
    if args.window_size is None:
        return
    remedies = []
    if args.masked_softmax_fusion:
        remedies.append("give --no-masked-softmax-fusion, whose fused kernel would ignore the windows")
    if args.reset_attention_mask:
        remedies.append("leave out --reset-attention-mask, which the windows would overrule")
    if remedies:
        raise ValueError(
            f"{role.label} has sliding windows and --transformer-impl is local: {' and '.join(remedies)}, or use "
            "--transformer-impl transformer_engine"
        )


def check_splits(args: argparse.Namespace, role: Role) -> None:
    """Whether the parallel sizes divide the model.

    Args:
        args: with the model's architecture; not necessarily validated.

    Raises:
        ValueError: names both numbers and the remedy.
    """
    tensor, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.num_layers is None or args.num_attention_heads is None:
        return  # Megatron names these well
    _check_sequence(args)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    if args.num_attention_heads % tensor or (groups % tensor and tensor % groups):
        raise ValueError(
            f"--tensor-model-parallel-size {tensor} does not divide {role.label}'s {args.num_attention_heads} "
            f"attention heads in {groups} query groups: use one that does"
        )
    is_cut = role is Role.TEACHER  # as evenly as can be, whatever the flags say
    given = (
        args.pipeline_model_parallel_layout,
        args.decoder_first_pipeline_num_layers,
        args.decoder_last_pipeline_num_layers,
        args.num_virtual_stages_per_pipeline_rank,
        args.num_layers_per_virtual_pipeline_stage,
    )
    if stages > 1 and args.num_layers % stages and not is_cut and not any(given):
        raise ValueError(
            f"--pipeline-model-parallel-size {stages} does not divide {role.label}'s {args.num_layers} layers: say how "
            f"to cut them, for example --pipeline-model-parallel-layout '{even_layout(args.num_layers, stages)}'"
        )


def check_student_scales(args: argparse.Namespace, stored: argparse.Namespace) -> None:
    """Whether TransformerEngine's modules will take the student's checkpoint, in whatever precision they run.

    Args:
        stored: the arguments in the checkpoint.

    Raises:
        ValueError: it was trained with delayed scaling, and TransformerEngine has not been told to trust it, or
            Megatron would give scales to other experts.
    """
    directory, flag = student_checkpoint(args)
    if directory is None or args.transformer_impl != "transformer_engine":
        return
    checkpoint = find_checkpoint(directory, flag, to_plan=args.fdd_dry_run)
    if holds_scales(checkpoint, flag):
        check_trusted(checkpoint, flag)
        check_expert_scales(args, stored, Role.STUDENT)


def check_resume(args: argparse.Namespace, stored: argparse.Namespace) -> None:
    """Whether the optimizer's state in the student's checkpoint fits this layout's optimizer.

    Args:
        stored: the arguments in the checkpoint.

    Raises:
        ValueError: experts had an optimizer of their own there and have none here, or the reverse.
    """
    directory, flag = student_checkpoint(args)
    if flag != "--load" or args.finetune or args.no_load_optim:
        return
    there, here = has_expert_optimizer(stored), has_expert_optimizer(args)
    if there == here or directory is None:
        return
    if find_checkpoint(directory, flag, to_plan=args.fdd_dry_run).name == RELEASE:
        return
    sizes, flag_of_experts = "of at least 2" if there else "1", Role.STUDENT.experts_flag
    raise ValueError(
        f"--load {directory} was saved with {flag_of_experts} {stored.expert_model_parallel_size}, this run has "
        f"{args.expert_model_parallel_size}: Megatron cannot resume across that, its optimizer has other parts. "
        f"Use {flag_of_experts} {sizes}, or take the weights alone with --finetune"
    )


def _check_sequence(args: argparse.Namespace) -> None:
    """Whether the ranks that share a sequence can cut it."""
    tensor = args.tensor_model_parallel_size if args.sequence_parallel else 1
    context = args.context_parallel_size
    factors = []
    if context > 1:
        factors.append(f"twice --context-parallel-size {context}")
    if tensor > 1:
        factors.append(f"--tensor-model-parallel-size {tensor} (for --sequence-parallel)")
    divisor = (2 * context if context > 1 else 1) * tensor
    if args.seq_length % divisor:
        below = args.seq_length // divisor * divisor
        raise ValueError(
            f"--seq-length {args.seq_length} is not a multiple of {' times '.join(factors)}: "
            f"use {' or '.join(str(length) for length in (below, below + divisor) if length)}"
        )


def check_approximations(config: FddConfig, rank: int) -> None:
    """Warn, on rank 0, of a flag that should make teacher or inner terms cheaper and changes nothing."""
    if rank != 0:
        return
    if config.teacher_fp8_recipe != FddConfig().teacher_fp8_recipe and config.teacher_fp8_format is None:
        warnings.warn(
            f"--teacher-fp8-recipe {config.teacher_fp8_recipe}: no effect, the teacher runs in FP8 only with "
            "--teacher-fp8-format",
            stacklevel=2,
        )
    flags = ["--fdd-sample-tokens"] if config.sample_tokens < 1 else []
    flags += ["--fdd-sample-one-tap"] if config.sample_one_tap else []
    if flags and not config.uses_taps:
        warnings.warn(f"{', '.join(flags)}: no effect, --fdd-alpha and --fdd-beta are 0", stacklevel=2)
    elif config.sample_one_tap and config.num_pairs - first_tap(config) == 1:
        warnings.warn(
            "--fdd-sample-one-tap: no effect, there is one tap to draw from; raise --fdd-layers", stacklevel=2
        )
    reason = _nothing_to_skip(config)
    if config.skip_below > 0 and reason is not None:
        warnings.warn(f"--fdd-skip-below {config.skip_below}: no effect, {reason}", stacklevel=2)


def _nothing_to_skip(config: FddConfig) -> str | None:
    """Why no vocabulary tile can be skipped; None where it can."""
    if config.kernels == "reference":
        return "--fdd-kernels reference has no tiles"
    if config.lens_head == "live":
        return "--fdd-lens-head live needs all of them"
    if config.beta == 0 or config.delta != "logprob":
        return "without the log-probability delta a layer's gradient is one product over the whole vocabulary"
    if config.alpha > 0 and config.trajectory_divergence not in ("fkl", "rkl"):
        return f"--fdd-trajectory-divergence {config.trajectory_divergence} needs all of them; fkl and rkl do not"
    return None


def check_writable(path: str | None, flag: str) -> None:
    """Whether a file of this name, or files in this folder, can be made. Makes the folder.

    Raises:
        ValueError: names the path and what is in the way.
    """
    if path is None:
        return
    if flag != "--save" and Path(path).is_dir():
        raise ValueError(f"{flag} {path}: is a folder; name a file in it")
    folder = Path(path) if flag == "--save" else Path(path).absolute().parent
    probe = folder / f".fdd-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if flag != "--save":
            is_new = not Path(path).exists()
            with Path(path).open("a"):
                pass
            if is_new:  # a run that is refused leaves nothing
                Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"{flag} {path}: cannot be written ({error.strerror})") from error
