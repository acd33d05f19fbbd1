"""The training of a tuned lens: an affine map for each of some blocks, whose prediction comes near the final one.

    torchrun --nproc-per-node 8 -m examples.extend.train_tuned_lens --lens-out lens.safetensors --blocks 16,32,48 -- \
        --teacher-load TEACHER --tensor-model-parallel-size 8 --train-iters 250 --lr 1e-3 --eval-iters 16 ...

Behind -- are flags of a distillation run: how the teacher runs, and what it reads. There is no student.
The result is a lens file for --teacher-lens, and beside it FILE.json with what was measured on the validation text.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_fdd.host import console, rehearsal

if rehearsal.is_wanted():
    rehearsal.start()  # before Megatron looks for a GPU

import torch
import torch.distributed as dist
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training.initialize import initialize_megatron
from megatron.training.training import build_train_valid_test_data_iterators
from torch import Tensor
from tqdm import tqdm

from examples.extend.tuned_lens import TUNED
from megatron_fdd.data.batch import Batch, get_batch
from megatron_fdd.data.provider import train_valid_test_provider
from megatron_fdd.host.patches.helpers import use_built_helpers
from megatron_fdd.host.plugins import import_plugins, named_plugins
from megatron_fdd.host.process import end_with, is_first_rank, print_error
from megatron_fdd.host.topology import Topology
from megatron_fdd.losses.lens import TeacherLens
from megatron_fdd.ops.head_loss import masked_sum
from megatron_fdd.ops.linear_kl import Divergence, Heads, Implementation, linear_kl
from megatron_fdd.plan.run import PreparedRun, prepare_run
from megatron_fdd.step.connect import vocab_shard
from megatron_fdd.step.lens import read_lens
from megatron_fdd.step.teacher.beside import BesideTeacher
from megatron_fdd.step.teacher.lens_file import TeacherIdentity, write_lens
from megatron_fdd.step.teacher.loading import build_teacher


class TunedBlocks:
    """A frozen teacher, of which this rank holds a tensor-parallel slice, and its blocks' maps, whole on each rank.

    Shape letters: B micro-batch, S sequence, N token rows of this rank, T the teacher's width.
    """

    def __init__(self, run: PreparedRun) -> None:
        assert run.teacher is not None
        assert run.teacher_checkpoint is not None
        self.topology = Topology.from_megatron(sequence_parallel=run.args.sequence_parallel)
        experts = self.topology.with_experts(run.teacher.expert_model_parallel_size)
        model = build_teacher(run.teacher, run.teacher_checkpoint, experts)
        self._teacher = BesideTeacher(model, [pair.teacher_layer for pair in run.plan.pairs])
        width, options = (
            run.teacher.hidden_size,
            {"device": torch.cuda.current_device(), "requires_grad": True},
        )
        self.maps = {
            pair.teacher_block: {
                "weight": torch.zeros(width, width, **options),
                "bias": torch.zeros(width, **options),
            }
            for pair in run.plan.pairs
        }
        self.parameters = [tensor for tensors in self.maps.values() for tensor in tensors.values()]
        bare = read_lens(model, with_norm=True, detached=True)
        self._lens = TeacherLens(bare, TUNED, self.maps)
        shard = vocab_shard(run.plan.padded_vocab_size, run.plan.vocab_size, self.topology)
        head, extras, kernels = bare.head_WH, bare.extras, Implementation(run.config.kernels)
        self._heads = Heads(head, head, shard, kernels, extras, extras)

    def mean_kl(self, batches: Sequence[Batch], *, backward: bool) -> tuple[list[float], float]:
        """Each block's KL(final prediction || its prediction) in nats a token, and the number of tokens.

        With `backward` the gradients of the maps are set to those of these means.
        Collectives: the teacher's; those of `linear_kl` a block; one all-reduce, and one a gradient.
        """
        sums = torch.zeros(len(self.maps) + 1, device=self.parameters[0].device)
        for parameter in self.parameters:
            parameter.grad = None
        for batch in batches:
            counts_N = self._rows(batch.loss_mask_BS)
            sums[-1] += counts_N.sum()
            for index, total in enumerate(self._totals(batch, counts_N)):
                if backward:
                    total.backward()  # before the next block's graph is made
                sums[index] += total.detach()
        dist.all_reduce(sums, group=self.topology.rows_group)
        for parameter in self.parameters if backward else ():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=self.topology.rows_group)
            parameter.grad /= sums[-1]
        return (sums[:-1] / sums[-1]).tolist(), sums[-1].item()

    def _totals(self, batch: Batch, counts_N: Tensor) -> Iterator[Tensor]:
        """The sum over this rank's tokens, block by block."""
        features, dtype = self._teacher.features(0, batch), self._heads.student_WD.dtype
        assert features.final_SBT is not None
        final_NT = features.final_SBT.flatten(0, 1)
        for index, block in enumerate(self.maps):
            features_NT = self._lens.features(features.taps_SBT[index], block).to(dtype)
            kl = Divergence("fkl")
            compared = linear_kl(final_NT, features_NT, self._heads, divergence=kl, needs_lse=False)
            assert compared.divergence_N is not None
            yield masked_sum(compared.divergence_N, counts_N)

    def _rows(self, value_BS: Tensor) -> Tensor:
        """[B, S] -> [N]: hidden states are sequence-major, and cut along the sequence if sequence parallel."""
        value_SB = value_BS.transpose(0, 1)
        if self.topology.sequence_parallel:
            value_SB = value_SB.chunk(self.topology.tensor_size)[self.topology.tensor_rank]
        return value_SB.flatten().float()


def train(run: PreparedRun) -> tuple[TunedBlocks, dict[str, Any]]:
    """The trained maps, and the row of FILE.json."""
    args, started = run.args, time.monotonic()
    use_built_helpers()
    initialize_megatron()
    run.check_files()
    tuned = TunedBlocks(run)
    datasets: Any = train_valid_test_provider
    datasets.is_distributed = True  # Megatron reads this: every rank has its own loaders
    training, validation, _ = build_train_valid_test_data_iterators(datasets)

    def read(iterator: Iterator[dict[str, Tensor]], num_steps: int) -> list[Batch]:
        device, group = torch.cuda.current_device(), tuned.topology.context_group
        return [get_batch(iterator, device, group) for _ in range(num_steps * get_num_microbatches())]

    def held_out() -> tuple[dict[int, float], float]:
        with torch.no_grad():
            means, count = tuned.mean_kl(validation_text, backward=False)
        return dict(zip(tuned.maps, means, strict=True)), count

    validation_text = read(validation, args.eval_iters)
    bare, num_held_out = held_out()
    optimizer = torch.optim.Adam(tuned.parameters, lr=args.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=args.train_iters)
    num_tokens = 0.0
    with tqdm(total=args.train_iters, unit="step", disable=None if is_first_rank() else True) as bar:
        for _ in range(args.train_iters):
            means, count = tuned.mean_kl(read(training, 1), backward=True)
            optimizer.step()
            schedule.step()
            num_tokens += count
            bar.set_postfix_str("KL " + " ".join(f"{mean:.3f}" for mean in means), refresh=False)
            bar.update()
    return tuned, {
        "teacher": run.config.teacher_load,
        "kl_bare": bare,
        "kl_tuned": held_out()[0],
        "training_tokens": num_tokens,
        "validation_tokens": num_held_out,
        "learning_rate": args.lr,
        "seconds": round(time.monotonic() - started),
    }


def prepare(blocks: str, flags: Sequence[str]) -> PreparedRun:
    """A distillation run whose student is its teacher, and never built.

    Raises:
        ValueError: as `prepare_run` does; or what a lens cannot be trained with.
    """
    pairs = ",".join(f"{block}:{block}" for block in blocks.split(","))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--teacher-load", default="")
    teacher = parser.parse_known_args(flags)[0].teacher_load
    if not teacher:
        raise ValueError("no teacher: give its Megatron checkpoint with --teacher-load DIR")
    sys.argv[1:] = [*flags, "--use-checkpoint-args", "--pretrained-checkpoint", teacher]
    sys.argv += ["--fdd-layer-pairs", pairs, "--fdd-beta", "0", "--eval-interval", str(10**9)]
    if rehearsal.is_wanted():
        sys.argv[1:] = rehearsal.add_flags(sys.argv[1:])
    import_plugins(named_plugins(flags))
    run = prepare_run()
    if run.args.pipeline_model_parallel_size > 1 or not run.args.eval_iters:
        raise ValueError(
            "a lens is trained on one pipeline stage and measured on other text: share the teacher with "
            "--tensor-model-parallel-size, and give --eval-iters N"
        )
    return run


def main() -> int:
    """Parse the command line, train, and say what came of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lens-out", type=Path, required=True, help="file to write")
    parser.add_argument("--blocks", required=True, help="of the teacher, 1-based: 6,12,18,24")
    parser.add_argument("flags", nargs="*", help="behind --")
    own = parser.parse_args()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Megatron prints a thousand lines
            run = prepare(own.blocks, own.flags)
            tuned, row = train(run)
            if is_first_rank():
                assert run.teacher_checkpoint is not None
                identity = TeacherIdentity.read(run.teacher_checkpoint, run.args)
                write_lens(own.lens_out, "tuned", identity, tuned.maps)
                own.lens_out.with_name(f"{own.lens_out.name}.json").write_text(json.dumps(row) + "\n")
    except ValueError as error:
        print_error(f"train_tuned_lens: error: {error}")
        return 1
    for block, bare in row["kl_bare"].items():
        after = row["kl_tuned"][block]
        console.say(
            f"block {block}: KL to the final prediction {bare:.4f} nats a token bare, {after:.4f} tuned"
        )
    return 0


if __name__ == "__main__":
    end_with(main)
