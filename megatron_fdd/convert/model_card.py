"""The model card of an export, README.md: what its checkpoint and the files that this names say, and nothing else.

Folders are named without the path to them, because a card is published.
"""

from __future__ import annotations

import hashlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fdd import __version__
from megatron_fdd.config import DEFAULTS
from megatron_fdd.config.flags import dest
from megatron_fdd.convert.checksums import CHECKSUMS_FILE, Checksums
from megatron_fdd.convert.families.family import HfConfig
from megatron_fdd.convert.hf_companions import HF_FOLDER
from megatron_fdd.host.json_file import read_json

CARD_FILE = "README.md"
_EVALUATION_FILE = "evaluation.json"
_TO_FILL_IN = ("license", "base_model", "datasets", "language")
# The weights of the loss are always told, our other flags where a run changed them.
_ALWAYS = ("layers", "alpha", "beta", "kd_weight", "ce_weight")
# What no reader of a card needs, or what has its own line.
_NOT_TOLD = frozenset(
    (
        "teacher_load",
        "teacher_store",
        "metrics_file",
        "dry_run",
        "verbose",
        "skip_checksums",
        "trust_checkpoint",
    )
)
_MEGATRON = (
    "seq_length", "global_batch_size", "lr", "min_lr", "lr_decay_style", "lr_warmup_iters", "weight_decay",
    "adam_beta1", "adam_beta2", "clip_grad", "seed", "bf16", "fp16", "fp8", "hidden_dropout", "attention_dropout",
)  # fmt: skip
_SIZES = {
    "num_hidden_layers": "layers", "n_layer": "layers", "hidden_size": "wide", "n_embd": "wide",
    "vocab_size": "words",
}  # fmt: skip
_MEASURES = {
    "perplexity": "perplexity",
    "cross_entropy": "cross-entropy in nats",
    "kl_to_teacher": "KL from the teacher",
}

Row = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CardSubject:
    """What a card is about.

    Attributes:
        name: of the exported folder.
        load: the folder of --load.
        iteration: of the checkpoint; None for a converted model that no training has changed.
        args: as the checkpoint stores them.
        config: the exported config.json.
        written: the sums of the exported tensors.
    """

    name: str
    load: Path
    iteration: int | None
    args: Namespace
    config: HfConfig
    written: Checksums


def model_card(subject: CardSubject) -> str:
    """Return the text of README.md. A line is left out where nothing is known."""
    teachers = list(_teachers(subject.args)) if subject.iteration is not None else []
    parts = [
        _head(is_distilled=bool(teachers)),
        f"# {subject.name}\n",
        f"Written by `fdd export` of megatron_fdd {__version__} from a Megatron checkpoint.\n",
        _table(("", ""), [*_model_rows(subject), *teachers]),
    ]
    if subject.iteration is not None:
        parts += _section(
            "Data",
            "The prepared sets that the training names, as they were at this export.",
            ("set", "kind", "documents", "tokens", "SHA-256 of ids and loss masks"),
            list(_data_rows(subject.args)),
        )
        parts += _section("Settings", "", ("flag", "value"), list(_settings(subject.args)))
    parts += _section(
        "Scores",
        "Of these weights, by `fdd evaluate`.",
        ("on", "measure", "value"),
        list(_scores(subject.load, subject.written)),
    )
    return "\n".join(parts)


def _head(*, is_distilled: bool) -> str:
    """Return the YAML that a hub reads; what nobody but the publisher knows is there to be filled in."""
    tags = ["megatron-fdd", *(["knowledge-distillation"] if is_distilled else [])]
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    lines += ["# To fill in: write a value, and remove the #."]
    lines += [f"# {field}:" for field in _TO_FILL_IN]
    return "\n".join(["---", *lines, "---", ""])


def _model_rows(subject: CardSubject) -> Iterator[Row]:
    args = subject.args
    yield "model", _described(subject.config)
    yield (
        "weights",
        (
            f"{subject.written.count():,} tensors, {subject.written.dtype}; a checksum of each in `{CHECKSUMS_FILE}`"
        ),
    )
    if subject.iteration is None:
        return
    base = getattr(args, "pretrained_checkpoint", None)
    if isinstance(base, str) and base:
        yield "base model", _model_at(base)
    last, samples = getattr(args, "train_iters", None), getattr(args, "consumed_train_samples", None)
    text = f"{subject.iteration:,}"
    if type(last) is int and last >= subject.iteration:
        text += f" of {last:,}"
    yield "iteration", text
    if type(samples) is int and samples > 0:
        yield "samples seen", f"{samples:,}"


def _teachers(args: Namespace) -> Iterator[Row]:
    live = getattr(args, dest("teacher_load"), None)
    if isinstance(live, str) and live:
        yield "teacher", _model_at(live)
    stored = getattr(args, dest("teacher_store"), None) or ()
    for word in [stored] if isinstance(stored, str) else stored:
        name, _, folder = str(word).rpartition("=")
        yield "teacher", f"stored features `{Path(folder).name}`" + (f" ({name})" if name else "")


def _model_at(folder: str) -> str:
    """Name a Megatron folder, with the Hugging Face model that it was made of, where that is still there."""
    text = f"`{Path(folder).name}`"
    source = Path(folder) / HF_FOLDER
    with suppress(ValueError, OSError):
        text += f": {_described(read_json(source / 'config.json'))}"
        digest = hashlib.sha256((source / CHECKSUMS_FILE).read_bytes()).hexdigest()
        text += f"; SHA-256 of its `{CHECKSUMS_FILE}`: {digest}"
    return text


def _described(config: Mapping[str, Any]) -> str:
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else config.get("model_type")
    sizes = [f"{config[key]:,} {word}" for key, word in _SIZES.items() if type(config.get(key)) is int]
    return ", ".join([str(name), *sizes])


def _data_rows(args: Namespace) -> Iterator[Row]:
    from megatron_fdd.data.prepared import open_set  # imports Megatron

    words: list[Any] = []
    for name in ("train_data_path", "data_path"):
        given = getattr(args, name, None) or ()
        words += [given] if isinstance(given, str) else list(given)
    for prefix in dict.fromkeys(map(str, words)):  # the weights of a blend are among them
        with suppress(ValueError, OSError):
            info = open_set(prefix).info
            if info is not None:
                counts = (f"{info.documents:,}", f"{info.tokens:,}")
                yield f"`{Path(prefix).name}`", info.kind, *counts, info.content_sha256


def _settings(args: Namespace) -> Iterator[Row]:
    """Yield the flags of a distillation, and those of Megatron that say how it was trained."""
    if hasattr(args, dest("layers")):
        for name, default in DEFAULTS.items():
            value = getattr(args, dest(name), None)
            changed = value != default and value not in (None, [], ())
            if name not in _NOT_TOLD and (changed or name in _ALWAYS):
                yield from _setting(dest(name), value)
    for name in _MEGATRON:
        yield from _setting(name, getattr(args, name, None))


def _setting(name: str, value: Any) -> Iterator[Row]:
    if value is not None and value is not False:
        values = value if isinstance(value, list | tuple) else [value]
        shown = ["yes" if each is True else str(each) for each in values]
        shown = [Path(each).name if "/" in each else each for each in shown]
        yield f"`--{name.replace('_', '-')}`", ", ".join(shown)


def _scores(load: Path, written: Checksums) -> Iterator[Row]:
    """Yield what `fdd evaluate` found for exactly these weights: the sums beside the evaluated model are the same."""
    for path in (load / _EVALUATION_FILE, *sorted(load.glob(f"evaluation/*/{_EVALUATION_FILE}"))):
        # A report refuses what is no evaluation.
        with suppress(ValueError, OSError, KeyError, TypeError, AttributeError):
            found = read_json(path)
            theirs = Checksums.read(Path(found["model"]))
            if theirs is not None and written.count_same(theirs) == written.count() == theirs.count():
                yield from list(_scores_of(found))
                return


def _scores_of(found: Mapping[str, Any]) -> Iterator[Row]:
    for name, answers in (found.get("answers") or {}).items():
        seeds = len(answers["rouge_l"].get("by_seed") or {})
        measure = f"ROUGE-L, {answers['num_examples']:,} examples, {seeds} seed" + "s" * (seeds != 1)
        yield str(name), measure, f"{answers['rouge_l']['mean']:.2f}"
    text = found.get("text") or {}
    for key in _MEASURES:
        if text.get(key) is not None:
            measure = f"{_MEASURES[key]}, {text['num_tokens']:,} tokens"
            yield f"`{Path(text['file']).name}`", measure, f"{text[key]:.4g}"
    for task, result in ((found.get("lm_eval") or {}).get("tasks") or {}).items():
        for name, value in result["measures"].items():
            count = result.get("num_examples")
            measure = f"{name} (lm-eval)" + (f", {count:,} examples" if count else "")
            yield task, measure, f"{value['value']:.4f}"


def _section(title: str, words: str, columns: Row, rows: list[Row]) -> list[str]:
    """Return a section with a table; nothing without rows."""
    return [f"## {title}\n", *([f"{words}\n"] if words else []), _table(columns, rows)] if rows else []


def _table(columns: Row, rows: list[Row]) -> str:
    lines = [columns, ("---",) * len(columns), *rows]
    return "".join(f"| {' | '.join(_cell(each) for each in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
