"""The model card of an export: what is known is told, and nothing else."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from megatron_fdd import convert
from megatron_fdd.convert.checksums import Checksums
from megatron_fdd.convert.model_card import CardSubject, model_card
from tests.convert import mcore, toys
from tests.harness.ranks import distributed

WRITTEN = Checksums("bfloat16", {"a": "0", "b": "1"})


def _subject(load: Path, **args: object) -> CardSubject:
    return CardSubject("mine", load, 6, Namespace(**args), toys.llama_config(), WRITTEN)


def test_only_what_is_known(tmp_path: Path) -> None:
    card = model_card(_subject(tmp_path))
    head = yaml.safe_load(card.split("---\n")[1])
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["megatron-fdd"],
    }
    assert "# license:\n" in card
    assert "| model | LlamaForCausalLM, 3 layers, 48 wide, 99 words |\n" in card
    assert "| weights | 2 tensors, bfloat16; " in card
    assert "| iteration | 6 |\n" in card
    for absent in ("base model", "teacher", "samples", "## ", "None"):
        assert absent not in card


def test_a_distillation(tmp_path: Path) -> None:
    source = tmp_path / "home/teacher/hf"
    source.mkdir(parents=True)
    toys.write_json(source / "config.json", toys.llama_config(num_hidden_layers=8))
    (source / "checksums.json").write_text("{}")
    flags = {
        "fdd_layers": 4,
        "fdd_alpha": 1.0,
        "fdd_beta": 0.5,
        "fdd_temperature": 2.0,
        "fdd_lens_head": "detached",
    }
    paths = {"teacher_load": str(source.parent), "teacher_lens": "/home/me/lens.safetensors"}
    more = {
        "pretrained_checkpoint": "/home/me/small",
        "train_iters": 9,
        "consumed_train_samples": 4800,
        "lr": 0.001,
    }
    card = model_card(_subject(tmp_path, **flags, **paths, **more, train_data_path=["0.3", "/home/me/gone"]))
    assert yaml.safe_load(card.split("---\n")[1])["tags"] == ["megatron-fdd", "knowledge-distillation"]
    empty = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    for line in (
        f"teacher | `teacher`: LlamaForCausalLM, 8 layers, 48 wide, 99 words; SHA-256 of its `checksums.json`: {empty}",
        "base model | `small`",
        "iteration | 6 of 9",
        "samples seen | 4,800",
        "`--fdd-beta` | 0.5",
        "`--fdd-temperature` | 2.0",
        "`--teacher-lens` | lens.safetensors",
        "`--lr` | 0.001",
    ):
        assert f"| {line} |\n" in card
    for absent in ("/home", str(tmp_path), "## Data", "lens-head", "gone"):
        assert absent not in card


def test_stored_teachers_by_name(tmp_path: Path) -> None:
    card = model_card(_subject(tmp_path, fdd_teacher_store=["code=/stores/one", "maths=/stores/two"]))
    assert "| teacher | stored features `one` (code) |\n| teacher | stored features `two` (maths) |\n" in card


@pytest.mark.parametrize(("theirs", "told"), [("1", True), ("2", False)])
def test_scores_of_exactly_these_weights(tmp_path: Path, theirs: str, told: bool) -> None:
    (tmp_path / "evaluation/mine").mkdir(parents=True)
    Checksums("bfloat16", {"a": "0", "b": theirs}).write(tmp_path)
    text = {"file": "/data/valid.jsonl", "num_tokens": 1920, "perplexity": 8.125, "kl_to_teacher": None}
    answers = {"dolly": {"num_examples": 20, "rouge_l": {"mean": 31.416, "by_seed": {"10": 31.416}}}}
    toys.write_json(
        tmp_path / "evaluation/mine/evaluation.json",
        {"version": 1, "model": str(tmp_path), "text": text, "answers": answers},
    )
    card = model_card(_subject(tmp_path))
    assert ("| `valid.jsonl` | perplexity, 1,920 tokens | 8.125 |\n" in card) == told
    assert ("| dolly | ROUGE-L, 20 examples, 1 seed | 31.42 |\n" in card) == told
    assert ("## Scores" in card) == told
    assert "KL" not in card


@pytest.mark.tier("default")
@distributed(tp=1)
def test_a_converted_model_and_an_id_that_it_does_not_have(tmp_path: Path) -> None:
    mcore.make_checkpoint(tmp_path, "plain")
    assert convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "one").remark.count("warning") == 0
    card = (tmp_path / "one/README.md").read_text()
    assert "\n# one\n" in card
    assert "iteration" not in card
    config = tmp_path / "mcore/hf/generation_config.json"
    config.write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 99]}))
    remark = convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "two").remark.splitlines()[-1]
    assert remark == (
        "warning: generation_config.json: eos_token_id is [2, 99], and the ids of the model are 0 to 98; correct it "
        "before you generate"
    )
    config.write_text("{")
    with pytest.raises(
        ValueError, match=r"generation_config.json is not valid JSON: .*; copy or make it again"
    ):
        convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "three")
    assert not (tmp_path / "three").exists()
