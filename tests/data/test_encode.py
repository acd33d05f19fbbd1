"""Token ids and loss masks of single documents."""

from __future__ import annotations

import json

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from megatron_fdd.data.chat_template import ChatSettings
from megatron_fdd.data.documents import RawDocument
from megatron_fdd.data.encode import EMPTY_DOCUMENTS, LEFT_OUT, PAIRS, Encoded, EncodeSettings
from megatron_fdd.data.instructions import TEMPLATES, Template, read_record
from megatron_fdd.data.refusals import Reason, Refusal
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.evaluate.generation import encode_prompts
from megatron_fdd.evaluate.settings import GenerationSettings
from tests.data.conftest import CHATML, make_encoder, only_sample

CHAT = [
    {"role": "system", "content": "The house."},
    {"role": "user", "content": "Where is the river?"},
    {"role": "assistant", "content": "Near the house, children sing."},
    {"role": "user", "content": "And at night?"},
    {"role": "assistant", "content": "They play. "},
]
SPOKEN = "Near the house, children sing.<|im_end|>They play. <|im_end|>"
MARKED = CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")


def document(row: dict[str, object]) -> RawDocument:
    content = json.dumps(row).encode()
    return RawDocument("x.jsonl", 7, content, len(content))


def encode(tokenizer: TokenizerSettings, row: dict[str, object], seq_length: int | None = None) -> Encoded:
    encoder = make_encoder(EncodeSettings(tokenizer, "instruction", seq_length=seq_length))
    return only_sample(encoder(document(row)))


def learned_text(tokenizer: TokenizerSettings, encoded: Encoded) -> str:
    hf = AutoTokenizer.from_pretrained(tokenizer.tokenizer_model)
    return hf.decode(encoded.ids[encoded.loss_mask == 1])


def test_chat_learns_every_assistant_turn_and_nothing_else(hf: TokenizerSettings) -> None:
    encoded = encode(hf, {"messages": CHAT})
    assert learned_text(hf, encoded) == SPOKEN
    reference = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    text = reference.apply_chat_template(CHAT, tokenize=False)
    assert text.endswith("<|im_end|>\n")  # the line break, which no model has to write
    assert encoded.ids.tolist() == reference(text[:-1], add_special_tokens=False).input_ids


def test_marks_narrow_what_is_learned(hf: TokenizerSettings) -> None:
    settings = TokenizerSettings(hf.tokenizer_type, hf.tokenizer_model, MARKED)
    assert learned_text(hf, encode(settings, {"messages": CHAT})) == SPOKEN.replace("<|im_end|>", "")


def test_template_that_refuses_is_reported(hf: TokenizerSettings) -> None:
    template = "{{ raise_exception('no system role') }}"
    settings = TokenizerSettings(hf.tokenizer_type, hf.tokenizer_model, template)
    with pytest.raises(Refusal, match=r"line 7: the chat template refuses .*no system role") as caught:
        encode(settings, {"messages": CHAT})
    assert caught.value.reason is Reason.RAISED


def test_chat_without_template_is_refused(sp: TokenizerSettings) -> None:
    with pytest.raises(ValueError, match=r"line 7: .*no.*--chat-template"):
        encode(sp, {"messages": CHAT})


def test_whatever_goes_wrong_is_a_refusal(hf: TokenizerSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = make_encoder(EncodeSettings(hf, "jsonl"))
    for error in (
        TypeError("text input\nof the type"),
        MemoryError(),
        RecursionError("deep"),
        ZeroDivisionError(),
    ):

        def raising(_text: str, error: Exception = error) -> list[int]:
            raise error

        monkeypatch.setattr(type(encoder.tokenizer), "ids", lambda self, text: raising(text))
        refusal = encoder(document({"text": "the river"})).refusal
        assert refusal is not None
        assert str(refusal).startswith(f"x.jsonl, line 7: cannot be encoded ({type(error).__name__}: ")
        assert "\n" not in str(refusal)


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


def test_a_literal_start_token_gets_no_second_one(hf: TokenizerSettings, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(hf.tokenizer_model)
    tokenizer.bos_token = "<|im_start|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bos)]
    )
    tokenizer.save_pretrained(tmp_path)
    settings = TokenizerSettings("HuggingFaceTokenizer", str(tmp_path))
    text = make_encoder(EncodeSettings(settings, "jsonl"))
    with_start, without = (only_sample(text(document({"text": t}))) for t in ("<|im_start|>sing", "sing"))
    assert with_start.ids.tolist() == without.ids.tolist()
    pairs = [
        encode(settings, {"prompt": p, "response": " sing"}) for p in ("<|im_start|>the river", "the river")
    ]
    assert pairs[0].ids.tolist() == pairs[1].ids.tolist()
    assert pairs[0].loss_mask.tolist() == pairs[1].loss_mask.tolist()


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


def test_nothing_left_to_learn_is_refused(hf: TokenizerSettings) -> None:
    for row, seq_length, reason in (
        ({"prompt": "the small house near", "response": "river"}, 2, Reason.TOO_LONG),
        ({"messages": CHAT[:3]}, 5, Reason.TOO_LONG),
        ({"messages": CHAT[:2]}, None, Reason.NOTHING_LEARNED),
    ):
        with pytest.raises(Refusal) as caught:
            encode(hf, row, seq_length)
        assert caught.value.reason is reason


def test_of_a_conversation_only_the_samples_that_do_not_fit_are_left_out(hf: TokenizerSettings) -> None:
    """A template that drops the words of earlier answers makes two samples of this; the second one is too long."""
    template = CHATML.replace(
        "m.content", "m.content if loop.last or m.role != 'assistant' else m.content[:0]"
    )
    settings = TokenizerSettings(hf.tokenizer_type, hf.tokenizer_model, template)
    chat = ChatSettings(allowed=frozenset({"content"}))
    encoders = [
        make_encoder(EncodeSettings(settings, "instruction", seq_length=length, chat=chat))
        for length in (None, 50)
    ]
    both, one = (encoder(document({"messages": CHAT})) for encoder in encoders)
    assert [len(both.samples), len(one.samples)] == [2, 1]
    assert one.samples[0].ids.tolist() == both.samples[0].ids.tolist()
    assert both.notes[LEFT_OUT] == 0
    assert one.notes[LEFT_OUT] == 1


def test_a_switch_that_the_template_has_not_is_refused_before_any_record(hf: TokenizerSettings) -> None:
    for variables, message in (
        ({"enable_thinkin": False}, "the chat template has no variable enable_thinkin"),
        ({"bos_token": "x"}, "bos_token come from the data or the tokenizer"),
        ({"enable_thinking": "false"}, "enable_thinking is 'false'; it must be true or false"),
    ):
        with pytest.raises(ValueError, match=message):
            make_encoder(EncodeSettings(hf, "instruction", chat=ChatSettings(variables)))


def test_a_chat_without_a_template_and_a_pair_among_chats(
    hf: TokenizerSettings, sp: TokenizerSettings
) -> None:
    refusal = make_encoder(EncodeSettings(sp, "instruction"))(document({"messages": CHAT})).refusal
    assert refusal is not None
    assert refusal.reason is Reason.NO_TEMPLATE
    assert (
        make_encoder(EncodeSettings(hf, "instruction"))(document({"prompt": "the", "response": "x"})).notes[
            PAIRS
        ]
        == 1
    )


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
    plain, closed = (make_encoder(EncodeSettings(hf, "text", append_eod=eod)) for eod in (False, True))
    assert only_sample(plain(raw)).ids.tolist() == ids
    assert only_sample(closed(raw)).ids.tolist() == [*ids, reference.eos_token_id]
    empty = closed(RawDocument("a.txt", 1, b" \n", 2))
    assert (empty.samples, empty.refusal, dict(empty.notes)) == ((), None, {EMPTY_DOCUMENTS: 1})


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("context", ["", "Near the house."])
def test_a_student_is_asked_as_it_was_taught(hf: TokenizerSettings, template: Template, context: str) -> None:
    row = {"instruction": "Where is the river?", "context": context, "response": "Over there."}
    encoded = only_sample(make_encoder(EncodeSettings(hf, "instruction", template=template))(document(row)))
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
    templated = only_sample(make_encoder(EncodeSettings(hf, "instruction", template="alpaca"))(document(row)))
    assert templated.ids.tolist() == encode(hf, row).ids.tolist()


def test_a_template_knows_what_it_is_put_around(hf: TokenizerSettings) -> None:
    row = {"query": "the river ", "response": "play"}
    with pytest.raises(
        ValueError, match=r"line 7: .*'query', 'response'\], none of the layouts of --template alpaca: dolly"
    ):
        only_sample(make_encoder(EncodeSettings(hf, "instruction", template="alpaca"))(document(row)))


def test_several_instructions_in_a_line_are_refused(hf: TokenizerSettings) -> None:
    instance = {"input": "", "output": "play"}
    row = {"instruction": "Sing.", "instances": [instance, instance]}
    with pytest.raises(
        ValueError, match="x.jsonl, line 7: holds 2 instructions; training reads one from each line"
    ):
        only_sample(make_encoder(EncodeSettings(hf, "instruction", template="alpaca"))(document(row)))


@pytest.mark.parametrize("name", ["HuggingFaceTokenizer", "SentencePieceTokenizer"])
def test_missing_tokenizer(name: str) -> None:
    with pytest.raises(ValueError, match="--tokenizer-model ./nowhere does not exist"):
        make_encoder(EncodeSettings(TokenizerSettings(name, "./nowhere"), "text"))
