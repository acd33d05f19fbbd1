"""Megatron's own `pretrain()`, called in live ranks: a rehearsal trains, resumes and recomputes as a GPU would."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args, pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from torch import Tensor

from megatron_fdd.host import rehearsal
from megatron_fdd.host.patches.helpers import use_built_helpers
from tests.harness.ranks import Layout, clean_megatron, run_on_ranks

pytestmark = pytest.mark.tier("default")

# A learning rate so high that one gradient that is not summed shows in the loss of the third step.
TINY = (
    "--mock-data --tokenizer-type NullTokenizer --vocab-size 127 --make-vocab-size-divisible-by 64 "
    "--position-embedding-type rope --swiglu --disable-bias-linear --untie-embeddings-and-output-weights "
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2 "
    "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 1 --global-batch-size 4 --lr 1e-2 "
    "--lr-decay-style constant --eval-iters 0 --eval-interval 100 --calculate-per-token-loss --normalization RMSNorm "
)
DRY = "--hidden-dropout 0 --attention-dropout 0 "


class RefusedError(ValueError):
    """The error that a body under test expects."""


def _datasets(sizes: list[int], vp_stage: int | None = None) -> Any:
    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        split="90,5,5",
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()


_datasets.is_distributed = True


def _pretrain(flags: str, forward_step: Callable[..., Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain", *rehearsal.add_flags((TINY + flags).split())])
        use_built_helpers()
        args = parse_and_validate_args()
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(config, _datasets, ModelType.encoder_or_decoder, forward_step)


def _losses(runs: list[str]) -> list[list[float]]:
    """Return, for each run (its flags), the summed loss of this rank's micro-batches, in their order."""
    return [_losses_of_run(flags) for flags in runs]


def _losses_of_run(flags: str) -> list[float]:
    losses: list[float] = []

    def forward_step(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> Any:
        batch = next(batches)
        output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])

        def loss(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            total, count = output.float().sum(), torch.tensor(output.numel(), dtype=torch.int)
            losses.append(total.item())
            return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}

        return output, loss

    with contextlib.suppress(SystemExit):  # --exit-interval
        _pretrain(flags, forward_step)
    clean_megatron()
    return losses


def _refused_then_trained() -> list[float]:
    def forward_step(*_arguments: Any) -> Any:
        raise RefusedError

    with pytest.raises(RefusedError):
        _pretrain(DRY + "--train-iters 1", forward_step)
    clean_megatron()
    return _losses_of_run(DRY + "--train-iters 1")


@pytest.mark.tier("all")
@pytest.mark.parametrize("norms", ["--qk-layernorm --apply-layernorm-1p", "--normalization LayerNorm"])
def test_tensor_and_sequence_parallelism_keep_the_losses(norms: str) -> None:
    flags = f"{DRY} --train-iters 3 {norms} "
    [[one]] = run_on_ranks(_losses, Layout(ranks=1), {"runs": [flags]})
    runs = [flags + f"--tensor-model-parallel-size 2 {more}" for more in ("", "--sequence-parallel")]
    for split in run_on_ranks(_losses, Layout(ranks=2), {"runs": runs})[0]:
        assert split == pytest.approx(one, rel=2e-6)
    assert one[-1] < one[0] - 1  # the steps were large enough to matter


def test_distributed_optimizer_resumes_exactly(tmp_path: Path) -> None:
    flags = (
        "--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather "
        f"--ddp-bucket-size 3000 --save-interval 2 --train-iters 4 --save {tmp_path} "
    )
    runs = [flags + "--exit-interval 2", flags + f"--load {tmp_path}", flags]
    for first, resumed, uninterrupted in run_on_ranks(_losses, Layout(ranks=2), {"runs": runs}):
        assert len(first) == len(resumed) > 0
        assert first + resumed == uninterrupted


def test_recomputed_layers_keep_the_losses_under_dropout() -> None:
    whole = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1"
    part = "--recompute-granularity selective --recompute-modules core_attn mlp"
    flags = "--hidden-dropout 0.1 --attention-dropout 0.1 --train-iters 2 "
    [[stored, *recomputed]] = run_on_ranks(
        _losses, Layout(ranks=1), {"runs": [flags, flags + whole, flags + part]}
    )
    assert recomputed == [stored, stored]


def test_a_rank_survives_a_refused_run() -> None:
    layout = Layout(ranks=1)
    [survivor] = run_on_ranks(_refused_then_trained, layout)
    [[fresh]] = run_on_ranks(_losses, layout, {"runs": [DRY + "--train-iters 1"]})
    assert survivor == fresh
