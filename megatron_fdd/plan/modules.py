"""Checks of the modules and kernels that a run chooses: a family's own layers, Megatron's local attention, Triton."""

from __future__ import annotations

import argparse
import importlib

from megatron.core.transformer.utils import is_layer_window_attention

from megatron_fdd.convert.families import FAMILIES
from megatron_fdd.host import layer_specs
from megatron_fdd.host.plugins import REMEDY
from megatron_fdd.host.rehearsal import is_wanted as is_rehearsal_wanted
from megatron_fdd.losses.terms import needs_of
from megatron_fdd.ops.divergence import check_triton_function
from megatron_fdd.plan.context import Context, Model

# TransformerEngine's ways to communicate under context parallelism.
_WAYS = ("p2p", "all_gather", "a2a", "a2a+p2p")
# With these, TransformerEngine's attention of a cut sequence takes a window.
_WAYS_WITH_WINDOWS = ("a2a", "all_gather")


def check_kernels(context: Context) -> None:
    """Refuse Triton's kernels in a rehearsal, because they need a GPU, and for a divergence that has none.

    Raises:
        ValueError: names the flag, or the divergence.
    """
    config = context.config
    if config.kernels != "triton":
        return
    if is_rehearsal_wanted():
        raise ValueError(
            "--fdd-kernels triton needs a GPU, and this run rehearses on CPUs: leave the flag out (auto chooses)"
        )
    if config.kd_weight > 0:
        check_triton_function(config.kd_divergence)
    if needs_of(config).divergence:
        check_triton_function(config.trajectory_divergence)


def check_spec(context: Context) -> None:
    """Refuse layers that cannot be imported: Megatron would build its usual ones, with a line in the log.

    Raises:
        ValueError: names what the command line calls them.
    """
    words = context.args.spec
    if words is None:
        return
    flag = f"--spec {' '.join(words)}"
    if len(words) != 2:
        raise ValueError(
            f"{flag}: give two words, a module and the name of a specification in it; or --transformer-impl local"
        )
    try:
        module = importlib.import_module(words[0])
    except Exception as error:  # whatever that module does
        raise ValueError(
            f"{flag}: cannot import {words[0]} ({type(error).__name__}: {error}); install it, or put it on PYTHONPATH"
        ) from error
    if not hasattr(module, words[1]):
        raise ValueError(f"{flag}: {words[0]} has no {words[1]}; give a name that it has")


def check_layers(model: Model) -> None:
    """Refuse layers of a family that has not been added; nothing is imported by a name out of a checkpoint.

    Raises:
        ValueError: names the layers, and those that are known.
    """
    name = getattr(model.args, layer_specs.NAME, None)
    known = sorted(family.model_type for family in FAMILIES.values() if family.layer_spec is not None)
    if name is not None and name not in known:
        raise ValueError(
            f"{model.role.label}'s layers are those of {name!r}, which no family here has (there are "
            f"{', '.join(known)}); add its family: {REMEDY}"
        )


def check_local_attention(model: Model) -> None:
    """Refuse a run that needs what Megatron's local attention lacks; a rehearsal's attention has it all.

    With sliding windows its fused kernel ignores the window, and its unfused one the mask.

    Raises:
        ValueError: the run cuts sequences over ranks or packs them, or part of the model's windows would be ignored.
    """
    args = model.args
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
            f"{model.role.label} has sliding windows and --transformer-impl is local: {' and '.join(remedies)}, or use "
            "--transformer-impl transformer_engine"
        )


def check_windows(model: Model) -> None:
    """Refuse sliding windows where TransformerEngine cuts sequences in a way that has none.

    It would say so in the first step. A rehearsal has other modules, which know windows.

    Raises:
        ValueError: names the first layer with a window, and its way to communicate.
    """
    args = model.args
    if args.context_parallel_size == 1 or args.transformer_impl == "local":
        return
    ways = _ways(args)
    for layer in _window_layers(args):
        way = ways[layer] if layer < len(ways) > 1 else ways[0]
        if way not in _WAYS_WITH_WINDOWS:
            raise ValueError(
                f"{model.role.label} has sliding windows (block {layer + 1}: {args.window_size}), and with "
                f"--context-parallel-size above 1 TransformerEngine has none for --cp-comm-type {way}: give "
                f"{' or '.join(_WAYS_WITH_WINDOWS)}"
            )


def check_ways(model: Model) -> None:
    """Refuse ways to communicate under context parallelism that do not exist, or that cannot deal a model's heads.

    With `a2a` the ranks that share a sequence deal the attention heads of a tensor rank among them. TransformerEngine
    would refuse both in the first step.

    Raises:
        ValueError: names the way, and the numbers that do not divide.
    """
    args, ways = model.args, _ways(model.args)
    unknown = [way for way in ways if way not in _WAYS]
    if unknown:
        raise ValueError(f"--cp-comm-type {unknown[0]}: must be {', '.join(_WAYS[:-1])} or {_WAYS[-1]}")
    heads, tensor = args.num_attention_heads, args.tensor_model_parallel_size
    if args.context_parallel_size == 1 or args.transformer_impl == "local" or heads is None:
        return
    groups = args.num_query_groups if args.group_query_attention else heads
    own_heads, own_groups = heads // tensor, max(groups // tensor, 1)
    levels = args.hierarchical_context_parallel_sizes or [1]
    ranks_of = {"a2a": args.context_parallel_size, "a2a+p2p": levels[0]}
    for way, ranks in ranks_of.items():
        if way in ways and (own_heads % ranks or own_groups % ranks):
            raise ValueError(
                f"--cp-comm-type {way} deals heads to {ranks} ranks, and of {model.role.label}'s a tensor rank has "
                f"{own_heads} in {own_groups} query groups: choose sizes so that {ranks} divides both, or give p2p"
            )


def _ways(args: argparse.Namespace) -> list[str]:
    """Return the ways of `--cp-comm-type`: one for all layers, or one for each."""
    return [args.cp_comm_type] if isinstance(args.cp_comm_type, str) else args.cp_comm_type or ["p2p"]


def _window_layers(args: argparse.Namespace) -> list[int]:
    """Return the layers whose attention has a window, 0-based."""
    if args.window_size is None or tuple(args.window_size) in ((-1, -1), (-1, 0)):
        return []
    skips = args.window_attn_skip_freq
    return [n for n in range(args.num_layers) if is_layer_window_attention(args.window_size, skips, n + 1)]
