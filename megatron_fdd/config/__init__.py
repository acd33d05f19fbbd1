"""The values of all `--fdd-*` flags: one frozen dataclass, whose fields are the flags, and checks without ranks."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from typing import Literal

from megatron_fdd.config.flags import add_flags, check_bounds, flag, read_flags
from megatron_fdd.config.values import (
    ABOVE_0,
    AT_LEAST_0,
    AT_LEAST_1,
    MIX,
    PROBABILITY,
    SHARE,
    TEMPERATURE,
    WEIGHT,
    default_mixes,
    divergences,
    parse_layer_pairs,
    parse_teacher_stores,
    parse_term_weights,
)
from megatron_fdd.host.plugins import WHERE
from megatron_fdd.ops.divergence import DIVERGENCES

# The former names of flags, which this release still takes.
OLD_NAMES = {"--fdd-teacher-expert-model-parallel-size": "--teacher-expert-model-parallel-size"}


@dataclass(frozen=True, slots=True)
class FddConfig:
    """The choice of what to distil and how. A field is a flag: `--teacher-...` by its own name, others after `--fdd-`.

    Layer numbers are the paper's: "output of block l", 1-based.

    Raises:
        ValueError: a value is wrong by itself or together with others; names it, its bound or the remedy.
    """

    teacher_load: str | None = flag(
        None,
        "Megatron checkpoint of the teacher, any layout",
        group="distillation: the teacher",
        metavar="DIR",
    )
    teacher_expert_model_parallel_size: int | None = flag(
        None,
        "ranks that share the experts of a mixture-of-experts teacher (default: as the student's)",
        metavar="N",
        bound=AT_LEAST_1,
    )
    teacher_fp8_format: Literal["e4m3", "hybrid"] | None = flag(
        None,
        "run the teacher's layers in FP8, whatever the student's --fp8-format, and hold their weights in FP8 alone, in "
        "half of bf16's memory; needs TransformerEngine. A frozen model has no gradients, so that both are e4m3 for it "
        "(default: bf16)",
    )
    teacher_fp8_recipe: Literal["tensorwise", "blockwise", "mxfp8", "delayed"] = flag(
        "tensorwise",
        "how the teacher's FP8 numbers are scaled; tensorwise is current scaling, mxfp8 is for Blackwell, delayed "
        "needs a checkpoint with scales, from a run with --fp8-recipe delayed",
    )
    teacher_store: tuple[tuple[str, str], ...] = flag(
        (),
        "the teacher's features on disk, which fdd teach made of this run's data, in place of --teacher-load. Several "
        "NAME=DIR, one behind the other: as many teachers, each of the data sets in whose prefix the name stands",
        metavar="[NAME=]DIR",
        read=parse_teacher_stores,
        takes_words=True,
    )
    teacher_follow: bool = flag(
        False,
        "the store is a stream: this training asks for the features that it will read, and fdd teach --follow makes "
        "them meanwhile, in a room of --window-bytes",
    )
    teacher_wait: float = flag(
        540.0,
        "with --fdd-teacher-follow: seconds to wait for a store to be begun, and for an answer while no producer gives "
        "any; at most --distributed-timeout-minutes",
        metavar="SECONDS",
        bound=ABOVE_0,
    )
    teacher_lens: str | None = flag(
        None,
        "lens file through which the teacher's inner layers are read (default: its own final norm and head)",
        metavar="FILE",
    )
    layers: int = flag(
        4, "sampled layers per model", group="distillation: layers", metavar="K", bound=AT_LEAST_1
    )
    layer_rule: Literal["paper", "linspace"] = flag(
        "paper", "paper: k*floor(L/(K+1)); linspace: floor(k*L/(K+1))"
    )
    layer_pairs: tuple[tuple[int, int], ...] | None = flag(
        None,
        "explicit pairs of block numbers, 1-based, student:teacher, both increasing; replaces the rule",
        metavar="S:T,S:T,...",
        read=parse_layer_pairs,
    )
    alpha: float = flag(
        1.0, "weight of the trajectory term; 0 switches it off", group="distillation: the loss", bound=WEIGHT
    )
    beta: float = flag(1.0, "weight of the delta (first derivative) term; 0 switches it off", bound=WEIGHT)
    kd_weight: float = flag(1.0, "weight of the final-logit distillation; 0 switches it off", bound=WEIGHT)
    ce_weight: float = flag(0.0, "weight of the cross-entropy with the labels", bound=WEIGHT)
    term: tuple[tuple[str, float], ...] = flag(
        (),
        "a term of inner layers that a plug-in adds, and its weight; repeatable",
        metavar="NAME=WEIGHT",
        read=parse_term_weights,
    )
    kd_divergence: str = flag(
        "fkl", "divergence of the final logits, of teacher T and student S", choices=divergences
    )
    trajectory_divergence: str = flag(
        "fkl", "divergence of the trajectory, one of the same", choices=lambda: tuple(DIVERGENCES)
    )
    divergence_mix: float | None = flag(
        None, f"mix of both divergences, where they have one (default: {default_mixes()})", bound=MIX
    )
    temperature: float = flag(
        1.0, "heats final-logit and trajectory divergences, with the temperature**2 factor", bound=TEMPERATURE
    )
    lens_norm: Literal["final", "none"] = flag(
        "final", "norm in front of the head when a layer is read through it"
    )
    lens_head: Literal["detached", "live"] = flag(
        "detached", "whether head and final norm learn from the inner layers"
    )
    delta: Literal["logprob", "centred"] = flag(
        "logprob", "space of the delta: log-probabilities (paper) or centred logits"
    )
    delta_detach_previous: bool = flag(False, "no gradient to the earlier layer of a delta")
    tokens: Literal["labels", "all"] = flag(
        "labels", "which positions count: those with a label, or all but padding"
    )
    text_units: Literal["rows", "documents"] = flag(
        "rows",
        "how plain text becomes samples. rows: cut from all documents one behind the other, as Megatron does. "
        "documents: each document is cut once into pieces of --seq-length, so that a teacher's stored features of a "
        "piece serve every epoch and seed; give --dataloader-inter-document-masking too, which fills a row with pieces",
    )
    warmup_iters: int = flag(
        0, "the weights of inner layers' terms rise linearly over this many steps", bound=AT_LEAST_0
    )
    decay_iters: int = flag(
        0,
        "the weights of inner layers' terms fall linearly to 0 by this step; 0 = constant",
        bound=AT_LEAST_0,
    )
    kernels: Literal["auto", "reference", "torch", "triton"] = flag(
        "auto",
        "fused losses: triton (GPU), torch, or reference, which forms logits",
        group="distillation: time and memory",
    )
    skip_below: float = flag(
        0.0,
        "approximation: inner layers' gradients leave out vocabulary tiles without a probability of at least this",
        bound=PROBABILITY,
    )
    sample_tokens: float = flag(
        1.0,
        "the terms of inner layers in a training step look at this part of each micro-batch's tokens, drawn anew and "
        "right on average: their cost falls to F, gradients get noisier (0.25 is a start). Final-logit terms and "
        "evaluation keep all tokens. 1: off",
        metavar="F",
        bound=SHARE,
    )
    sample_one_tap: bool = flag(
        False,
        "a training step computes the terms of one sampled layer, drawn at random, with the delta that ends at it; "
        "they count for all K, right on average. Cheaper up to K times and noisier; evaluation keeps all",
    )
    offload_teacher_taps: bool = flag(
        False,
        "with several pipeline stages: a step's teacher features wait for their micro-batch in host memory",
    )
    tap_dtype: Literal["bf16", "fp8", "int8"] = flag(
        "bf16",
        "approximation, of a teacher in memory with several pipeline stages (a store has its own --form): fp8 and int8 "
        "halve what the teacher's taps take while they wait for their micro-batch and move between stages, with a "
        "scale a token; int8 keeps the 8 largest entries of a token in bf16 and is the nearer one; bf16 leaves taps as "
        "they are",
    )
    metrics_file: str | None = flag(
        None, "append one JSON object per iteration here", group="distillation: the run", metavar="PATH"
    )
    dry_run: bool = flag(
        False,
        "print the plan and memory estimates, load no weights, exit 0. fdd plan --world-size 64 -- FLAGS adds it to "
        "FLAGS, and plans 64 ranks in one process",
    )
    verbose: bool = flag(
        False,
        "print on the terminal all that Megatron and its libraries print, from every rank, and keep no log of it "
        "(default: SAVE/logs/rank*.log; without --save fdd-logs/ here)",
    )
    skip_checksums: bool = flag(
        False,
        "load checkpoints without comparing their files with the file_sums.json that lies beside them (default: each "
        "rank first reads its share of their bytes once more)",
    )
    trust_checkpoint: bool = flag(
        False,
        "unpickle whatever the checkpoints hold, which lets them run code with your rights on every rank "
        "(default: objects of a few harmless classes only; another class is refused by its name)",
    )
    plugin: tuple[str, ...] = flag(
        (),
        f"import this module on every rank before flags are read, so that names which it registers are known; {WHERE}; "
        "repeatable. Give it again to go on from a checkpoint or to export it: nothing that a checkpoint names is "
        "imported",
        metavar="MODULE",
    )

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.teacher_lens is not None and self.lens_norm == "none":
            raise ValueError(
                f"--teacher-lens {self.teacher_lens}: a lens file is made for the final norm; leave --fdd-lens-norm "
                "none out"
            )

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> FddConfig:
        """Take the values of a parsed command line (Megatron's namespace with `add_fdd_args`).

        Raises:
            ValueError: the class refuses a value, or the layer pairs cannot be read.
        """
        return cls(**read_flags(cls, args))

    @property
    def is_exact(self) -> bool:
        """Whether the terms of inner layers use all tokens and taps of every step."""
        return self.sample_tokens == 1 and not self.sample_one_tap

    @property
    def num_pairs(self) -> int:
        """Number of sampled layers in each model."""
        return self.layers if self.layer_pairs is None else len(self.layer_pairs)

    def weight_scale(self, iteration: int) -> float:
        """Return the factor of inner layers' terms in step `iteration` (0-based): linear warm-up, then decay to 0."""
        scale = 1.0
        if self.warmup_iters:
            scale = min(1.0, (iteration + 1) / self.warmup_iters)
        if self.decay_iters:
            scale *= max(0.0, 1.0 - iteration / self.decay_iters)
        return scale


DEFAULTS = {field.name: field.default for field in dataclasses.fields(FddConfig)}


def add_fdd_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the distillation flags to Megatron's parser (its `extra_args_provider`)."""
    parser.usage = (
        "torchrun --nproc-per-node N -m megatron_fdd.distill "
        "--load STUDENT --teacher-load TEACHER [--fdd-...] [any Megatron flag]"
    )
    add_flags(parser, FddConfig)
    for old, new in OLD_NAMES.items():  # --help shows the new one alone
        parser._option_string_actions[old] = parser._option_string_actions[new]
    return parser
