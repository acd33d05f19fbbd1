"""NVIDIA ModelOpt's logit losses for Megatron beside ours on the same tensors: time, memory, and the gradient.

    python -m benchmarks.modelopt

ModelOpt is not a dependency: `pip install nvidia-modelopt` (0.47 needs neither TransformerEngine nor apex). Its
losses take logits, so the two head products and their backward passes count on its side too, because Megatron would
have to do them; ours is `head_loss` with a trained head. Time and memory (gradients included) are those of one rank
without tensor parallelism. Gradients are compared with float64 on one rank and on two, where each rank has half of both
heads. The input is Megatron's own column-parallel one (its backward all-reduces). The loss is reduced as in
Megatron-LM's loss function (a plain all-reduce of the value, through which no gradient passes).
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # before torch is imported

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import measure
from megatron_fdd.ops.head_loss import LossWeights, head_loss
from megatron_fdd.ops.linear_kl import Divergence, Heads, VocabShard

FULL, TOP_K, OURS, FLOOR = "ModelOpt, all logits", "ModelOpt, top k", "ours", "bare matrix products"


@dataclass(frozen=True, slots=True)
class Size:
    """N tokens, V vocabulary, T and D width of teacher and student.

    `k`: how many of the teacher's largest logits are used.
    """

    tokens: int
    vocab: int
    teacher: int
    student: int
    top_k: int


# Large enough that float32 rounds as in a run, small enough for float64.
GRADIENT_SIZE = Size(tokens=64, vocab=1024, teacher=96, student=64, top_k=64)


@dataclass(frozen=True, slots=True)
class Tensors:
    """Hidden states, and a rank's part of the heads. The student's require a gradient."""

    teacher_NT: Tensor
    teacher_head_WT: Tensor
    student_ND: Tensor
    student_head_WD: Tensor


@dataclass(frozen=True, slots=True)
class GradientError:
    """Errors of one loss at one number of ranks, against float64.

    Attributes:
        loss: relative error of the loss.
        hidden, head: errors of the gradients, relative to their norm; the worst rank's.
        scale: the hidden gradient's component along the right one, in units of the right one.
    """

    loss: float
    hidden: float
    head: float
    scale: float


def make_tensors(size: Size, rank: int = 0, num_ranks: int = 1, device: str = "cpu") -> Tensors:
    """Return tensors that are the same on every rank, except that each has its own rows of the heads."""
    generator = torch.Generator().manual_seed(0)
    widths = (size.teacher, size.student)
    shapes = [(rows, width) for width in widths for rows in (size.tokens, size.vocab)]
    teacher_NT, teacher_head, student_ND, student_head = (
        torch.randn(shape, generator=generator).to(device) for shape in shapes
    )
    # Logits of size 2 give neither a uniform nor a one-hot distribution.
    teacher_head, student_head = teacher_head * 2 / size.teacher**0.5, student_head * 2 / size.student**0.5
    parts = [head.chunk(num_ranks)[rank].contiguous() for head in (teacher_head, student_head)]
    return Tensors(teacher_NT, parts[0], student_ND.requires_grad_(), parts[1].requires_grad_())


def modelopt_loss(tensors: Tensors, top_k: int | None, num_ranks: int) -> tuple[Tensor, bool]:
    """Return this rank's loss, summed over tokens, and whether the ranks' values are to be added.

    Collectives: with several ranks, those of Megatron's column-parallel input and of ModelOpt.
    """
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
    from megatron.core.transformer import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss, TopKLogitsKLLoss

    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=num_ranks, tensor_model_parallel_size=num_ranks
    )
    criterion = LogitsKLLoss(config) if top_k is None else TopKLogitsKLLoss(config, top_k=top_k)
    student_ND = tensors.student_ND
    if num_ranks > 1:
        student_ND = copy_to_tensor_model_parallel_region(student_ND)
    with torch.no_grad():
        teacher_NW = tensors.teacher_NT @ tensors.teacher_head_WT.T
    student_NW = student_ND @ tensors.student_head_WD.T
    loss_1N, adds_ranks, _ = criterion(student_NW[:, None], teacher_NW[:, None])
    return loss_1N.sum(), adds_ranks and num_ranks > 1


def our_loss(tensors: Tensors, shard: VocabShard) -> Tensor:
    """Return the sum, the same on every rank. Collectives: those of `head_loss`."""
    ones_N = torch.ones(len(tensors.student_ND), device=tensors.student_ND.device)
    result = head_loss(
        tensors.teacher_NT,
        tensors.student_ND,
        Heads(tensors.teacher_head_WT, tensors.student_head_WD, shard),
        divergence=Divergence("fkl"),
        labels_N=None,
        weights=LossWeights(ones_N, ones_N, divergence=1.0, entropy=0.0),
    )
    return result.loss


def make_step(name: str, size: Size, device: str) -> Callable[[], None]:
    """Return forward and backward of one of the rows, on tensors that exist already."""
    tensors = make_tensors(size, device=device)

    def step() -> None:
        if name == OURS:
            our_loss(tensors, VocabShard(0, size.vocab, None)).backward()
        else:
            modelopt_loss(tensors, size.top_k if name == TOP_K else None, 1)[0].backward()
        # Dropped now, so that gradients count as made in each call, not as existing before it.
        tensors.student_ND.grad = tensors.student_head_WD.grad = None

    def products() -> None:
        with torch.no_grad():
            _ = tensors.teacher_NT @ tensors.teacher_head_WT.T
            student_NV = tensors.student_ND @ tensors.student_head_WD.T
            _ = student_NV @ tensors.student_head_WD, student_NV.T @ tensors.student_ND

    return products if name == FLOOR else step


def reference(size: Size, top_k: int | None) -> tuple[float, Tensor, Tensor]:
    """Return the loss and its gradients to the student's hidden states and head, in float64."""
    drawn = make_tensors(size)
    teacher_NV = drawn.teacher_NT.double() @ drawn.teacher_head_WT.double().T
    student_ND = drawn.student_ND.detach().double().requires_grad_()
    head_VD = drawn.student_head_WD.detach().double().requires_grad_()
    student_NV = student_ND @ head_VD.T
    if top_k is not None:
        teacher_NV, chosen = teacher_NV.topk(top_k)
        student_NV = student_NV.gather(1, chosen)
    teacher_log, student_log = teacher_NV.log_softmax(1), student_NV.log_softmax(1)
    loss = (teacher_log.exp() * (teacher_log - student_log)).sum()
    loss.backward()
    assert student_ND.grad is not None
    assert head_VD.grad is not None
    return loss.item(), student_ND.grad, head_VD.grad


def gradient_errors(rank: int, num_ranks: int, rendezvous: Path) -> dict[str, GradientError]:
    """Compare every loss with the reference on one rank of several. Collectives: those of the losses."""
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=num_ranks)
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=num_ranks)
    group = parallel_state.get_tensor_model_parallel_group()
    rows = GRADIENT_SIZE.vocab // num_ranks
    shard = VocabShard(rank * rows, rows, group)
    errors = {}
    for name in (FULL, TOP_K, OURS):
        top_k = GRADIENT_SIZE.top_k if name == TOP_K else None
        tensors = make_tensors(GRADIENT_SIZE, rank, num_ranks)
        adds_ranks = False
        if name == OURS:
            loss = our_loss(tensors, shard)
        else:
            loss, adds_ranks = modelopt_loss(tensors, top_k, num_ranks)
        loss.backward()
        value = loss.detach().clone()
        if adds_ranks:
            dist.all_reduce(value, group=group)
        errors[name] = _compare(tensors, value, reference(GRADIENT_SIZE, top_k), shard.first)
    dist.destroy_process_group()
    return errors


def _compare(
    tensors: Tensors, loss: Tensor, expected: tuple[float, Tensor, Tensor], first_row: int
) -> GradientError:
    assert tensors.student_ND.grad is not None
    assert tensors.student_head_WD.grad is not None
    hidden, head = tensors.student_ND.grad.double(), tensors.student_head_WD.grad.double()
    right_hidden = expected[1]
    right_head = expected[2][first_row : first_row + len(head)]
    return GradientError(
        loss=abs(loss.item() / expected[0] - 1),
        hidden=((hidden - right_hidden).norm() / right_hidden.norm()).item(),
        head=((head - right_head).norm() / right_head.norm()).item(),
        scale=((hidden * right_hidden).sum() / right_hidden.square().sum()).item(),
    )


def errors_at(num_ranks: int) -> dict[str, GradientError]:
    """Return the worst rank's errors; each rank is a separate process."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(num_ranks, multiprocessing.get_context("spawn")) as pool,
    ):
        ranks = [
            pool.submit(gradient_errors, rank, num_ranks, Path(folder) / "store") for rank in range(num_ranks)
        ]
        results = [rank.result() for rank in ranks]
    return {
        name: max((result[name] for result in results), key=lambda error: max(error.hidden, error.head))
        for name in results[0]
    }


def print_errors(num_ranks: int, errors: dict[str, GradientError]) -> None:
    """Print one line for each loss."""
    print(f"\n{f'tensor parallel {num_ranks}':<36}{'loss':>9}{'d hidden':>10}{'times':>8}{'d head':>10}")
    for name, error in errors.items():
        print(f"{name:<36}{error.loss:>9.1e}{error.hidden:>10.1e}{error.scale:>8.4f}{error.head:>10.1e}")


def main(argv: list[str]) -> int:
    """Measure and compare; return the exit status: 1 if a measurement is unsteady, 0 also if ModelOpt is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.modelopt",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    for name, default in (("tokens", 1024), ("vocab", 32000), ("teacher", 768), ("student", 384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--top-k", type=int, default=1024)
    parser.add_argument("--smoke", action="store_true", help="a tiny size, and nothing is recorded")
    args = parser.parse_args(argv)
    if args.smoke:
        vars(args).update(tokens=64, vocab=500, teacher=24, student=16, top_k=50)
    if (
        importlib.util.find_spec("modelopt") is None
    ):  # not imported here: that may start CUDA, and runs are forked
        print("ModelOpt is not installed: left out (pip install nvidia-modelopt)")
        return 0
    size = Size(args.tokens, args.vocab, args.teacher, args.student, args.top_k)
    rows = {
        name: measure.measure(partial(make_step, name, size, args.device), args.repeats, args.device)
        for name in (FLOOR, OURS, FULL, TOP_K)
    }
    print(measure.table(rows, FLOOR))
    errors = {num_ranks: errors_at(num_ranks) for num_ranks in (1, 2)}
    print("\nrelative errors against float64; `times`: the hidden states' gradient over the right one")
    for num_ranks, found in errors.items():
        print_errors(num_ranks, found)
    scales = {
        f"TP {num_ranks}, {name}": [round(error.scale, 5), float(f"{error.hidden:.2g}")]
        for num_ranks, found in errors.items()
        for name, error in found.items()
    }
    if args.smoke:
        return 0
    measure.record("modelopt", vars(args), rows, hidden_gradient_times_and_error=scales)
    # Ratios of unsteady times were not printed.
    return 0 if all(row.is_steady for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
