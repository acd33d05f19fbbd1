"""Teachers of architectures that are no GPTModel, by `fdd teach --engine transformers`; float64 has the last word.

The reference runs each document alone through the folders of teacher and student, in transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.tiny_teachers import tiny_model
from megatron_fdd.convert import mcore_to_hf
from megatron_fdd.data.batch import Batch
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.step import student
from tests.convert import toys
from tests.entry.command import call_main, read_metrics, teach_by_transformers
from tests.entry.conftest import Toys, write_text
from tests.harness.ranks import Layout, clean_megatron, run_on_ranks
from tests.oracle import reference

# S tokens, V words

# Latent attention and experts; attention sinks, windows shorter than the documents, and experts; no attention.
TEACHERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {},
    "gpt_oss": {"sliding_window": 6},
    "mamba": {},
}
PAIRS = ((2, 1), (3, 3))  # blocks of student and teacher
STEPS = 2
RUN = f"--seq-length 48 --dataloader-inter-document-masking --train-iters {STEPS} --save-interval 1".split()
# Float32 against float64: 1.1e-6 was measured, for Mamba, whose sums are the longest.
SAME_LOSSES = 5e-6


@pytest.fixture(scope="module")
def documents(toy: Toys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepare documents of 10 to 40 tokens, each with an end."""
    folder = tmp_path_factory.mktemp("documents")
    write_text(folder / "text.txt")
    tokenizer = TokenizerSettings("HuggingFaceTokenizer", str(toy.tokenizer))
    encode = EncodeSettings(tokenizer, "text", append_eod=True)
    settings = PrepareSettings(
        (str(folder / "text.txt"),), str(folder / "text"), encode, separator="blank-line"
    )
    prepare(settings)
    return folder / "text"


@pytest.mark.tier("all")
@pytest.mark.parametrize(
    "model_type",
    ["gpt_oss", "deepseek_v3", "mamba"],
)
def test_a_student_learns_from_another_architecture(
    model_type: str, toy: Toys, documents: Path, tmp_path: Path
) -> None:
    teacher, store, save = tmp_path / "teacher", tmp_path / "store", tmp_path / "run"
    size = toys.SHAPE["vocab_size"]
    tiny_model(model_type, vocab_size=size, **TEACHERS[model_type]).save_pretrained(teacher)
    toys.make_tokenizer(teacher)
    pairs = ",".join(f"{s}:{t}" for s, t in PAIRS)
    places = ("--data-path", documents, "--save", save, "--fdd-metrics-file", tmp_path / "metrics")
    flags = toy.command(*RUN, "--fdd-layer-pairs", pairs, *places)
    done = teach_by_transformers(
        "--teacher", teacher, "--store", store, "--form", "float32", "--device-map", "cpu", *flags
    )
    assert done.returncode == 0, done.stderr
    at = flags.index("--teacher-load")
    flags[at : at + 2] = ["--fdd-teacher-store", str(store)]
    [texts] = run_on_ranks(train_and_export, Layout(ranks=1), {"command": flags, "save": save})
    students = [toy.root / "student-hf", *(save / f"hf{step}" for step in range(1, STEPS))]
    records = read_metrics(tmp_path / "metrics")
    for record, folder, step_texts in zip(records, students, texts, strict=True):
        wanted = expected_means(Model(teacher), Model(folder), step_texts)
        assert {name: record[name] for name in wanted} == pytest.approx(wanted, rel=SAME_LOSSES)


Text = tuple[Tensor, Tensor]  # ids [S] and loss mask [S] of a document


def train_and_export(command: list[str], save: Path) -> list[list[Text]]:
    """Train on one rank, and write the student after each step but the last as a folder of transformers.

    Returns:
        The documents of each step.
    """
    texts: list[list[Text]] = []
    get_batch = student.get_batch

    def watched(*arguments: Any) -> Batch:
        batch = get_batch(*arguments)
        assert batch.packed is not None
        lengths = batch.packed.cu_seqlens_q.diff().tolist()
        cut = (each_BS[0].split(lengths) for each_BS in (batch.tokens_BS, batch.loss_mask_BS))
        texts.append(list(zip(*cut, strict=True)))
        return batch

    with patch.object(student, "get_batch", watched):
        ending = call_main(command)
    assert ending.status == 0, ending.err
    clean_megatron()
    for step in range(1, STEPS):
        mcore_to_hf(save, save / f"hf{step}", ckpt_step=step)
    of_a_step = len(texts) // STEPS
    return [sum(texts[first : first + of_a_step], []) for first in range(0, len(texts), of_a_step)]


class Model:
    """A folder in transformers, in float64 as far as its code goes, without fast paths for attention and experts."""

    def __init__(self, folder: Path) -> None:
        self._is_mamba = AutoConfig.from_pretrained(folder).model_type == "mamba"
        plain = {} if self._is_mamba else {"attn_implementation": "eager", "experts_implementation": "eager"}
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **plain)
        self._num_words = len(AutoTokenizer.from_pretrained(folder))  # ids that all share

    @torch.no_grad()
    def read(self, ids_S: Tensor, blocks: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Return the logits [S, V] of a text, and those that norm and head make of inner blocks, 1-based."""
        out, inner = self._model(input_ids=ids_S[None], output_hidden_states=True), self._model.base_model
        # Mamba's states begin with the first block's, others with the embedding; the last one is normed in all.
        states = out.hidden_states if self._is_mamba else out.hidden_states[1:]
        norm = inner.norm_f if self._is_mamba else inner.norm
        inner_logits = [self._model.lm_head(norm(states[block - 1])) for block in blocks]
        final_SV, *others = [logits[0, :, : self._num_words] for logits in (out.logits, *inner_logits)]
        return final_SV, others


def expected_means(teacher: Model, learner: Model, texts: Sequence[Text]) -> dict[str, float]:
    """Return the token means of all terms over some documents."""
    values = []
    for ids_S, mask_S in texts:
        z_S, inner_S = learner.read(ids_S, [s for s, _ in PAIRS])
        z_T, inner_T = teacher.read(ids_S, [t for _, t in PAIRS])
        steps = [second.log_softmax(-1) - first.log_softmax(-1) for first, second in (inner_T, inner_S)]
        terms = [fkl(z_T, z_S), *map(fkl, inner_T, inner_S), 1 - F.cosine_similarity(*steps, dim=-1)]
        values.append(torch.stack(terms)[:, mask_S > 0])
    kd, *trajectory, delta = torch.cat(values, 1).mean(1).tolist()
    means = {f"trajectory s{s}:t{t}": value for (s, t), value in zip(PAIRS, trajectory, strict=True)}
    return {**means, "kd": kd, "delta": delta, "total": kd + sum(trajectory) / len(PAIRS) + delta}


def fkl(teacher_SV: Tensor, student_SV: Tensor) -> Tensor:
    return reference.divergence("fkl", None, 1.0, teacher_SV, student_SV)
