"""Every `--fdd-*` value: one frozen dataclass, its flags, and the checks that need no ranks."""

from __future__ import annotations

import argparse
import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

DivergenceName = Literal["fkl", "rkl", "jsd", "sfkl", "srkl"]
_DIVERGENCES = get_args(DivergenceName)
KernelName = Literal["auto", "reference", "torch", "triton"]
TeacherRecipe = Literal["tensorwise", "blockwise", "mxfp8", "delayed"]
# Beyond them float32 is too coarse: above, for the difference of two log-probabilities times temperature**2 (a
# loss is off by a few thousandths at 100, by a twentieth and more at 1000); below, for the gradient of jsd (by a few
# hundredths at 0.001).
_COLDEST, _HOTTEST = 0.01, 100
# Flags by the names they had, which this release still takes.
OLD_NAMES = {"--fdd-teacher-expert-model-parallel-size": "--teacher-expert-model-parallel-size"}


@dataclass(frozen=True, slots=True)
class FddConfig:
    """What to distil and how. Field names are the `argparse` names without `fdd_`.

    Layer numbers are the paper's: "output of block l", 1-based.
    """

    teacher_load: str | None = None
    teacher_expert_model_parallel_size: int | None = None
    teacher_fp8_format: Literal["e4m3", "hybrid"] | None = None
    teacher_fp8_recipe: TeacherRecipe = "tensorwise"
    layers: int = 4
    layer_rule: Literal["paper", "linspace"] = "paper"
    layer_pairs: tuple[tuple[int, int], ...] | None = None
    alpha: float = 1.0
    beta: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    kd_divergence: DivergenceName = "fkl"
    trajectory_divergence: DivergenceName = "fkl"
    divergence_mix: float | None = None
    temperature: float = 1.0
    lens_norm: Literal["final", "none"] = "final"
    lens_head: Literal["detached", "live"] = "detached"
    delta: Literal["logprob", "centred"] = "logprob"
    delta_detach_previous: bool = False
    tokens: Literal["labels", "all"] = "labels"
    warmup_iters: int = 0
    decay_iters: int = 0
    kernels: KernelName = "auto"
    skip_below: float = 0.0
    sample_tokens: float = 1.0
    sample_one_tap: bool = False
    offload_teacher_taps: bool = False
    tap_dtype: Literal["bf16", "fp8"] = "bf16"
    metrics_file: str | None = None
    dry_run: bool = False
    verbose: bool = False

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> FddConfig:
        """The values of a parsed command line (Megatron's namespace with `add_fdd_args`).

        Raises:
            ValueError: a value out of its bounds, or layer pairs that cannot be read.
        """
        values = {
            field.name: getattr(args, dest(field.name))
            for field in dataclasses.fields(cls)
            if field.name != "layer_pairs"
        }
        config = cls(layer_pairs=parse_layer_pairs(args.fdd_layer_pairs), **values)
        config.check()
        return config

    @property
    def uses_taps(self) -> bool:
        """Whether any term looks at an inner layer."""
        return self.alpha > 0 or self.beta > 0

    @property
    def uses_final_head(self) -> bool:
        """Whether the final logits are needed at all."""
        return self.kd_weight > 0 or self.ce_weight > 0

    @property
    def needs_teacher(self) -> bool:
        return self.uses_taps or self.kd_weight > 0

    @property
    def is_exact(self) -> bool:
        """Whether trajectory and delta look at all tokens and taps of every step."""
        return self.sample_tokens == 1 and not self.sample_one_tap

    @property
    def num_pairs(self) -> int:
        """Sampled layers per model."""
        return self.layers if self.layer_pairs is None else len(self.layer_pairs)

    def weight_scale(self, iteration: int) -> float:
        """Factor of alpha and beta in step `iteration` (0-based): linear warm-up, then linear decay to 0."""
        scale = 1.0
        if self.warmup_iters:
            scale = min(1.0, (iteration + 1) / self.warmup_iters)
        if self.decay_iters:
            scale *= max(0.0, 1.0 - iteration / self.decay_iters)
        return scale

    def check(self) -> None:
        """Raise ValueError for any value that is wrong on its own."""
        for name in ("alpha", "beta", "kd_weight", "ce_weight"):
            _require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "at least 0, and finite")
        for name in ("warmup_iters", "decay_iters"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        if not (self.uses_taps or self.uses_final_head):
            raise ValueError(
                "--fdd-kd-weight, --fdd-alpha, --fdd-beta and --fdd-ce-weight are all 0, so that nothing is trained: "
                "raise one of them"
            )
        bound = f"from {_COLDEST} to {_HOTTEST}, where float32 is fine enough for the losses"
        _require(_COLDEST <= self.temperature <= _HOTTEST, "temperature", self.temperature, bound)
        if self.divergence_mix is not None:
            _require(0 < self.divergence_mix < 1, "divergence_mix", self.divergence_mix, "between 0 and 1")
        _require(0 <= self.skip_below < 1, "skip_below", self.skip_below, "at least 0 and below 1")
        _require(self.layers >= 1, "layers", self.layers, "at least 1")
        _require(0 < self.sample_tokens <= 1, "sample_tokens", self.sample_tokens, "above 0, and at most 1")
        experts = self.teacher_expert_model_parallel_size
        if experts is not None:
            _require(experts >= 1, "teacher_expert_model_parallel_size", experts, "at least 1")
        if self.beta > 0 and self.num_pairs < 2:
            raise ValueError(
                f"the delta term compares adjacent sampled layers and needs at least 2, there is {self.num_pairs}: "
                "raise --fdd-layers, give more --fdd-layer-pairs, or switch the delta off with --fdd-beta 0"
            )
        if self.needs_teacher and self.teacher_load is None:
            raise ValueError(
                "no teacher: give its Megatron checkpoint with --teacher-load DIR "
                "(fdd import makes one from a Hugging Face model)"
            )


def parse_layer_pairs(text: str | None) -> tuple[tuple[int, int], ...] | None:
    """`"2:4,4:9"` -> `((2, 4), (4, 9))`; None stays None.

    Raises:
        ValueError: anything but comma-separated STUDENT:TEACHER block numbers.
    """
    if text is None:
        return None
    pairs = []
    for item in text.split(","):
        student, colon, teacher = item.partition(":")
        if not (colon and student.strip().isdigit() and teacher.strip().isdigit()):
            raise ValueError(
                f"--fdd-layer-pairs {text!r}: {item!r} is not STUDENT:TEACHER, "
                "two 1-based block numbers such as 2:4,4:9"
            )
        pairs.append((int(student), int(teacher)))
    return tuple(pairs)


def add_fdd_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the distillation flags to Megatron's parser (its `extra_args_provider`)."""
    parser.usage = (
        "torchrun --nproc-per-node N -m megatron_fdd.distill "
        "--load STUDENT --teacher-load TEACHER [--fdd-...] [any Megatron flag]"
    )
    group = parser.add_argument_group("feature dynamics distillation")
    group.add_argument("--teacher-load", metavar="DIR", help="Megatron checkpoint of the teacher, any layout")
    group.add_argument(
        "--teacher-expert-model-parallel-size",
        type=int,
        metavar="N",
        help="ranks that share the experts of a mixture-of-experts teacher (default: as the student's)",
    )
    _add_teacher_fp8_args(group)
    _add_layer_args(group)
    _add_loss_args(group)
    _add_sampling_args(group)
    _add_tap_args(group)
    group.add_argument("--fdd-metrics-file", metavar="PATH", help="append one JSON object per iteration here")
    group.add_argument(
        "--fdd-dry-run",
        action="store_true",
        help="print the plan and memory estimates, load no weights, exit 0. fdd plan --world-size 64 -- FLAGS adds it "
        "to FLAGS, and plans 64 ranks in one process",
    )
    group.add_argument(
        "--fdd-verbose",
        action="store_true",
        help="print on the terminal all that Megatron and its libraries print, from every rank, and keep no log of it "
        "(default: SAVE/logs/rank*.log; without --save fdd-logs/ here)",
    )
    for old, new in OLD_NAMES.items():  # --help shows the new one alone
        parser._option_string_actions[old] = parser._option_string_actions[new]
    return parser


def _add_teacher_fp8_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--teacher-fp8-format",
        choices=("e4m3", "hybrid"),
        help="run the teacher's layers in FP8, whatever the student's --fp8-format, and hold their weights in FP8 "
        "alone, in half of bf16's memory; needs TransformerEngine. A frozen model has no gradients, so that both are "
        "e4m3 for it (default: bf16)",
    )
    group.add_argument(
        "--teacher-fp8-recipe",
        choices=get_args(TeacherRecipe),
        default=FddConfig().teacher_fp8_recipe,
        help="how the teacher's FP8 numbers are scaled; tensorwise is current scaling, mxfp8 is for Blackwell, "
        "delayed needs a checkpoint with scales, from a run with --fp8-recipe delayed (%(default)s)",
    )


def _add_tap_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fdd-offload-teacher-taps",
        action="store_true",
        help="with several pipeline stages: a step's teacher features wait for their micro-batch in host memory",
    )
    group.add_argument(
        "--fdd-tap-dtype",
        choices=("bf16", "fp8"),
        default=FddConfig().tap_dtype,
        help="approximation: fp8 halves what the teacher's taps take while they wait for their micro-batch and move "
        "between pipeline stages, with a scale a token; bf16 leaves them as they are (%(default)s)",
    )


def _add_layer_args(group: argparse._ArgumentGroup) -> None:
    default = FddConfig()
    group.add_argument(
        "--fdd-layers",
        type=int,
        default=default.layers,
        metavar="K",
        help="sampled layers per model (%(default)s)",
    )
    group.add_argument(
        "--fdd-layer-rule",
        choices=("paper", "linspace"),
        default=default.layer_rule,
        help="paper: k*floor(L/(K+1)); linspace: floor(k*L/(K+1)) (%(default)s)",
    )
    group.add_argument(
        "--fdd-layer-pairs",
        metavar="S:T,S:T,...",
        help="explicit pairs of block numbers, 1-based, student:teacher, both increasing; replaces the rule",
    )


def _add_loss_args(group: argparse._ArgumentGroup) -> None:
    default = FddConfig()

    def value(name: str, text: str, kind: type = float) -> None:
        default_value = getattr(default, name.replace("-", "_"))
        group.add_argument(f"--fdd-{name}", type=kind, default=default_value, help=f"{text} (%(default)s)")

    def choice(name: str, choices: tuple[str, ...], text: str) -> None:
        default_value = getattr(default, name.replace("-", "_"))
        group.add_argument(
            f"--fdd-{name}", choices=choices, default=default_value, help=f"{text} (%(default)s)"
        )

    value("alpha", "weight of the trajectory term; 0 switches it off")
    value("beta", "weight of the delta (first derivative) term; 0 switches it off")
    value("kd-weight", "weight of the final-logit distillation; 0 switches it off")
    value("ce-weight", "weight of the cross-entropy with the labels")
    choice("kd-divergence", _DIVERGENCES, "divergence of the final logits")
    choice("trajectory-divergence", _DIVERGENCES, "divergence of the trajectory")
    group.add_argument(
        "--fdd-divergence-mix",
        type=float,
        default=None,
        help="beta of jsd (0.5), lambda of sfkl and srkl (0.1), for both terms",
    )
    value("temperature", "heats final-logit and trajectory divergences, with the temperature**2 factor")
    choice("lens-norm", ("final", "none"), "norm in front of the head when a layer is read through it")
    choice("lens-head", ("detached", "live"), "whether head and final norm learn from the inner layers")
    choice("delta", ("logprob", "centred"), "space of the delta: log-probabilities (paper) or centred logits")
    group.add_argument(
        "--fdd-delta-detach-previous", action="store_true", help="no gradient to the earlier layer of a delta"
    )
    choice("tokens", ("labels", "all"), "which positions count: those with a label, or all but padding")
    choice(
        "kernels", get_args(KernelName), "fused losses: triton (GPU), torch, or reference, which forms logits"
    )
    value(
        "skip-below",
        "approximation: inner layers' gradients leave out vocabulary tiles without a probability of at least this",
    )
    value("warmup-iters", "alpha and beta rise linearly over this many steps", int)
    value("decay-iters", "alpha and beta fall linearly to 0 by this step; 0 = constant", int)


def _add_sampling_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fdd-sample-tokens",
        type=float,
        default=FddConfig().sample_tokens,
        metavar="F",
        help="trajectory and delta of a training step look at this part of each micro-batch's tokens, drawn anew "
        "and right on average: their cost falls to F, gradients get noisier (0.25 is a start). Final-logit terms "
        "and evaluation keep all tokens (%(default)s = off)",
    )
    group.add_argument(
        "--fdd-sample-one-tap",
        action="store_true",
        help="a training step computes the trajectory of one sampled layer, drawn at random, and the delta that "
        "ends at it; they count for all K, right on average. Cheaper up to K times and noisier; evaluation keeps all",
    )


def dest(field_name: str) -> str:
    """A field's name in the parsed command line, and, with dashes, that of its flag."""
    return field_name if field_name.startswith("teacher_") else f"fdd_{field_name}"


def _require(condition: bool, name: str, value: object, bound: str) -> None:
    if not condition:
        raise ValueError(f"--{dest(name).replace('_', '-')} {value}: must be {bound}")
