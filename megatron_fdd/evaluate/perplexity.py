"""Cross-entropy of Hugging Face models on a text, and their distance to a teacher on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_fdd.data.documents import read_documents
from megatron_fdd.data.refusals import Refusal
from megatron_fdd.data.tokenizer_identity import encoded_by
from megatron_fdd.evaluate.models import begun, check_finite, end_ids, leading_ids, plain_generation

# One batch's logits hold at most this many numbers (64 MiB in float32), unless one window has more.
_MAX_LOGITS = 2**24


@dataclass(frozen=True, slots=True)
class PerplexityScore:
    """Means over predicted tokens, in nats; `kl_to_teacher` is KL(teacher || model), NaN without a teacher."""

    cross_entropy: float
    kl_to_teacher: float

    @property
    def perplexity(self) -> float:
        """exp of the cross-entropy; infinite if that is too large for a float."""
        try:
            return math.exp(self.cross_entropy)
        except OverflowError:
            return math.inf


def read_texts(path: Path) -> list[str]:
    """Return the `text` of every line of a JSONL file; empty texts are left out, as in training.

    Raises:
        ValueError: a line is not an object with a `text`; names file and line.
    """
    documents = read_documents([str(path)], "jsonl", "")
    try:
        texts = [document.text_field(document.json_object(), "text") for document in documents]
    except Refusal as error:  # its remedy is that of a data set
        raise ValueError(
            f'{error.where}: {error.detail}; give JSON lines, each an object with "text"'
        ) from error
    return [text for text in texts if text.strip()]


def cut_windows(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int | None = None
) -> Tensor:
    """Join texts, each begun and ended as by `fdd prepare --append-eod`, and cut them into windows as in training.

    Returns:
        int64 [windows, length + 1]; neighbours share one token, so that every token but the first is
        predicted once. With `max_tokens` there are at most so many predictions, from windows spread over the text.

    Raises:
        ValueError: the text is shorter than one window.
    """
    leading = leading_ids(tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = encoded_by(tokenizer, texts)
    tokens = torch.tensor(
        [token for ids in encoded for token in [*begun(ids, leading), *(end if ids[-1:] != end else [])]]
    )
    if len(tokens) <= length:
        raise ValueError(f"the text has {len(tokens)} tokens, one window needs {length + 1}: give more text")
    windows = tokens.unfold(0, length + 1, length)
    if max_tokens is not None and max_tokens < len(windows) * length:
        windows = windows[torch.linspace(0, len(windows) - 1, max_tokens // length).long()]
    return windows


@torch.inference_mode()
def score_models(
    teacher: PreTrainedModel | None, models: Mapping[str, PreTrainedModel], windows: Tensor
) -> dict[str, PerplexityScore]:
    """Score several models on the same windows; the teacher, if any, runs once for all of them.

    Logits are compared in float32 whatever the models' dtype, a few windows at a time.

    Args:
        windows: int64 [windows, length + 1].

    Raises:
        ValueError: a prediction of a model is not a number.
    """
    vocab_size = max(model.config.get_text_config().vocab_size for model in models.values())
    length = windows.shape[1] - 1
    sums = {name: [0.0, 0.0 if teacher is not None else math.nan] for name in models}
    for batch in windows.split(max(1, _MAX_LOGITS // (length * vocab_size))):
        teacher_log_probs = None if teacher is None else _log_probs(teacher, batch)
        for name, model in models.items():
            if teacher_log_probs is not None and model is teacher:
                log_probs = teacher_log_probs
            else:
                log_probs = _log_probs(model, batch)
            labels = batch[:, 1:].flatten().to(log_probs.device)
            sums[name][0] += nll_loss(log_probs, labels, reduction="sum").item()
            if teacher_log_probs is not None:
                theirs = teacher_log_probs.to(log_probs.device)
                sums[name][1] += (theirs.exp() * (theirs - log_probs)).sum().item()
    for name, (ce, kl) in sums.items():
        check_finite(models[name], math.isfinite(ce) and (teacher is None or math.isfinite(kl)))
    count = len(windows) * length
    return {name: PerplexityScore(ce / count, kl / count) for name, (ce, kl) in sums.items()}


def _log_probs(model: PreTrainedModel, batch: Tensor) -> Tensor:
    """Return float32 [windows * length, vocabulary], on the device of the model's head."""
    inputs = batch[:, :-1].to(model.device)
    return model(inputs, use_cache=False).logits.float().flatten(0, 1).log_softmax(-1)


def unigram_cross_entropy(
    training_windows: Tensor, windows: Tensor, vocab_size: int, smoothing: float = 1.0
) -> float:
    """Return the nats per token of the training text's word frequencies, with `smoothing` added to every count.

    A language model must at least beat this: it knows which words are frequent, and nothing else.
    """
    counts = torch.bincount(training_windows[:, 1:].flatten(), minlength=vocab_size).double() + smoothing
    return -(counts / counts.sum()).log()[windows[:, 1:]].mean().item()


def encode_sample(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids that a model continues: the prompt, begun as in training.

    Raises:
        ValueError: the prompt has no token.
    """
    ids = begun(encoded_by(tokenizer, [prompt])[0], leading_ids(tokenizer))
    if not ids:
        raise ValueError(f"--prompt {prompt!r} has no token to begin with; give a text")
    return ids


@torch.inference_mode()
def continue_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, num_tokens: int
) -> str:
    """Return what the model writes after `prompt`, greedily, `num_tokens` tokens at most."""
    ids = torch.tensor([encode_sample(tokenizer, prompt)], device=model.device)
    model.generation_config = plain_generation(end_ids(model, tokenizer), num_tokens)
    generate: Callable[..., Tensor] = model.generate  # type: ignore[assignment]  # annotated as a Tensor
    tokens = generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    return str(tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True))
