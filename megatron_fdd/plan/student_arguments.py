"""The student's arguments: the architecture of its checkpoint, and the values that distillation forces."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence

from megatron.core.models.common.embeddings import rope_utils
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.vocab_utils import calculate_padded_vocab_size

from megatron_fdd.host.checkpoint import check_no_spec, has_checkpoint, is_same_folder
from megatron_fdd.host.like_flags import READ_HERE, READ_TO_LOAD, check_like_flags
from megatron_fdd.host.model_fields import ARCHITECTURE
from megatron_fdd.plan.context import Context, StoredModel

# These are on by default, but need apex's kernels: if apex is not built, Megatron fails in the first step.
_APEX_KERNELS = {
    "gradient_accumulation_fusion": "fused_weight_gradient_mlp_cuda",
    "masked_softmax_fusion": "scaled_upper_triang_masked_softmax_cuda",
}

# How exactly a model is computed: as its checkpoint says, unless a flag says otherwise.
_PRECISION = ("moe_router_dtype",)


def complete_student_args(args: argparse.Namespace, defaults: Mapping[str, object]) -> StoredModel | None:
    """Complete the student's architecture from its checkpoint where `--use-checkpoint-args` leaves parts out.

    Args:
        args: parsed but not validated arguments; changed in place.
        defaults: the parser's default of every flag.

    Returns:
        The checkpoint that the student starts from; None when it starts from scratch.

    Raises:
        ValueError: a named checkpoint does not exist or is incomplete, or a flag contradicts it.
    """
    directory, flag = student_checkpoint(args)
    if directory is None:
        if args.use_checkpoint_args:
            raise ValueError(
                f"--use-checkpoint-args has nothing to read: --load {args.load} holds no checkpoint yet; "
                "name the student to start from with --pretrained-checkpoint DIR"
            )
        return None
    model = StoredModel.find(directory, flag, to_plan=args.fdd_dry_run, step=args.ckpt_step)
    stored = model.args
    check_like_flags(stored, defaults, f"{flag} {model.path}", READ_TO_LOAD | READ_HERE)
    given = {name: value for name, value in vars(args).items() if value != defaults.get(name, value)}
    # If Megatron took the vocabulary from a tokenizer, a checkpoint stores only the padded size.
    fixed = [*ARCHITECTURE, *["vocab_size"] * (getattr(stored, "vocab_size", None) is not None)]
    _check_same(args, model, [name for name in fixed if name in given])
    if args.use_checkpoint_args:
        if "spec" not in given:
            check_no_spec(stored, flag, "if you trust it, give the flag yourself")
        load_args_from_checkpoint(args, load_arg=flag.removeprefix("--").replace("-", "_"))
        for name in (*ARCHITECTURE, *_PRECISION):
            if hasattr(stored, name):
                setattr(args, name, getattr(stored, name))
        # Megatron lets the checkpoint overrule --tokenizer-model, --hidden-dropout and more.
        vars(args).update(given)
    _set_vocabulary(args, stored)
    return model


def check_same_model(context: Context) -> None:
    """Refuse flags that describe a student other than its checkpoint's.

    Raises:
        ValueError: names every field that differs; a checkpoint that lacks a field cannot contradict it.
    """
    if context.stored_student is not None:
        _check_same(context.args, context.stored_student, list(ARCHITECTURE))


def _check_same(args: argparse.Namespace, model: StoredModel, names: Sequence[str]) -> None:
    """Refuse a difference in any of the fields `names`."""
    stored = model.args
    differences = [
        f"{name} is {getattr(args, name)} here and {getattr(stored, name)} there"
        for name in names
        if hasattr(stored, name)
        and getattr(stored, name) != getattr(args, name)
        # For other activations this field changes only the speed.
        and (name != "bias_gelu_fusion" or has_plain_gelu(stored))
    ]
    if differences:
        raise ValueError(
            f"{model.flag} {model.folder}: the flags and the checkpoint describe different models: "
            f"{'; '.join(differences)}. Leave those flags out and give --use-checkpoint-args"
        )


def has_plain_gelu(args: argparse.Namespace) -> bool:
    """Whether `bias_gelu_fusion` changes the model: Megatron's fused GELU uses tanh, the other one erf."""
    other = any(getattr(args, name, False) for name in ("swiglu", "squared_relu", "quick_geglu"))
    return not other and getattr(args, "add_bias_linear", True)


def force_values(args: argparse.Namespace) -> None:
    """Set the values that distillation relies on, whatever the flags say. They are plain: a checkpoint stores them."""
    # Gradients get one divisor on every stage and rank, and no factor of data or context parallelism.
    args.calculate_per_token_loss = True
    # A run can then continue at another layout.
    args.dist_ckpt_optim_fully_reshardable = args.use_distributed_optimizer
    # Megatron's check would stop one rank inside a collective; our check stops all ranks before the optimizer runs.
    args.check_for_nan_in_loss_and_grad = False
    for fusion, kernel in _APEX_KERNELS.items():
        if importlib.util.find_spec(kernel) is None:
            setattr(args, fusion, False)
    if rope_utils.fused_apply_rotary_pos_emb is None:  # comes with TransformerEngine
        args.apply_rope_fusion = False


def student_checkpoint(args: argparse.Namespace) -> tuple[str | None, str]:
    """Find the folder to start from, and the flag that names it."""
    if args.load is not None and has_checkpoint(args.load):
        return args.load, "--load"
    if args.pretrained_checkpoint is not None:
        return args.pretrained_checkpoint, "--pretrained-checkpoint"
    # With `--load X --save X` Megatron's scripts start and resume by the same command.
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
