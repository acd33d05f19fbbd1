"""The Megatron side of a conversion: complete args, and a stock GPTModel without weights."""

from __future__ import annotations

import contextlib
import io
import sys
from argparse import Namespace
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from megatron_fdd.convert.families.family import WeightRow
from megatron_fdd.host.layer_specs import SPEC_ARGS

# A conversion computes nothing, so that plain modules are enough on every machine.
_BUILD_FLAGS = [
    "--transformer-impl=local",
    "--use-cpu-initialization",
    "--distributed-backend=gloo",
    "--no-persist-layer-norm",
    "--no-gradient-accumulation-fusion",
    "--no-masked-softmax-fusion",
    "--no-bias-swiglu-fusion",
    "--no-bias-gelu-fusion",
    "--no-rope-fusion",
    "--micro-batch-size=1",
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype in config.json and `DTYPES`, such as bfloat16."""
    return str(dtype).removeprefix("torch.")


# The argument under which Megatron holds parameters in a dtype that is not its default.
_DTYPE_FLAG = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def complete_args(
    architecture: Mapping[str, Any], *, dtype: torch.dtype, vocabulary_divisor: int, tensor_size: int = 1
) -> Namespace:
    """Make Megatron's validated args namespace for a model; everything that is not architecture has its default.

    Args:
        architecture: argparse destinations and values, with the unpadded `vocab_size` among them.
        vocabulary_divisor: the vocabulary is padded to a multiple of this number times `tensor_size`.

    Raises:
        ValueError: Megatron refuses the combination.
    """
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.vocab_utils import calculate_padded_vocab_size

    values = {**architecture, "make_vocab_size_divisible_by": vocabulary_divisor}
    values["tensor_model_parallel_size"] = tensor_size
    # Every rank saves the same args; Megatron checks that they agree.
    values |= {"rank": 0, "local_rank": 0, "world_size": tensor_size}
    if dtype in _DTYPE_FLAG:
        values[_DTYPE_FLAG[dtype]] = True
    with _argv(_BUILD_FLAGS), contextlib.redirect_stdout(io.StringIO()):
        args = parse_args()
        vars(args).update(dict.fromkeys(SPEC_ARGS))
        unknown = sorted(set(values) - set(vars(args)))
        assert not unknown, f"this Megatron has no arguments {unknown}"
        vars(args).update(values)
        try:
            validate_args(args)
        except AssertionError as error:
            raise ValueError(f"Megatron refuses this model: {error}") from None
    args.padded_vocab_size = calculate_padded_vocab_size(
        args.vocab_size, vocabulary_divisor, tensor_size, logging_enabled=False
    )
    return args


def argument_names() -> set[str]:
    """Return the destinations that Megatron's parser knows."""
    from megatron.training.arguments import parse_args

    with _argv(_BUILD_FLAGS):
        return set(vars(parse_args()))


@contextlib.contextmanager
def _argv(flags: list[str]) -> Iterator[None]:
    """Put `flags` into sys.argv, because Megatron's parser reads nothing else."""
    before = sys.argv
    sys.argv = [before[0], *flags]
    try:
        yield
    finally:
        sys.argv = before


def build_model(args: Namespace, groups: Any, device: str = "cpu") -> torch.nn.Module:
    """Build a stock GPTModel whose parameters are not initialised.

    Args:
        device: on "meta", parameters have names, shapes and dtypes, but no memory.
    """
    from megatron.training.models.gpt import GPTModelBuilder

    from megatron_fdd.host.model import build_config, cap_own_logits
    from megatron_fdd.host.patches.norms import plain_norms

    config = build_config(args)
    config.transformer.perform_initialization = False
    with torch.device(device), plain_norms(), contextlib.redirect_stdout(io.StringIO()):
        model = GPTModelBuilder(config).build_model(groups, pre_process=True, post_process=True)
        cap_own_logits([model])
    return model.to(args.params_dtype)  # otherwise position embeddings are float32


def stored_tensors(model: torch.nn.Module, rows: Collection[WeightRow]) -> dict[str, Tensor]:
    """Return the tensors of a model on the meta device that a checkpoint holds, in the dtypes that `rows` give them."""
    from megatron_fdd.convert.checkpoint_entries import tensors_of

    own = {row.mcore: row.dtype for row in rows if row.dtype is not None}
    for name, parameter in model.named_parameters():
        if name in own:
            parameter.data = parameter.data.to(own[name])
    tensors = tensors_of(model)
    names = {row.mcore for row in rows}
    assert names == set(tensors), names ^ set(tensors)
    return tensors
