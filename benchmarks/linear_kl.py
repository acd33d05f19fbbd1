"""Time and memory of the losses: plain torch, ours, Liger's fused loss, and the bare matrix products as the floor.

    python -m benchmarks.linear_kl                     # the size that the bars are for
    python -m benchmarks.linear_kl --sweep             # over tokens, widths and vocabularies
    python -m benchmarks.linear_kl --device cuda       # 8,192 tokens, vocabulary 128,000, 4096/2048 wide, bf16

Forward KL, log-probability delta, forward and backward. Two comparisons: the whole objective of K sampled layers
(trajectory and delta, heads constant, Gram matrices included) and the final logits alone (head trained). Every
implementation runs in a process of its own; before it is measured its loss is compared with float64.
Exits 1 when repeats differ too much for a ratio, or a bar is missed.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import MIB, Measurement, machine, measure, record, table
from megatron_fdd.ops.delta import delta_cosine, head_grams
from megatron_fdd.ops.head_loss import LossWeights, head_loss
from megatron_fdd.ops.linear_kl import DEFAULT_KERNELS, Divergence, Kernels, VocabShard, linear_kl

Step = Callable[[], Tensor]
FLOOR, PLAIN, OURS = "bare matrix products", "plain torch", "megatron_fdd"
PER_TOKEN, LIGER = "megatron_fdd, gradient per token", "Liger LigerFusedLinearJSDLoss"
IN_TRAINING = "megatron_fdd, into main_grad"
IN_TORCH = "megatron_fdd, --fdd-kernels torch"
# Bars at the default size on a CPU; on a GPU the objective has its own.
OBJECTIVE_BAR, PLAIN_BAR, GPU_BAR, VOCAB_BAR = 1.25, 0.5, 1.5, 0.05


@dataclass(frozen=True)
class Size:
    """What is computed: K sampled layers of both models."""

    tokens: int
    vocab: int
    teacher_width: int
    student_width: int
    layers: int
    dtype: str = "float32"
    device: str = "cpu"


DEFAULTS = {
    "cpu": Size(1024, 32000, 768, 384, 4),
    "cuda": Size(8192, 128000, 4096, 2048, 4, "bfloat16", "cuda"),
}
SMOKE = Size(64, 500, 24, 16, 2)


@dataclass(frozen=True)
class Inputs:
    """Both heads, and the features of every sampled layer, student's with gradient."""

    teacher_head_WT: Tensor
    student_head_WS: Tensor
    teacher: list[Tensor]
    student: list[Tensor]

    @property
    def shard(self) -> VocabShard:
        return VocabShard(0, len(self.teacher_head_WT), None)

    def differentiated(self, total: Tensor) -> Tensor:
        """The loss, after its backward pass; gradients are dropped, so that each call's count as made in it."""
        total.backward()
        for tensor in (self.student_head_WS, *self.student):
            tensor.grad = None
        return total.detach()


def inputs(size: Size, *, trains_head: bool = False) -> Inputs:
    """Random features whose logits have a standard deviation of 2; the same numbers every time."""
    generator = torch.Generator(size.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=size.device)
        return values.to(getattr(torch, size.dtype))

    head_T = normal(size.vocab, size.teacher_width).mul_(2 / size.teacher_width**0.5)
    head_S = normal(size.vocab, size.student_width).mul_(2 / size.student_width**0.5)
    teacher = [normal(size.tokens, size.teacher_width) for _ in range(size.layers)]
    student = [normal(size.tokens, size.student_width).requires_grad_() for _ in range(size.layers)]
    return Inputs(head_T, head_S.requires_grad_(trains_head), teacher, student)


def bare_products(size: Size) -> Step:
    """Four products a layer: both logits, and what each expectation of the student's head costs."""
    given = inputs(size)

    @torch.no_grad()
    def run() -> Tensor:
        for teacher, student in zip(given.teacher, given.student, strict=True):
            teacher_logits = teacher @ given.teacher_head_WT.T
            student_logits = student @ given.student_head_WS.T
            last = teacher_logits @ given.student_head_WS + student_logits @ given.student_head_WS
        return last

    return run


def plain_terms(given: Inputs, dtype: torch.dtype) -> Tensor:
    """Trajectory and delta as one writes them down: log-probabilities of every layer and model."""
    teacher_head, student_head = given.teacher_head_WT.to(dtype), given.student_head_WS.to(dtype)
    teacher = [F.log_softmax((hidden.to(dtype) @ teacher_head.T).to(dtype), -1) for hidden in given.teacher]
    student = [F.log_softmax((hidden.to(dtype) @ student_head.T).to(dtype), -1) for hidden in given.student]
    pairs = zip(student, teacher, strict=True)
    terms = [F.kl_div(s, t, log_target=True, reduction="none").sum(-1).mean() for s, t in pairs]
    for j in range(1, len(teacher)):
        cosine = F.cosine_similarity(teacher[j] - teacher[j - 1], student[j] - student[j - 1], dim=-1)
        terms.append((1 - cosine).mean())
    return torch.stack(terms).sum()


def plain_objective(size: Size) -> Step:
    given = inputs(size)

    def run() -> Tensor:
        total = plain_terms(given, torch.float32)
        return given.differentiated(total)

    return run


def bare_tap(size: Size) -> Step:
    """The same of one layer."""
    return bare_products(replace(size, layers=1))


def our_tap(size: Size, kernels: Kernels = DEFAULT_KERNELS) -> Step:
    """`linear_kl` of one layer, whose divergence and log-sum-exp both have a gradient."""
    given = inputs(size)

    def run() -> Tensor:
        result = linear_kl(
            given.teacher[0],
            given.teacher_head_WT,
            given.student[0],
            given.student_head_WS,
            shard=given.shard,
            divergence=Divergence(),
            kernels=kernels,
        )
        assert result.divergence_N is not None
        assert result.student_lse_N is not None
        given.differentiated(result.divergence_N.mean() + result.student_lse_N.mean())
        return result.divergence_N.mean().detach()

    return run


def our_objective(size: Size, kernels: Kernels = DEFAULT_KERNELS) -> Step:
    """The same terms by the package's operations, Gram matrices (once a step) included."""
    given = inputs(size)

    def run() -> Tensor:
        shard = given.shard
        grams = head_grams(given.teacher_head_WT, given.student_head_WS, shard=shard, centred=False)
        heads = (given.teacher_head_WT, given.student_head_WS)
        outputs = [
            linear_kl(
                teacher, heads[0], student, heads[1], shard=shard, divergence=Divergence(), kernels=kernels
            )
            for teacher, student in zip(given.teacher, given.student, strict=True)
        ]
        terms = [output.divergence_N.mean() for output in outputs]
        for j in range(1, size.layers):
            now, before = outputs[j], outputs[j - 1]
            cosine = delta_cosine(
                given.teacher[j].float() - given.teacher[j - 1].float(),
                given.student[j].float() - given.student[j - 1].float(),
                now.teacher_lse_N - before.teacher_lse_N,
                now.student_lse_N - before.student_lse_N,
                grams,
                shard=shard,
            )
            terms.append((1 - cosine).mean())
        total = torch.stack(terms).sum()
        return given.differentiated(total)

    return run


def bare_final(size: Size) -> Step:
    """Both logits, and one product for each gradient, of hidden states and head."""
    given = inputs(size)

    @torch.no_grad()
    def run() -> Tensor:
        teacher, student = given.teacher[0], given.student[0]
        teacher @ given.teacher_head_WT.T
        logits = student @ given.student_head_WS.T
        logits.T @ student
        return logits @ given.student_head_WS

    return run


def plain_final(size: Size) -> Step:
    """Final-logit distillation as one writes it down."""
    given = inputs(size, trains_head=True)

    def run() -> Tensor:
        teacher = F.log_softmax((given.teacher[0] @ given.teacher_head_WT.T).float(), -1)
        student = F.log_softmax((given.student[0] @ given.student_head_WS.T).float(), -1)
        total = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean()
        return given.differentiated(total)

    return run


def our_final(size: Size, kernels: Kernels = DEFAULT_KERNELS, *, trains: bool = False) -> Step:
    """`head_loss`: the weights of the tokens are known, so one pass does.

    Args:
        trains: as in a training: the head's gradient is added to what Megatron holds for it.
    """
    given = inputs(size, trains_head=True)
    weight = torch.full((size.tokens,), 1 / size.tokens, device=size.device)
    factor = None
    if trains:
        factor, head = torch.ones((), device=size.device), given.student_head_WS
        head.main_grad = torch.zeros_like(head, dtype=torch.float32)  # type: ignore[attr-defined]
        head.grad_added_to_main_grad = False  # type: ignore[attr-defined]

    def run() -> Tensor:
        result = head_loss(
            (given.teacher[0], given.teacher_head_WT),
            (given.student[0], given.student_head_WS),
            shard=given.shard,
            divergence=Divergence(),
            labels_N=None,
            weights=LossWeights(weight, weight, divergence=1.0, entropy=0.0, factor=factor),
            kernels=kernels,
        )
        assert result.divergence is not None
        return given.differentiated(result.divergence)

    return run


def our_final_per_token(size: Size) -> Step:
    """`linear_kl`: any gradient per token may come back, so the head is swept again."""
    given = inputs(size, trains_head=True)

    def run() -> Tensor:
        result = linear_kl(
            given.teacher[0],
            given.teacher_head_WT,
            given.student[0],
            given.student_head_WS,
            shard=given.shard,
            divergence=Divergence(),
            needs_lse=False,
        )
        assert result.divergence_N is not None
        total = result.divergence_N.mean()
        return given.differentiated(total)

    return run


def liger_final(size: Size) -> Step:
    """Liger's fused linear JSD at beta 0, which is forward KL; a GPU compiles it, as it does by itself."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    given = inputs(size, trains_head=True)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=size.device == "cuda"
    )
    labels = torch.zeros(size.tokens, dtype=torch.int64, device=size.device)
    heads = (given.student_head_WS, given.teacher_head_WT)

    def run() -> Tensor:
        total = loss(given.student[0], heads[0], given.teacher[0], heads[1], labels)
        total = total[0] if isinstance(total, tuple) else total
        return given.differentiated(total)

    return run


def exact(size: Size, *, whole: bool) -> float:
    """The loss in float64: of the objective (`whole`), or of the final logits, which are the first layer's."""
    given = inputs(size)
    count = size.layers if whole else 1
    return plain_terms(
        replace(given, teacher=given.teacher[:count], student=given.student[:count]), torch.float64
    ).item()


def check(makers: dict[str, Callable[[Size], Step]], size: Size, *, whole: bool) -> None:
    """Each implementation's loss against float64, at few tokens and a small vocabulary."""
    small = replace(size, tokens=min(size.tokens, 64), vocab=min(size.vocab, 4000))
    wanted = exact(small, whole=whole)
    for name, make in makers.items():
        if name == FLOOR or (
            name == LIGER and size.device == "cuda"
        ):  # which would compile for this size, too
            continue
        found = make(small)().item()
        tolerance = 1e-5 if size.dtype == "float32" else 2e-2
        if abs(found - wanted) > tolerance * abs(wanted):
            raise SystemExit(f"{name} gives {found}, float64 gives {wanted}: not the same work")


def compare(
    title: str, makers: dict[str, Callable[[Size], Step]], size: Size, repeats: int
) -> dict[str, Measurement]:
    """Measure, print and, unless it is a trial, record."""
    rows: dict[str, Measurement] = {}
    for name, make in makers.items():
        try:
            rows[name] = measure(partial(make, size), repeats, size.device)
        except RuntimeError as error:
            print(f"{name}: {error}", file=sys.stderr)
    print(f"\n{title}\n{table(rows, FLOOR)}", flush=True)
    if size != replace(SMOKE, device=size.device):
        record(title, asdict(size), rows)
    return rows


def bars(size: Size, objective: dict[str, Measurement], final: dict[str, Measurement], repeats: int) -> bool:
    """Print what is wanted at the default size and what was found. Returns whether all of it holds."""
    if not all(row.is_steady for row in [*objective.values(), *final.values()]):
        return False
    floor, ours = objective[FLOOR], objective[OURS]
    tile = Kernels().tile_columns(torch.empty(0, dtype=getattr(torch, size.dtype), device=size.device))
    allowed = 4 * (3 * size.tokens * tile + 2 * size.layers * size.tokens * size.student_width) / MIB
    doubled = measure(partial(our_objective, replace(size, vocab=2 * size.vocab)), repeats, size.device)
    growth = abs(doubled.peak_mib / ours.peak_mib - 1)
    limit = OBJECTIVE_BAR if size.device == "cpu" else GPU_BAR
    found = [
        (f"objective / bare products at most {limit}", ours.seconds / floor.seconds, limit),
        (f"objective's extra MiB at most {allowed:.0f}", ours.peak_mib, allowed),
        ("its growth with twice the vocabulary at most 5 %", growth, VOCAB_BAR),
    ]
    if PLAIN in objective:
        ratio = ours.seconds / objective[PLAIN].seconds
        found.append((f"objective / plain torch at most {PLAIN_BAR}", ratio, PLAIN_BAR))
    if LIGER in final:
        found.append(("final logits / Liger at most 1", final[OURS].seconds / final[LIGER].seconds, 1.0))
        ratio = final[OURS].peak_mib / final[LIGER].peak_mib
        found.append(("their extra memory / Liger's at most 1", ratio, 1.0))
    print()
    for text, value, bar in found:
        print(f"{'passed' if value <= bar else 'MISSED'}: {text}: {value:.3f}")
    return all(value <= bar for _, value, bar in found)


def sizes(base: Size) -> list[Size]:
    """One thing at a time changed from the default."""
    changes: list[dict[str, int]] = [{"vocab": 128000}, {"vocab": 152000}]
    changes += [{"tokens": base.tokens // 4}, {"tokens": 2 * base.tokens}]
    changes += [{"teacher_width": 2 * base.teacher_width, "student_width": 2 * base.student_width}]
    return [size for size in (replace(base, **change) for change in changes) if size != base]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=DEFAULTS, default="cpu", help="(%(default)s)")
    for name in ("tokens", "vocab", "teacher_width", "student_width", "layers"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{name} (the device's default)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--repeats", type=int, default=5, help="of which the median counts (%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a tiny size, and nothing is recorded")
    parser.add_argument("--sweep", action="store_true", help="over tokens, widths and vocabularies")
    parser.add_argument(
        "--no-plain", action="store_true", help="leave out plain torch, which needs the memory"
    )
    args = parser.parse_args(argv)
    base = DEFAULTS[args.device]
    given = {name: getattr(args, name) for name in asdict(base) if getattr(args, name) is not None}
    base = replace(SMOKE, device=base.device) if args.smoke else replace(base, **given)
    print(f"{machine()}; torch {torch.__version__}; median of {args.repeats}")
    objective: dict[str, Callable[[Size], Step]] = {
        FLOOR: bare_products,
        PLAIN: plain_objective,
        OURS: our_objective,
    }
    final: dict[str, Callable[[Size], Step]] = {
        FLOOR: bare_final,
        PLAIN: plain_final,
        OURS: our_final,
        IN_TRAINING: partial(our_final, trains=True),
        PER_TOKEN: our_final_per_token,
    }
    if importlib.util.find_spec("liger_kernel") is None:
        print("liger_kernel is not installed: left out (pip install liger-kernel)")
    else:
        final[LIGER] = liger_final
    if args.no_plain:
        del objective[PLAIN], final[PLAIN]
    tap: dict[str, Callable[[Size], Step]] = {FLOOR: bare_tap, OURS: our_tap}
    if args.device == "cuda":  # elsewhere that is what runs
        in_torch = Kernels("torch")
        tap[IN_TORCH] = partial(our_tap, kernels=in_torch)
        objective[IN_TORCH] = partial(our_objective, kernels=in_torch)
        final[IN_TORCH] = partial(our_final, kernels=in_torch)
    check(objective, base, whole=True)
    check(final, base, whole=False)
    check(tap, base, whole=False)
    good = True
    for size in sizes(base) if args.sweep else [base]:
        print(f"\n{size}")
        one = compare("one layer's divergence, heads constant", tap, size, args.repeats)
        whole = compare(f"objective, {size.layers} layers, heads constant", objective, size, args.repeats)
        alone = compare("final logits, head trained", final, size, args.repeats)
        steady = all(row.is_steady for row in [*one.values(), *whole.values(), *alone.values()])
        if not steady:
            print("repeats differ by more than 5 %: too much noise for a ratio", file=sys.stderr)
        good &= steady
        if size == DEFAULTS[args.device] and not args.sweep:
            good &= bars(size, whole, alone, args.repeats)
    return 0 if good or args.smoke else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
