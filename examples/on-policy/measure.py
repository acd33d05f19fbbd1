"""KL(teacher || student) on answers, of the student's own and of given ones; and the table over all rounds.

    python examples/on-policy/measure.py --teacher DIR --model DIR --own FILE --given FILE \
        --template none --seq-length 256 --work WORK --student 1

The tokens are those of `fdd prepare`, and the mean is over those that it marks as learned. Both models run here, by
transformers: on all visible GPUs, or on the CPU. The table of all WORK/student-*/measured.json is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_fdd.data.chat_template import ChatSettings
from megatron_fdd.data.encode import Encoded, EncodeSettings
from megatron_fdd.data.instructions import TEMPLATES
from megatron_fdd.data.prepare import PrepareSettings, look
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.evaluate.models import NamedModel, Placement
from megatron_fdd.host.disk import explain

# One batch's logits hold at most this many numbers (64 MiB in float32), unless one answer has more.
_MAX_LOGITS = 2**24


def encode(file: Path, given: argparse.Namespace) -> list[Encoded]:
    """Return the samples of a file of records, as training reads them; those without an answer are left out."""
    records = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    if not any(record.get("response") or record.get("output") for record in records):
        return []
    settings = EncodeSettings(
        tokenizer=TokenizerSettings("HuggingFaceTokenizer", str(given.model)),
        format="instruction",
        seq_length=given.seq_length,
        template=given.template,
        chat=ChatSettings(given.chat_template_kwargs, turns="last"),
    )
    _, samples, _ = look(PrepareSettings((str(file),), "", settings, skip_refused=True, show=sys.maxsize))
    return samples


@torch.inference_mode()
def mean_kl(
    teacher: PreTrainedModel, student: PreTrainedModel, samples: Sequence[Encoded]
) -> tuple[float | None, int]:
    """Return the mean over learned tokens, in nats, and their number; None without a token.

    B samples of at most S tokens stand in a batch, padded on the right, which no real token sees.
    """
    vocab_size = student.config.get_text_config().vocab_size
    total, count = 0.0, 0
    ordered = sorted(samples, key=lambda sample: -len(sample.ids))
    while ordered:
        length = len(ordered[0].ids)
        num_rows = max(1, _MAX_LOGITS // (length * vocab_size))
        batch, ordered = ordered[:num_rows], ordered[num_rows:]
        ids_BS = torch.zeros(len(batch), length, dtype=torch.int64)
        mask_BS = torch.zeros(len(batch), length, dtype=torch.bool)
        for row, sample in enumerate(batch):
            assert sample.loss_mask is not None
            ids_BS[row, : len(sample.ids)] = torch.from_numpy(sample.ids)
            mask_BS[row, : len(sample.ids)] = torch.from_numpy(sample.loss_mask)
        theirs, ours = (_log_probs(model, ids_BS, mask_BS) for model in (teacher, student))
        total += (theirs.exp() * (theirs - ours.to(theirs.device))).sum(dtype=torch.float64).item()
        count += len(theirs)
    return (total / count if count else None), count


def _log_probs(model: PreTrainedModel, ids_BS: Tensor, mask_BS: Tensor) -> Tensor:
    """Return float32 [learned tokens, vocabulary]: the predictions of the learned tokens."""
    logits = model(ids_BS[:, :-1].to(model.device), use_cache=False).logits
    return logits[mask_BS[:, 1:].to(logits.device)].float().log_softmax(-1)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return KL and tokens on the student's own answers and on the given ones.

    Raises:
        ValueError: the models have different vocabularies; or a file cannot be read.
    """
    models = [NamedModel("teacher", given.teacher), NamedModel("student", given.model)]
    for named in models:
        named.check()
    sizes = [named.config().vocab_size for named in models]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{given.model} has {sizes[1]} words and the teacher {sizes[0]}: they are compared word by word; "
            "give models of one vocabulary, or MEASURE=0"
        )
    placement = Placement.choose(None, None)
    teacher, student = (placement.load(named.folder) for named in models)
    found: dict[str, Any] = {}
    for name, file in (("own", given.own), ("given", given.given)):
        samples = encode(file, given)
        kl, tokens = mean_kl(teacher, student, samples)
        found[name] = {"kl": kl, "tokens": tokens, "answers": len(samples)}
    return found


def table(measured: dict[int, dict[str, Any]]) -> str:
    """Return what was measured of each student, by the number of rounds behind it, as a table of Markdown."""
    lines = [
        "| student | KL to the teacher: own text | answers | tokens | given text | answers | tokens |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for number, found in sorted(measured.items()):
        cells = ["start" if number == 0 else f"after round {number}"]
        for text in (found["own"], found["given"]):
            kl = "-" if text["kl"] is None else f"{text['kl']:.4f}"
            cells += [kl, str(text["answers"]), str(text["tokens"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Write a text; the file is whole when it has its name."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main() -> int:
    """Measure, write, and print the table; 1 and one line if something is refused."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--teacher", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the student")
    parser.add_argument("--own", type=Path, required=True, help="held-out prompts with the student's answers")
    parser.add_argument("--given", type=Path, required=True, help="held-out prompts with the given answers")
    parser.add_argument("--template", choices=TEMPLATES, required=True, help="of both files")
    parser.add_argument("--chat-template-kwargs", type=json.loads, default={}, help="JSON, for chats")
    parser.add_argument("--seq-length", type=int, required=True, help="longer records are cut")
    parser.add_argument("--work", type=Path, required=True, help="WORK of run.sh")
    parser.add_argument("--student", type=int, required=True, help="the number of rounds behind it")
    given = parser.parse_args()
    try:
        write(
            given.work / f"student-{given.student}/measured.json", json.dumps(measure(given), indent=2) + "\n"
        )
    except (ValueError, OSError) as error:
        print(f"measure: error: {explain(error)}", file=sys.stderr)
        return 1
    files = given.work.glob("student-*/measured.json")
    measured = {
        int(file.parent.name.removeprefix("student-")): json.loads(file.read_text()) for file in files
    }
    text = table(measured)
    write(given.work / "own-text.md", text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
