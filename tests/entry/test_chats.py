"""From a file of chats to one training step: it computes what transformers computes on the learned tokens.

The learned parts were written by hand (`chats`); their positions are counted here without the package. Expected losses
and gradients are those of `AutoModelForCausalLM` in float64, for one sample at a time.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from megatron_fdd import convert
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.convert import toys
from tests.data.chat_templates import FAMILIES
from tests.data.conftest import sentences, write_jsonl
from tests.entry.chats import BEHAVIOURS, TOOL, Chat
from tests.entry.checks import metrics
from tests.entry.command import COMMON, trained
from tests.entry.conftest import STUDENT, TEACHER
from tests.harness.ranks import Layout, run_on_ranks

# N learned tokens, H hidden, V the tokenizer's vocabulary, L positions of a sample

# There are more rows than the tokenizer has tokens; the losses ignore these rows.
SIZES = {"vocab_size": 403, "max_position_embeddings": 512}
# No text has the end-of-document token: in these templates another token ends a turn.
SPECIAL = (
    "<|endoftext|> <|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|im_start|> <|im_end|> [gMASK] "
    "<sop> <|system|> <|user|> <|assistant|> <|observation|>"
).split()
MARKERS = "<think> </think> <tool_call> </tool_call>".split()
KD, CE, ALPHA = 0.5, 0.25, 0.7
# Blocks of student and teacher (from 1) that `--fdd-layers 2` pairs; the student's are on the first of two stages.
PAIRS = ((1, 2), (2, 4))
# The rate of one step of plain descent, so large that the change of the weights shows the gradient.
LR = 100.0
STEP = (
    f"--fdd-kd-weight {KD} --fdd-ce-weight {CE} --fdd-alpha {ALPHA} --fdd-beta 0 --train-iters 1 --optimizer sgd "
    f"--sgd-momentum 0 --weight-decay 0 --clip-grad 1e9 --lr {LR} --lr-warmup-iters 0 --lr-decay-style constant "
    "--save-interval 1 --no-save-optim --finetune --split 100,0,0 --tokenizer-type HuggingFaceTokenizer"
).split()
LAYOUTS = {
    "packed-pp2": (2, "--pipeline-model-parallel-size 2 --dataloader-inter-document-masking"),
    "pp2-cp2": (4, "--pipeline-model-parallel-size 2 --context-parallel-size 2"),
}


@dataclass(frozen=True)
class Expected:
    """The expected result of one step on all samples of a behaviour.

    Attributes:
        lengths: number of inputs of each sample, which are its tokens except the last.
        tokens: number of learned tokens.
        means: terms by their names in the metrics file.
        gradient: gradient of the weighted terms, by parameter.
    """

    lengths: list[int]
    tokens: int
    means: dict[str, float]
    gradient: dict[str, Tensor] = field(repr=False)


def make_tokenizer(folder: Path, template: str) -> None:
    """Make a byte-level tokenizer with the special tokens of every family."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=390, special_tokens=SPECIAL, initial_alphabet=alphabet)
    bpe.train_from_iterator([*sentences(200), *[json.dumps(TOOL)] * 10], trainer)
    bpe.add_tokens(MARKERS)
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **ends)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


def make_models(root: Path) -> None:
    """Make, on one rank, teacher and student as Hugging Face models (`NAME-hf`) and as Megatron checkpoints."""
    for name, changes in (("teacher", TEACHER), ("student", STUDENT)):
        folder = toys.make_llama(root / f"{name}-hf", tokenizer=False, **changes, **SIZES)
        make_tokenizer(folder, "")
        convert.hf_to_mcore(folder, root / name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the models and, for each behaviour, a prepared set (`NAME`) and its tokenizer (`NAME-tokenizer`)."""
    root = tmp_path_factory.mktemp("chats")
    run_on_ranks(make_models, Layout(ranks=1), {"root": root})
    for name, (family, chats) in BEHAVIOURS.items():
        make_tokenizer(root / f"{name}-tokenizer", FAMILIES[family].text)
        path = write_jsonl(root / f"{name}.jsonl", [chat.row for chat in chats])
        tokenizer = TokenizerSettings("HuggingFaceTokenizer", str(root / f"{name}-tokenizer"))
        prepare(PrepareSettings((path,), str(root / name), EncodeSettings(tokenizer, "instruction")))
    return root


def check_texts(tokenizer: Any, chat: Chat) -> None:
    """Check that the texts by hand are the template's: the prompt before the last answer, and the conversation."""
    messages, tools = chat.row["messages"], chat.row.get("tools")
    for count, marked in chat.samples.items():
        last = re.fullmatch(".*⟦([^⟧]*)⟧", marked, re.DOTALL)[1]
        text = re.sub("[⟦⟧]", "", marked)
        prompt = tokenizer.apply_chat_template(
            messages[: count - 1], tools=tools, tokenize=False, add_generation_prompt=True
        )
        assert text.removesuffix(last) == prompt
        whole = tokenizer.apply_chat_template(messages[:count], tools=tools, tokenize=False)
        assert text.startswith(whole.rstrip())


def positions(tokenizer: Any, marked: str) -> tuple[Tensor, Tensor]:
    """Return the ids of a text without its marks, [L], and the places of the ids between marks, [N].

    The letters of each token, one token after the other, show which part of the text it stands for.
    """
    pieces = re.split("[⟦⟧]", marked)
    inside = [place % 2 == 1 for place, piece in enumerate(pieces) for _ in piece]
    ids = tokenizer("".join(pieces), add_special_tokens=False).input_ids
    spelled, learned = "", []
    for place, token in enumerate(ids):
        start, spelled = len(spelled), spelled + tokenizer.decode([token])
        if all(inside[start : len(spelled)]):
            learned.append(place)
    assert spelled == "".join(pieces)
    return torch.tensor(ids), torch.tensor(learned)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")


def divergence(teacher_NV: Tensor, student_NV: Tensor) -> Tensor:
    """Return KL(teacher || student), summed over tokens."""
    return F.kl_div(student_NV.log_softmax(-1), teacher_NV.log_softmax(-1), reduction="sum", log_target=True)


def lens(model: Any, hidden_NH: Tensor, size: int) -> Tensor:
    """Return logits of a block's output, [N, V]; norm and head are constants."""
    norm, head_VH = model.model.norm, model.lm_head.weight[:size].detach()
    normed_NH = F.rms_norm(hidden_NH, hidden_NH.shape[-1:], norm.weight.detach(), norm.variance_epsilon)
    return normed_NH @ head_VH.T


def sums_of_terms(teacher: Any, student: Any, ids: Tensor, learned: Tensor, size: int) -> dict[str, Tensor]:
    """Return the sums of the terms for one sample; the logits at a position predict the next token."""
    with torch.no_grad():
        taught = teacher(ids[None], output_hidden_states=True)
    said = student(ids[None], output_hidden_states=True)
    teacher_NV, student_NV = (each.logits[0, learned - 1, :size] for each in (taught, said))
    inner = [
        divergence(
            lens(teacher, taught.hidden_states[theirs][0, learned - 1], size),
            lens(student, said.hidden_states[ours][0, learned - 1], size),
        )
        for ours, theirs in PAIRS
    ]
    return {
        "kd": divergence(teacher_NV, student_NV),
        "ce": F.cross_entropy(student_NV, ids[learned], reduction="sum"),
        "trajectory": torch.stack(inner).mean(),
    }


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, Expected]:
    """Return the expected result for each behaviour."""
    teacher, student = load(root / "teacher-hf"), load(root / "student-hf")
    found = {}
    for name, (_, chats) in BEHAVIOURS.items():
        tokenizer = AutoTokenizer.from_pretrained(root / f"{name}-tokenizer")
        for chat in chats:
            check_texts(tokenizer, chat)
        samples = [positions(tokenizer, text) for chat in chats for text in chat.samples.values()]
        terms = [sums_of_terms(teacher, student, *sample, len(tokenizer)) for sample in samples]
        count = sum(len(learned) for _, learned in samples)
        means = {term: torch.stack([sums[term] for sums in terms]).sum() / count for term in terms[0]}
        student.zero_grad()
        (KD * means["kd"] + CE * means["ce"] + ALPHA * means["trajectory"]).backward()
        found[name] = Expected(
            [len(ids) - 1 for ids, _ in samples],
            count,
            {term: mean.item() for term, mean in means.items()},
            {parameter: weight.grad.clone() for parameter, weight in student.named_parameters()},
        )
    return found


def command(root: Path, name: str, lengths: list[int], flags: str, save: Path) -> list[str]:
    """Return the command for a step on all samples of a behaviour, in two micro-batches."""
    assert len(lengths) == 4
    length, batch = max(lengths) + 3, 4
    if "inter-document" in flags:
        # In any order, the samples fill one sequence, and two are enough.
        length, batch = (sum(lengths) + max(lengths)) // 2 + 1, 2
    length += -length % 4  # a context-parallel rank has two pieces of a sequence
    places = {
        "--load": root / "student",
        "--teacher-load": root / "teacher",
        "--data-path": root / name,
        "--tokenizer-model": root / f"{name}-tokenizer",
        "--save": save,
        "--fdd-metrics-file": save / "metrics.jsonl",
    }
    words = [str(word) for place in places.items() for word in place]
    sizes = f"--seq-length {length} --micro-batch-size {batch // 2} --global-batch-size {batch}"
    return [*COMMON, *STEP, *words, *sizes.split(), *flags.split()]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_step_is_that_of_transformers(
    name: str, layout: str, root: Path, expected: dict[str, Expected], tmp_path: Path
) -> None:
    (ranks, flags), wanted = LAYOUTS[layout], expected[name]
    trained(command(root, name, wanted.lengths, flags, tmp_path), ranks=ranks)
    [record] = metrics(tmp_path)
    assert record["tokens"] == wanted.tokens
    assert {term: record[term] for term in wanted.means} == pytest.approx(wanted.means, rel=1e-5)
    norm = torch.cat([gradient.flatten() for gradient in wanted.gradient.values()]).norm().item()
    assert record["grad_norm"] == pytest.approx(norm, rel=1e-5)
    arguments = {"load": tmp_path, "hf_out": tmp_path / "back"}
    run_on_ranks(convert.mcore_to_hf, Layout(ranks=1), arguments)
    start = dict(load(root / "student-hf").named_parameters())
    for parameter, moved in load(tmp_path / "back").named_parameters():
        gradient = (start[parameter] - moved) / LR
        difference = (gradient - wanted.gradient[parameter]).abs().max()
        assert difference < 1e-5 * wanted.gradient[parameter].abs().max(), parameter
