"""Facts about each run: what its metrics file says, its flags, how it was evaluated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron_fdd.config import DEFAULTS
from megatron_fdd.config.flags import dest
from megatron_fdd.evaluate.report.runs import Run
from megatron_fdd.evaluate.report.terms import kinds_of

Facts = list[tuple[str, list[str]]]

# Those of Megatron's many arguments that say what was trained, on what, and how.
_MEGATRON = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "num_experts",
    "tokenizer_model", "pretrained_checkpoint", "data_path", "train_data_path", "valid_data_path",
    "seq_length", "micro_batch_size", "global_batch_size", "train_iters", "lr", "min_lr", "lr_decay_style",
    "lr_decay_iters", "lr_warmup_iters", "weight_decay", "adam_beta1", "adam_beta2", "clip_grad", "hidden_dropout",
    "attention_dropout", "seed", "bf16", "fp16", "fp8", "tensor_model_parallel_size",
    "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size", "context_parallel_size",
    "expert_model_parallel_size", "sequence_parallel", "recompute_granularity",
)  # fmt: skip
# Always shown, because nothing else of a run tells them. Our other flags are shown only if a run changed them.
_ALWAYS = ("layers", "alpha", "beta", "kd_weight", "ce_weight")
_NOT_TOLD = ("metrics_file", "dry_run")
UNKNOWN = "–"


def run_facts(runs: Sequence[Run]) -> Facts:
    """Return what the files say, whatever the flags were."""
    return _known(
        [
            ("iterations", [_of_metrics(run, _iterations) for run in runs]),
            ("tokens with a label", [_of_metrics(run, _tokens) for run in runs]),
            ("time in steps", [_of_metrics(run, _time) for run in runs]),
            ("layer pairs, student : teacher", [_of_metrics(run, _pairs) for run in runs]),
            ("ranks", [_text(run.flags.get("world_size")) for run in runs]),
            ("metrics", [_text(run.metrics_path) for run in runs]),
            ("evaluated model", [_text((run.evaluation or {}).get("model")) for run in runs]),
            ("teacher of the evaluation", [_text(_text_of(run).get("teacher")) for run in runs]),
            ("validation text", [_text(_text_of(run).get("file")) for run in runs]),
            ("scored tokens", [_text(_text_of(run).get("num_tokens")) for run in runs]),
            ("tokens in a window", [_text(_text_of(run).get("length")) for run in runs]),
            ("remarks", ["; ".join(run.remarks) or UNKNOWN for run in runs]),
        ]
    )


def flag_facts(runs: Sequence[Run]) -> Facts:
    """Return the flags in the checkpoints, first those in which the runs differ; empty if no run has any."""
    known = [run for run in runs if run.flags]
    facts: Facts = []
    for flag, default in (*_own_flags(), *((name, None) for name in _MEGATRON)):
        values = [run.flags.get(flag) for run in known]
        told = flag in _MEGATRON or flag.removeprefix("fdd_") in _ALWAYS
        if told or any(value != default for value in values):
            facts.append((f"--{flag.replace('_', '-')}", [_text(run.flags.get(flag)) for run in runs]))
    return sorted(_known(facts), key=lambda fact: not differs(fact[1]))


def setting_facts(runs: Sequence[Run]) -> Facts:
    """Return the settings of the evaluations, and the sizes of their data files."""
    evaluations = [run.evaluation or {} for run in runs]
    facts: Facts = []
    for key in dict.fromkeys(key for found in evaluations for key in found.get("settings") or {}):
        facts.append((key, [_text((found.get("settings") or {}).get(key)) for found in evaluations]))
    for file in dict.fromkeys(name for found in evaluations for name in found.get("answers") or {}):
        sizes = [((found.get("answers") or {}).get(file) or {}).get("num_examples") for found in evaluations]
        facts.append((f"examples in {file}", [_text(size) for size in sizes]))
    return _known(facts)


def sample_facts(runs: Sequence[Run]) -> Facts:
    """Return what each model writes, by prompt."""
    samples: list[Mapping[str, str]] = [(run.evaluation or {}).get("samples") or {} for run in runs]
    prompts = dict.fromkeys(prompt for found in samples for prompt in found)
    return [(prompt, [found.get(prompt, UNKNOWN) for found in samples]) for prompt in prompts]


def differs(values: Sequence[str]) -> bool:
    """Whether the runs with a known value have different values."""
    return len({value for value in values if value != UNKNOWN}) > 1


def _own_flags() -> list[tuple[str, object]]:
    """Return namespace name and default of every flag of ours that shapes a run."""
    return [(dest(name), default) for name, default in DEFAULTS.items() if name not in _NOT_TOLD]


def _known(facts: Facts) -> Facts:
    return [(name, values) for name, values in facts if any(value != UNKNOWN for value in values)]


def _of_metrics(run: Run, tell: Callable[[Run], str]) -> str:
    return UNKNOWN if run.metrics is None else tell(run)


def _iterations(run: Run) -> str:
    assert run.metrics is not None
    metrics, wanted = run.metrics, run.flags.get("train_iters")
    text = f"{metrics.last:,}" if metrics.first == 1 else f"{metrics.first:,} to {metrics.last:,}"
    if wanted and wanted > metrics.last:
        text += f" of {wanted:,}"
    if metrics.is_cut:
        text += " (the last line is unfinished: killed, or still running)"
    return text


def _tokens(run: Run) -> str:
    assert run.metrics is not None
    curve = run.metrics.curves.get("tokens")
    return UNKNOWN if curve is None else f"{int(curve.values.sum()):,}"


def _time(run: Run) -> str:
    """Return the time in steps, without set-up, checkpoints and validation."""
    assert run.metrics is not None
    curve = run.metrics.curves.get("seconds")
    if curve is None:
        return UNKNOWN
    seconds = float(curve.values.sum())
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:,.1f} h"


def _pairs(run: Run) -> str:
    assert run.metrics is not None
    pairs = max((run.metrics.layer_pairs(kind.name) for kind in kinds_of([run])), key=len)
    text = ", ".join(pair.replace("s", "").replace(":t", ":") for pair in pairs) or UNKNOWN
    return text + (" (one drawn a step)" if run.metrics.has_gaps else "")


def _text_of(run: Run) -> Mapping[str, Any]:
    return (run.evaluation or {}).get("text") or {}


def _text(value: object) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:,}" if type(value) is int and value > 9999 else str(value)
