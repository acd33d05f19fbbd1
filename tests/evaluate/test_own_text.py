"""The text of rounds on a student's own answers (examples/on-policy): prompts, mixing, what is measured."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_fdd.data.encode import Encoded
from megatron_fdd.evaluate.generation import example_seed
from megatron_fdd.evaluate.models import Placement
from tests.convert.toys import make_llama

FOLDER = Path(__file__).parents[2] / "examples/on-policy"
sys.path.insert(0, str(FOLDER))

import measure  # noqa: E402
import prompts  # noqa: E402
import rounds  # noqa: E402
import vllm_answers  # noqa: E402

CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "toy")


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(
    script: Any, words: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Run a script's `main` with these words; return its status and what it printed."""
    monkeypatch.setattr(sys, "argv", ["script", *map(str, words)])
    status = script.main()
    return (status, *capsys.readouterr())


@pytest.mark.parametrize(
    ("fields", "template", "record"),
    [
        ({"prompt": "q", "response": "a"}, "none", {"prompt": "q", "response": "a"}),
        ({"prompt": "q"}, "alpaca", {"prompt": "q", "response": ""}),
        ({"instruction": "q", "input": "i"}, "none", {"prompt": "q\n\ni", "response": ""}),
        ({"instruction": "q", "response": "a"}, "none", {"prompt": "q", "response": "a"}),
        ({"question": "q", "answer": "a"}, "chat", {"instruction": "q", "input": "", "output": "a"}),
        ({"messages": CHAT}, "chat", {"instruction": "q", "input": "", "system": "s", "output": ""}),
        (
            {"messages": [*ANSWERED, {"role": "user", "content": "r"}]},
            "chat",
            {"instruction": "r", "input": "", "system": "s", "history": [["q", "a"]], "output": ""},
        ),
        ({"messages": ANSWERED}, "chat", {"instruction": "q", "input": "", "system": "s", "output": "a"}),
    ],
)
def test_a_prompt_may_come_in_any_layout_and_without_its_answer(
    fields: dict[str, Any], template: Any, record: dict[str, Any], tmp_path: Path
) -> None:
    [prompt] = prompts.read_prompts(write(tmp_path / "p.jsonl", fields))
    assert prompt.record(template) == record


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": "q"}, r"p.jsonl, line 1: has the fields \['text'\], which hold no prompt"),
        ({"messages": ANSWERED[1:] * 2 + ANSWERED[2:]}, r"p.jsonl, line 1: its turns are \['user', 'assistant', 'us"),
        ({"messages": CHAT, "enable_thinking": True}, "p.jsonl, line 1: has tools, reasoning or switches"),
        ({"instruction": "q", "answer": "a"}, "p.jsonl, line 1: has an answer in 'answer', where records with"),
        ({"instruction": "q", "input": "i", "response": "a"}, "line 1: has an answer in 'response', where"),
        ({"instruction": " ", "context": "", "response": "a"}, "p.jsonl, line 1: its prompt is empty"),
    ],
)  # fmt: skip
def test_a_record_without_a_prompt_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prompts.read_prompts(write(tmp_path / "p.jsonl", fields))


def test_prompts_are_counted_and_divided(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nine prompts: one twice, one too long, the longest other one just fits, three held out."""
    records = [{"prompt": "the quick " * number, "response": "fox"} for number in range(1, 9)]
    file = write(tmp_path / "p.jsonl", *records, records[2] | {"response": "dog"}, {"prompt": "fox " * 40})
    words = ["--input", file, "--hf-model", model, "--template", "none", "--max-new-tokens", 6, "--seed", 1]
    words += ["--seq-length", 23, "--out", tmp_path / "out"]
    given = [*words, "--held-out", 3, "--own-fraction", 1]
    status, out, _ = run(prompts, given, monkeypatch, capsys)
    assert (status, out) == (
        0,
        f"prompts that came before, taken once: 1 ({file}, line 9)\n"
        f"prompts that leave less than 6 of 23 tokens for an answer, left out: 1 ({file}, line 10)\n"
        "5 prompts to train on, 3 held out\n",
    )
    train, held_out = (read(tmp_path / f"out/{name}.jsonl") for name in ("train", "held-out"))
    assert sorted(map(str, [*train, *held_out])) == sorted(map(str, records))


def test_prompts_that_cannot_make_a_round_are_refused_in_one_line(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = write(tmp_path / "a.jsonl", *({"prompt": f"fox {n}", "response": "a"} for n in range(3)))
    silent = write(tmp_path / "s.jsonl", *({"prompt": f"fox {n}"} for n in range(3)))
    words = [
        "--hf-model",
        model,
        "--template",
        "none",
        "--max-new-tokens",
        6,
        "--seed",
        1,
        "--seq-length",
        30,
    ]
    for file, held_out, fraction, message in (
        (answered, 3, 1, "3 prompts can be used and HELD_OUT=3: hold out at least one and fewer than all"),
        (answered, 0, 1, "3 prompts can be used and HELD_OUT=0"),
        (silent, 1, 0.5, "prompts without an answer: 2 ("),
        (write(tmp_path / "e.jsonl"), 1, 1, "e.jsonl is empty: give a file with a prompt in each line"),
        (tmp_path / "nowhere", 1, 1, f"{tmp_path}/nowhere"),
    ):
        more = [
            "--input",
            file,
            "--held-out",
            held_out,
            "--own-fraction",
            fraction,
            "--out",
            tmp_path / "out",
        ]
        status, _, error = run(prompts, [*words, *more], monkeypatch, capsys)
        assert status == 1
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_every_prompt_has_its_turn_and_rounds_differ_by_their_answers_only() -> None:
    records = [{"prompt": str(number), "response": "a"} for number in range(10)]
    seen = []
    for number in range(1, 6):
        own, given = rounds.chosen(records, number, 4, 0.5, seed=1)
        assert (len(own), len(given)) == (2, 2)
        every, none = rounds.chosen(records, number, 4, 1.0, seed=1)
        assert every == [*own, *given]
        assert not none
        seen += every
    assert set(Counter(record["prompt"] for record in seen).values()) == {2}
    assert seen[:10] != seen[10:]
    assert rounds.chosen(records, 1, 4, 1.0, seed=2) != rounds.chosen(records, 1, 4, 1.0, seed=1)


def test_an_answer_that_ends_at_once_gives_way_to_the_given_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = write(
        tmp_path / "own.jsonl",
        *({"prompt": name, "response": text} for name, text in ("pa", "qb", ("r", ""))),
    )
    given = write(tmp_path / "given.jsonl", {"prompt": "s", "response": "c"})
    texts = ["mine", " ", ""]
    answered = [{"number": number, "answer": text, "rouge_l": 0.0} for number, text in enumerate(texts)]
    answers = write(tmp_path / "answers.jsonl", {"settings": {}}, *answered)
    words = ["mix", "--own", own, "--answers", answers, "--out", tmp_path / "text.jsonl"]
    status, out, _ = run(rounds, [*words, "--given", given], monkeypatch, capsys)
    assert status == 0
    assert out == (
        "answers that end at once, 1 with the given one in their place, 1 left out: 2 "
        f"({own}, line 2, {own}, line 3)\n"
        "1 answers of the student, 3 records in all\n"
    )
    assert read(tmp_path / "text.jsonl") == [
        {"prompt": "p", "response": "mine"},
        {"prompt": "q", "response": "b"},
        {"prompt": "s", "response": "c"},
    ]
    run(rounds, words, monkeypatch, capsys)  # what is measured is the student's own
    assert read(tmp_path / "text.jsonl") == [{"prompt": "p", "response": "mine"}]
    write(answers, {"settings": {}}, *(each | {"answer": ""} for each in answered))
    status, _, error = run(rounds, words, monkeypatch, capsys)
    assert status == 1
    assert "all 3 answers of the student end at once" in error
    assert "take more of those (HELD_OUT), or do without the table (MEASURE=0)" in error


def test_kl_is_the_mean_over_what_is_learned(model: Path, tmp_path: Path) -> None:
    """The reference reads each sample alone, in float64."""
    other = make_llama(tmp_path / "other", num_hidden_layers=2)
    teacher, student = (Placement("cpu", "float32").load(folder) for folder in (model, other))
    rng = np.random.default_rng(0)
    samples = []
    for length in (5, 9, 3):
        ids, mask = rng.integers(3, 60, length).astype(np.int32), np.zeros(length, np.uint8)
        mask[length // 2 :] = 1
        samples.append(Encoded(ids, mask))
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in samples:
            ids = torch.from_numpy(sample.ids.astype(np.int64))[None]
            theirs, ours = (each(ids).logits[0].double().log_softmax(-1) for each in (teacher, student))
            for place in np.flatnonzero(sample.loss_mask):
                total += (theirs[place - 1].exp() * (theirs[place - 1] - ours[place - 1])).sum().item()
                count += 1
    kl, tokens = measure.mean_kl(teacher, student, samples)
    assert tokens == count
    assert kl == pytest.approx(total / count, rel=1e-5)
    assert measure.mean_kl(teacher, student, []) == (None, 0)


def test_vllm_gets_token_ids_and_goes_on_where_it_was(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stand-in for vLLM: it never ran here."""
    asked: list[tuple[list[int], SimpleNamespace]] = []

    class LLM:
        def __init__(self, **arguments: Any) -> None:
            assert arguments == {"model": str(model), "tensor_parallel_size": 2}

        def generate(self, batch: list[dict[str, Any]], parameters: list[SimpleNamespace]) -> list[Any]:
            asked.extend(zip((each["prompt_token_ids"] for each in batch), parameters, strict=True))
            return [
                SimpleNamespace(outputs=[SimpleNamespace(text=f" {len(each['prompt_token_ids'])}")])
                for each in batch
            ]

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    file = write(tmp_path / "own.jsonl", *({"prompt": "fox " * n, "response": ""} for n in (1, 2, 3)))
    words = [
        "--hf-model",
        f"own={model}",
        "--data",
        f"prompts={file}",
        "--out",
        tmp_path,
        "--template",
        "none",
    ]
    words += ["--seeds", 7, "--temperature", 0.5, "--max-prompt-tokens", 20, "--max-new-tokens", 5]
    words += ["--engine-args", '{"tensor_parallel_size": 2}']
    assert run(vllm_answers, words, monkeypatch, capsys)[0] == 0
    lines = read(tmp_path / "own/answers/prompts.seed7.jsonl")
    assert [(line["number"], line["answer"]) for line in lines[1:]] == [(0, "2"), (1, "3"), (2, "4")]
    assert [len(ids) for ids, _ in asked] == [4, 3, 2]
    expected = {"temperature": 0.5, "top_p": 1.0, "max_tokens": 5, "seed": example_seed(7, 2) % 2**31}
    assert vars(asked[0][1]) == expected
    assert run(vllm_answers, words, monkeypatch, capsys)[0] == 0
    assert len(asked) == 3
    monkeypatch.setitem(sys.modules, "vllm", None)
    status, _, error = run(vllm_answers, [*words, "--seeds", 8], monkeypatch, capsys)
    assert status == 1
    assert "GENERATE=vllm: vllm cannot be imported" in error
