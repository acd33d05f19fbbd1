"""The results of several models side by side, for people."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_fdd.evaluate.perplexity import PerplexityScore
from megatron_fdd.evaluate.results import Evaluation

UNIGRAM = "unigram model"


def table(evaluations: Sequence[Evaluation]) -> str:
    """Return what was evaluated, with the models in the order in which they were given."""
    names = [evaluation.model.name for evaluation in evaluations]
    width = max(len(name) for name in [*names, UNIGRAM])
    parts = [make(evaluations, width) for make in (_answers, _texts, _tasks, _samples)]
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def _answers(evaluations: Sequence[Evaluation], width: int) -> list[str]:
    """Return ROUGE-L by file, mean and spread over the seeds, and the mean over the files."""
    files = evaluations[0].answers
    if not files:
        return []
    columns = {name: max(len(name), 13) for name in files}
    num_seeds = len(next(iter(files.values())).scores.by_seed)
    heads = "".join(f"  {name:>{column}}" for name, column in columns.items())
    lines = [f"{'ROUGE-L':{width}}{heads}    mean   ({num_seeds} seed{'s' * (num_seeds > 1)})"]
    for evaluation in evaluations:
        cells = ""
        for name, column in columns.items():
            scores = evaluation.answers[name].scores
            spread = "" if scores.spread is None else f" ± {scores.spread:.2f}"
            cells += f"  {f'{scores.mean:.2f}{spread}':>{column}}"
        lines.append(f"{evaluation.model.name:{width}}{cells}  {evaluation.mean_rouge_l:6.2f}")
    counts = "".join(f"  {len(result.data.examples):>{columns[name]}}" for name, result in files.items())
    lines.append(f"{'examples':{width}}{counts}")
    cut = max(sum(result.num_cut_prompts for result in e.answers.values()) for e in evaluations)
    if cut:
        lines.append(f"{cut} prompts were longer than --max-prompt-tokens and lost their end")
    return lines


def _texts(evaluations: Sequence[Evaluation], width: int) -> list[str]:
    first = evaluations[0].text
    if first is None:
        return []
    distance = "  KL(teacher || model)" if first.teacher else ""
    lines = [f"{'':{width}}  perplexity  cross-entropy{distance}   ({first.num_tokens} tokens)"]
    for evaluation in evaluations:
        assert evaluation.text is not None
        score = evaluation.text.score
        distance = f"  {score.kl_to_teacher:20.3f}" if first.teacher else ""
        lines.append(
            f"{evaluation.model.name:{width}}  {score.perplexity:10.1f}  {score.cross_entropy:13.3f}{distance}"
        )
    if first.unigram_cross_entropy is not None:
        unigram = PerplexityScore(first.unigram_cross_entropy, float("nan"))
        lines.append(f"{UNIGRAM:{width}}  {unigram.perplexity:10.1f}  {unigram.cross_entropy:13.3f}")
    return lines


def _tasks(evaluations: Sequence[Evaluation], width: int) -> list[str]:
    """Return a line for each measure of each task, and model."""
    lines = []
    for task, first in ((evaluations[0].tasks or {}).get("tasks") or {}).items():
        for measure in first["measures"]:
            lines.append(f"{task}, {measure} ({first['num_examples']} examples)")
            for evaluation in evaluations:
                found = (evaluation.tasks or {})["tasks"][task]["measures"].get(measure)
                if found is not None:
                    error = found["standard_error"]
                    spread = "" if error is None else f" ± {error:.4f}"
                    lines.append(f"{evaluation.model.name:{width}}  {found['value']:.4f}{spread}")
    return lines


def _samples(evaluations: Sequence[Evaluation], width: int) -> list[str]:
    lines = []
    for prompt in evaluations[0].samples:
        lines.append(f"Each continues {prompt!r}:")
        lines += [f"{e.model.name:{width}}  {e.samples[prompt]!r}" for e in evaluations]
    return lines
