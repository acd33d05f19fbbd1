"""One command's evaluation of several models: answers to instruction files, scores on a text, samples."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_fdd.evaluate.answers import Answer, AnswersFile, batches_by_length
from megatron_fdd.evaluate.data_file import DataFile
from megatron_fdd.evaluate.generation import Generator, Prompt, check_length, encode_prompts
from megatron_fdd.evaluate.models import NamedModel, num_positions
from megatron_fdd.evaluate.perplexity import (
    continue_text,
    cut_windows,
    encode_sample,
    read_texts,
    score_models,
    unigram_cross_entropy,
)
from megatron_fdd.evaluate.request import Request
from megatron_fdd.evaluate.results import VERSION, Evaluation, FileResult, TextResult
from megatron_fdd.evaluate.rouge import SeedScores, rouge_l
from megatron_fdd.host.bar import Bar
from megatron_fdd.host.disk import make_folder, writing


@dataclass(frozen=True, slots=True)
class TextWindows:
    """The text on which one model is scored: int64 [windows, length + 1]; `training` is for the unigram model."""

    tokenizer: PreTrainedTokenizerBase
    validation: Tensor | None = None
    training: Tensor | None = None


def evaluate(request: Request) -> list[Evaluation]:
    """Evaluate all models and write their files.

    One model is in memory at a time, on texts together with the teacher.

    Raises:
        ValueError: a part of the request is refused, existing answers were made with other settings, or --out
            cannot be written.
    """
    request.check()
    evaluations = [Evaluation(model) for model in request.models]
    # What a tokenizer alone can refuse is refused first, not after hours of generation.
    prompts = [_encode_all(model, request) for model in request.models]
    windows = _cut_all(request)
    make_folder("--out", request.out, request.out)
    for evaluation in evaluations:
        evaluation.place(request)
    with writing("--out", request.out):
        for evaluation, encoded in zip(evaluations, prompts, strict=True):
            if request.data:
                _answer_all(evaluation, encoded, request)
        if request.text.is_asked:
            _read_texts(evaluations, windows, request)
        if request.tasks.names:
            for evaluation in evaluations:
                model = request.placement.load(evaluation.model.folder)
                tokenizer = evaluation.model.tokenizer()
                evaluation.tasks = request.tasks.run(model, tokenizer, request.batch_size)
        for evaluation in evaluations:
            evaluation.write(request)
    return evaluations


def _encode_all(model: NamedModel, request: Request) -> dict[str, list[Prompt]]:
    """Return one model's prompts, by data file."""
    if not request.data:
        return {}
    tokenizer = model.tokenizer()
    prompts = {d.name: encode_prompts(d.examples, tokenizer, request.generation) for d in request.data}
    every = [prompt for several in prompts.values() for prompt in several]
    model.check_ids(max(max(prompt.ids) for prompt in every))
    check_length(every, request.generation.max_new_tokens, num_positions(model.config()))
    return prompts


def _answer_all(evaluation: Evaluation, prompts: dict[str, list[Prompt]], request: Request) -> None:
    """Answer every file with every seed; the model is loaded only if an answer is missing."""
    work = [
        (data, seed, _answers_file(evaluation.model, data, seed, request))
        for data in request.data
        for seed in request.generation.runs
    ]
    todo = [
        (data, seed, file, batch)
        for data, seed, file in work
        for batch in file.open_batches(batches_by_length(prompts[data.name], request.batch_size))
    ]
    if todo:
        model, tokenizer = request.placement.load(evaluation.model.folder), evaluation.model.tokenizer()
        generator = Generator(model, tokenizer, request.generation)
        num_left = sum(len(batch) for _, _, _, batch in todo)
        with Bar(total=num_left, desc=evaluation.model.name, unit="answer") as bar:
            for data, seed, file, batch in todo:
                bar.set_postfix_str(f"{data.name}, seed {seed}")
                file.append(_score(data, batch, generator.answer(batch, seed)))
                bar.update(len(batch))
    for data in request.data:
        by_seed = {}
        for seed, file in ((seed, file) for other, seed, file in work if other is data):
            scores = [answer.rouge_l for answer in file.finish(data.examples)]
            by_seed[seed] = sum(scores) / len(scores)
        num_cut = sum(prompt.is_cut for prompt in prompts[data.name])
        evaluation.answers[data.name] = FileResult(data, num_cut, SeedScores(by_seed))


def _score(data: DataFile, batch: list[Prompt], texts: list[str]) -> list[Answer]:
    return [
        Answer(prompt.number, text, rouge_l(data.examples[prompt.number].references, text))
        for prompt, text in zip(batch, texts, strict=True)
    ]


def _answers_file(model: NamedModel, data: DataFile, seed: int, request: Request) -> AnswersFile:
    """Open the answers of one model to one data file with one seed.

    Its settings are all that an answer depends on: not which examples are asked, nor how many at once.
    """
    settings = {
        "version": VERSION,
        "model": model.fingerprint(),
        "data": data.sha256,
        "format": data.layout,
        "seed": seed,
        **asdict(request.placement),
        **{
            key: value
            for key, value in asdict(request.generation).items()
            if key not in ("seeds", "chat_date")
        },
        "chat_date": str(request.generation.chat_date or ""),
    }
    return AnswersFile(request.out / model.name / "answers" / f"{data.name}.seed{seed}.jsonl", settings)


def _cut_all(request: Request) -> list[TextWindows]:
    """Return the text on which each model is scored, checked.

    With a teacher, all models have the teacher's tokens.
    """
    if not request.text.is_asked:
        return []
    if request.teacher is not None:
        windows = _cut(request.teacher, request)
        for model in request.models:
            check_known_tokens(model, windows)
        return [windows] * len(request.models)
    return [_cut(model, request) for model in request.models]


def check_known_tokens(model: NamedModel, windows: TextWindows) -> None:
    """Refuse a text with tokens that were added to the teacher's tokenizer but not to the model's.

    Raises:
        ValueError: names the first such token.
    """
    identity = model.identity()
    if identity is None or windows.validation is None:
        return
    unknown = sorted(set(windows.validation.unique().tolist()) - identity.token_of.keys())
    if unknown:
        token = windows.tokenizer.convert_ids_to_tokens(unknown[0])
        raise ValueError(
            f"--validation-text holds {token!r}, id {unknown[0]} of the teacher, which {model.name} does not have; "
            "leave such texts, --teacher or the model out"
        )


def _cut(model: NamedModel, request: Request) -> TextWindows:
    text, tokenizer = request.text, model.tokenizer()
    positions = min(num_positions(each.config()) for each in request.models)
    samples = [encode_sample(tokenizer, prompt) for prompt in text.prompts]
    text.check_length(positions, [len(ids) for ids in samples])
    model.check_ids(max((max(ids) for ids in samples), default=0))
    if text.validation is None:
        return TextWindows(tokenizer)
    validation = cut_windows(read_texts(text.validation), tokenizer, text.length, text.max_tokens)
    model.check_ids(int(validation.max()))
    training = None
    if text.training is not None:
        training = cut_windows(read_texts(text.training), tokenizer, text.length)
        model.check_ids(int(training.max()))
    return TextWindows(tokenizer, validation, training)


def _read_texts(evaluations: list[Evaluation], windows: list[TextWindows], request: Request) -> None:
    """Add scores and samples to the evaluations; the teacher stays in memory while the models change."""
    teacher = request.placement.load(request.teacher.folder) if request.teacher else None
    for evaluation, cut in zip(evaluations, windows, strict=True):
        _read_text(evaluation, teacher, cut, request)


def _read_text(
    evaluation: Evaluation, teacher: PreTrainedModel | None, windows: TextWindows, request: Request
) -> None:
    if teacher is not None and evaluation.model == request.teacher:
        model = teacher
    else:
        model = request.placement.load(evaluation.model.folder)
    text, name = request.text, evaluation.model.name
    if text.validation is not None:
        assert windows.validation is not None
        unigram = None
        if windows.training is not None:
            vocab_size = model.config.get_text_config().vocab_size
            unigram = unigram_cross_entropy(windows.training, windows.validation, vocab_size)
        evaluation.text = TextResult(
            file=text.validation,
            length=text.length,
            num_tokens=windows.validation[:, 1:].numel(),
            score=score_models(teacher, {name: model}, windows.validation)[name],
            teacher=str(request.teacher.folder) if request.teacher else None,
            unigram_cross_entropy=unigram,
        )
    evaluation.samples = {
        prompt: continue_text(model, windows.tokenizer, prompt, text.num_sample_tokens)
        for prompt in text.prompts
    }
