"""Token ids and loss masks of single documents."""

from __future__ import annotations

import json

import pytest
import sentencepiece
from tokenizers import processors
from transformers import AutoTokenizer

from megatron_fdd.data.documents import RawDocument
from megatron_fdd.data.encode import Encoded, EncodeSettings
from megatron_fdd.data.instructions import TEMPLATES, Template, read_record
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.evaluate.generation import encode_prompts
from megatron_fdd.evaluate.settings import GenerationSettings
from tests.data.conftest import make_encoder

CHAT = [
    {"role": "system", "content": "The house."},
    {"role": "user", "content": "Where is the river?"},
    {"role": "assistant", "content": "Near the house, children sing."},
    {"role": "user", "content": "And at night?"},
    {"role": "assistant", "content": "They play. "},
]
SPOKEN = "Near the house, children sing.<|im_end|>They play. <|im_end|>"
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
)
# Like templates that drop the reasoning of earlier turns: a turn looks different once it is not the last.
REWRITING = "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if loop.last %}!{% endif %}\n{% endfor %}"


def document(row: dict[str, object]) -> RawDocument:
    content = json.dumps(row).encode()
    return RawDocument("x.jsonl", 7, content, len(content))


def encode(
    tokenizer: TokenizerSettings, row: dict[str, object], seq_length: int | None = None
) -> Encoded | None:
    return make_encoder(EncodeSettings(tokenizer, "instruction", seq_length=seq_length))(document(row))


def learned_text(tokenizer: TokenizerSettings, encoded: Encoded) -> str:
    hf = AutoTokenizer.from_pretrained(tokenizer.tokenizer_model)
    return hf.decode(encoded.ids[encoded.loss_mask == 1])


@pytest.mark.parametrize("template", [None, MARKED], ids=["prefixes", "generation marks"])
def test_chat_learns_every_assistant_turn_and_nothing_else(
    hf: TokenizerSettings, template: str | None
) -> None:
    settings = TokenizerSettings(hf.tokenizer_type, hf.tokenizer_model, template)
    encoded = encode(settings, {"messages": CHAT})
    assert learned_text(hf, encoded) == SPOKEN
    reference = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    assert encoded.ids.tolist() == reference.apply_chat_template(CHAT, return_dict=True)["input_ids"]


def test_template_that_rewrites_turns_is_refused(hf: TokenizerSettings) -> None:
    settings = TokenizerSettings(hf.tokenizer_type, hf.tokenizer_model, REWRITING)
    with pytest.raises(ValueError, match=r"x.jsonl, line 7: .* message 3 differently .*generation"):
        encode(settings, {"messages": CHAT})


def test_template_that_refuses_is_reported(hf: TokenizerSettings) -> None:
    template = "{{ raise_exception('no system role') }}"
    settings = TokenizerSettings(hf.tokenizer_type, hf.tokenizer_model, template)
    with pytest.raises(ValueError, match=r"line 7: the chat template refuses .*no system role"):
        encode(settings, {"messages": CHAT})


def test_chat_without_template_is_refused(sp: TokenizerSettings) -> None:
    with pytest.raises(ValueError, match=r"line 7: .*no.*--chat-template"):
        encode(sp, {"messages": CHAT})


def test_sentencepiece_chat_with_a_template(sp: TokenizerSettings) -> None:
    template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    encoded = encode(
        TokenizerSettings(sp.tokenizer_type, sp.tokenizer_model, template),
        {"messages": [{"role": "user", "content": "sing"}, {"role": "assistant", "content": "the night"}]},
    )
    model = sentencepiece.SentencePieceProcessor(model_file=sp.tokenizer_model)
    assert encoded.ids.tolist() == model.encode("user sing\nassistant the night\n")
    assert model.decode(encoded.ids[encoded.loss_mask == 1].tolist()).strip() == "the night"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ("hello", "must be a list"),
        ([{"role": "user"}], "message 1 must have"),
        ([{"role": "user", "content": ["parts"]}], "message 1 must have"),
        ([{"role": "assistant", "content": "x"}], "begins with the assistant"),
    ],
)
def test_malformed_messages(hf: TokenizerSettings, messages: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"x.jsonl, line 7: .*{message}"):
        encode(hf, {"messages": messages})


def test_prompt_is_masked_and_response_is_closed(hf: TokenizerSettings) -> None:
    encoded = encode(hf, {"prompt": "Where is the river?\n", "response": "Near the house."})
    assert learned_text(hf, encoded) == "Near the house.<|endoftext|>"
    reference = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    assert reference.decode(encoded.ids) == "Where is the river?\nNear the house.<|endoftext|>"
    prompt = reference("Where is the river?\n").input_ids
    assert encoded.ids[: len(prompt)].tolist() == prompt


def test_prompt_keeps_its_own_tokens_where_a_token_would_reach_over_the_border(hf: TokenizerSettings) -> None:
    reference = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    prompt, response = "the chil", "dren play"
    border = len(reference(prompt).input_ids)
    assert reference(prompt + response).input_ids[:border] != reference(prompt).input_ids
    encoded = encode(hf, {"prompt": prompt, "response": response})
    assert encoded.ids[:border].tolist() == reference(prompt).input_ids
    assert learned_text(hf, encoded) == "dren play<|endoftext|>"


def test_beginning_of_sequence_comes_once_and_is_not_learned(hf: TokenizerSettings, tmp_path) -> None:
    with_bos = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    with_bos.bos_token = "<|im_start|>"
    bos = with_bos.bos_token_id
    with_bos.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    with_bos.save_pretrained(tmp_path)
    settings = TokenizerSettings("HuggingFaceTokenizer", str(tmp_path))
    encoded = encode(settings, {"prompt": "the river", "response": " sing"})
    assert encoded.ids[0] == bos
    assert encoded.ids.tolist().count(bos) == 1
    assert learned_text(hf, encoded) == " sing<|endoftext|>"


def test_truncation_keeps_one_token_more_than_the_sequence(hf: TokenizerSettings) -> None:
    row = {"prompt": "the river ", "response": "play and sing until night comes"}
    whole = encode(hf, row)
    cut = encode(hf, row, seq_length=len(whole.ids) - 3)
    assert cut.ids.tolist() == whole.ids[:-2].tolist()
    assert cut.loss_mask.tolist() == whole.loss_mask[:-2].tolist()
    assert (whole.truncated, cut.truncated) == (False, True)
    exact = encode(hf, row, seq_length=len(whole.ids) - 1)
    assert len(exact.ids) == len(whole.ids)
    assert not exact.truncated


def test_nothing_left_to_learn_is_skipped(hf: TokenizerSettings) -> None:
    assert encode(hf, {"prompt": "the small house near", "response": "river"}, seq_length=2) is None
    assert encode(hf, {"messages": CHAT[:2]}) is None


@pytest.mark.parametrize(
    ("row", "message"),
    [({"prompt": "x"}, "'response' is missing"), ({"prompt": 3, "response": "y"}, "'prompt' is a int")],
)
def test_missing_fields(hf: TokenizerSettings, row: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"x.jsonl, line 7: .*{message}"):
        encode(hf, row)


def test_text_ends_with_eod_only_when_asked(hf: TokenizerSettings) -> None:
    reference = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    raw = RawDocument("a.txt", 1, b"the river", 9)
    ids = reference("the river").input_ids
    assert make_encoder(EncodeSettings(hf, "text"))(raw).ids.tolist() == ids
    assert make_encoder(EncodeSettings(hf, "text", append_eod=True))(raw).ids.tolist() == [
        *ids,
        reference.eos_token_id,
    ]
    assert (
        make_encoder(EncodeSettings(hf, "text", append_eod=True))(RawDocument("a.txt", 1, b" \n", 2)) is None
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("context", ["", "Near the house."])
def test_a_student_is_asked_as_it_was_taught(hf: TokenizerSettings, template: Template, context: str) -> None:
    row = {"instruction": "Where is the river?", "context": context, "response": "Over there."}
    encoded = make_encoder(EncodeSettings(hf, "instruction", template=template))(document(row))
    tokenizer = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    example = {0: read_record("dolly", row, "here")[0]}
    asked = encode_prompts(example, tokenizer, GenerationSettings(template=template, max_prompt_tokens=999))
    assert asked[0].ids == encoded.ids[: len(asked[0].ids)].tolist()
    assert encoded.loss_mask[: len(asked[0].ids)].sum() == 0
    end = "<|im_end|>" if template == "chat" else "<|endoftext|>"
    assert learned_text(hf, encoded) == f"Over there.{end}"
    assert ("### Instruction:\nWhere is" in tokenizer.decode(encoded.ids)) == (template == "alpaca")


def test_a_ready_prompt_is_left_as_it_is(hf: TokenizerSettings) -> None:
    row = {"prompt": "the river ", "response": "play"}
    templated = make_encoder(EncodeSettings(hf, "instruction", template="alpaca"))(document(row))
    assert templated.ids.tolist() == encode(hf, row).ids.tolist()


def test_a_template_knows_what_it_is_put_around(hf: TokenizerSettings) -> None:
    row = {"query": "the river ", "response": "play"}
    with pytest.raises(
        ValueError, match=r"line 7: .*'query', 'response'\], no layout that --template alpaca reads: dolly"
    ):
        make_encoder(EncodeSettings(hf, "instruction", template="alpaca"))(document(row))


def test_several_instructions_in_a_line_are_refused(hf: TokenizerSettings) -> None:
    instance = {"input": "", "output": "play"}
    row = {"instruction": "Sing.", "instances": [instance, instance]}
    with pytest.raises(ValueError, match="x.jsonl, line 7: holds 2 instructions; training reads one a line"):
        make_encoder(EncodeSettings(hf, "instruction", template="alpaca"))(document(row))


@pytest.mark.parametrize("name", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_missing_tokenizer(name: str) -> None:
    with pytest.raises(ValueError, match="--tokenizer-model ./nowhere does not exist"):
        make_encoder(EncodeSettings(TokenizerSettings(name, "./nowhere"), "text"))
