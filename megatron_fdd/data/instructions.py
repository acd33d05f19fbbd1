"""Instructions with reference answers: the layouts in which they are published, and the prompts made of them.

The fields of a record tell its layout; every record becomes one or several `Instruction`. Training and evaluation
use the same templates, so that a student is asked the way it was taught.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from megatron_fdd.data.records import Fields, parse_json, text_field
from megatron_fdd.data.refusals import Fault, Reason, refusing

Template = Literal["alpaca", "chat", "none"]
TEMPLATES: tuple[Template, ...] = get_args(Template)

# The two prompts of Stanford's Alpaca; MiniLLM and later work train and evaluate with them.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
# The fields of an answer to a `prompt`; the first one present is taken.
_RESPONSE_FIELDS = ("response", "answer", "output", "completion")
# Some published files end an answer with this mark, which a program is to replace.
_END_MARK = "###eos_token###"


@dataclass(frozen=True, slots=True)
class Instruction:
    """One task.

    Attributes:
        instruction: the question or task.
        input: the text that the instruction is about; may be empty.
        references: right answers; may be empty where a layout keeps them elsewhere.
        is_prompt: true if `instruction` is the whole text that the model sees, so that no template is put around it.
        system: the system text before everything; only a chat template has a place for it.
        history: earlier questions and their answers; only a chat template has a place for them.
    """

    instruction: str
    input: str
    references: tuple[str, ...]
    is_prompt: bool = False
    system: str = ""
    history: tuple[tuple[str, str], ...] = ()

    def message(self) -> str:
        """Return instruction and input without any template.

        This is a chat's user message, or the prompt of the template `none`.
        """
        return f"{self.instruction}\n\n{self.input}" if self.input else self.instruction

    def messages(self) -> list[dict[str, Any]]:
        """Return the messages for a chat template, without the answer."""
        said = [("system", self.system)] if self.system else []
        for question, answer in self.history:
            said += [("user", question), ("assistant", answer)]
        return [{"role": role, "content": text} for role, text in (*said, ("user", self.message()))]

    def prompt(self, template: Literal["alpaca", "none"]) -> str:
        """Return the text after which the model answers.

        Raises:
            Fault: there is a system text or a history, and the template has no place for it.
        """
        for name in ("system", "history"):
            if getattr(self, name):
                raise Fault(
                    f"has the field {name!r}, for which only a chat template has a place", Reason.FIELDS
                )
        if template == "none" or self.is_prompt:
            return self.message()
        text = _ALPACA_WITH_INPUT if self.input else _ALPACA
        return text.format(instruction=self.instruction, input=self.input)


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to publish instructions.

    Attributes:
        fields: the fields of a record, in words.
        matches: whether a record has this layout.
        read: returns the instructions of one record; raises ValueError.
        min_answer_words: how many words a reference answer must have in the published evaluations of this data set.
    """

    fields: str
    matches: Callable[[Fields], bool]
    read: Callable[[Fields], list[Instruction]]
    min_answer_words: int = 0


def find_layout(fields: Fields) -> str | None:
    """Return the name of a record's layout; None if it has none of `LAYOUTS`."""
    return next((name for name, layout in LAYOUTS.items() if layout.matches(fields)), None)


def known_layouts() -> str:
    """Return all layouts and their fields in words, for messages."""
    return "; ".join(f"{name} ({layout.fields})" for name, layout in LAYOUTS.items())


def read_record(layout: str, fields: Fields, where: str) -> list[Instruction]:
    """Return the instructions of one record, each with the system text and the history beside it.

    Raises:
        Refusal: the record has another layout, or a field has another type; names `where`.
    """
    with refusing(where):
        if not LAYOUTS[layout].matches(fields):
            needed = LAYOUTS[layout].fields
            raise Fault(f"has the fields {sorted(fields)}, the layout {layout} needs {needed}", Reason.FIELDS)
        system, history = _optional_text(fields, "system"), _history(fields)
        instructions = LAYOUTS[layout].read(fields)
        return [replace(instruction, system=system, history=history) for instruction in instructions]


def read_pair(fields: Fields, prompt_key: str, response_key: str, where: str) -> tuple[str, str]:
    """Return prompt and response of a record that has both as fields.

    Raises:
        Refusal: one of them is missing or not a text; or the record has a field for which only a chat has a place.
    """
    with refusing(where):
        pair = text_field(fields, prompt_key), text_field(fields, response_key)
        for name in ("system", "history", "tools", "images"):
            if fields.get(name) and name not in (prompt_key, response_key):
                raise Fault(f"has the field {name!r}, for which only a chat has a place", Reason.FIELDS)
        return pair


def _optional_text(fields: Fields, key: str) -> str:
    return "" if fields.get(key) is None else text_field(fields, key)


def _texts(fields: Fields, key: str) -> tuple[str, ...]:
    """Return a text, or a list of texts, as a tuple of texts."""
    value = fields.get(key)
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        return tuple(text_field({key: text}, key) for text in value)
    return (text_field(fields, key),)


def _history(fields: Fields) -> tuple[tuple[str, str], ...]:
    """Return the earlier turns, which are a list of pairs of texts or its JSON text."""
    given = fields.get("history") or []
    pairs = parse_json(given) if isinstance(given, str) else given
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise Fault("'history' must be a list of pairs of texts")
    texts = [text_field({"history": text}, "history") for pair in pairs for text in pair]
    return tuple(zip(texts[::2], texts[1::2], strict=True))


def _objects(fields: Fields, key: str) -> list[Fields]:
    value = fields[key]
    if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"the field {key!r} must be a list of objects with at least one")
    return value


def _read_dolly(fields: Fields) -> list[Instruction]:
    return [
        Instruction(
            text_field(fields, "instruction"), _optional_text(fields, "context"), _texts(fields, "response")
        )
    ]


def _is_unnatural(fields: Fields) -> bool:
    instances = fields.get("instances")
    return (
        "instruction" in fields
        and isinstance(instances, list)
        and any(isinstance(instance, dict) and "instruction_with_input" in instance for instance in instances)
    )


def _read_unnatural(fields: Fields) -> list[Instruction]:
    """Return the instructions; constraints on an instance's output, unless "None.", end its instruction."""
    instructions = []
    for instance in _objects(fields, "instances"):
        constraints = _optional_text(instance, "constraints")
        parts = [
            text_field(fields, "instruction"),
            constraints if constraints.lower() not in ("none", "none.") else "",
        ]
        instructions.append(
            Instruction(
                " ".join(filter(None, parts)), _optional_text(instance, "input"), _texts(instance, "output")
            )
        )
    return instructions


def _read_self_instruct(fields: Fields) -> list[Instruction]:
    instruction = text_field(fields, "instruction")
    return [
        Instruction(instruction, _optional_text(instance, "input"), _texts(instance, "output"))
        for instance in _objects(fields, "instances")
    ]


def _read_vicuna(fields: Fields) -> list[Instruction]:
    """Return the first turn, with its reference, the first: MT-Bench's file has one for each turn."""
    question = _texts(fields, "turns" if "turns" in fields else "text")[0]
    return [Instruction(question, "", _texts(fields, "reference")[:1] if fields.get("reference") else ())]


def _is_natural(fields: Fields) -> bool:
    return {"definition", "inputs", "targets"} <= fields.keys() or (
        "Definition" in fields and ("Instances" in fields or "Instance" in fields)
    )


def _read_natural(fields: Fields) -> list[Instruction]:
    """Read a task with its instances, one instance with its task's definition, or the flat form in lower case."""
    if "definition" in fields:
        definition = " ".join(_texts(fields, "definition"))
        return [Instruction(definition, text_field(fields, "inputs"), _texts(fields, "targets"))]
    instances = (
        _objects(fields, "Instances")
        if "Instances" in fields
        else _objects({"Instance": [fields["Instance"]]}, "Instance")
    )
    definition = " ".join(_texts(fields, "Definition"))
    return [
        Instruction(definition, text_field(instance, "input"), _texts(instance, "output"))
        for instance in instances
    ]


def _read_alpaca(fields: Fields) -> list[Instruction]:
    return [
        Instruction(
            text_field(fields, "instruction"), _optional_text(fields, "input"), _texts(fields, "output")
        )
    ]


def _read_prompt(fields: Fields) -> list[Instruction]:
    key = next(name for name in _RESPONSE_FIELDS if name in fields)
    references = tuple(text.removesuffix(_END_MARK) for text in _texts(fields, key))
    return [Instruction(text_field(fields, "prompt"), "", references, is_prompt=True)]


def _read_question(fields: Fields) -> list[Instruction]:
    return [Instruction(text_field(fields, "question"), "", _texts(fields, "answer"))]


def _has(*names: str) -> Callable[[Fields], bool]:
    return lambda fields: fields.keys() >= set(names)


# The first match is taken: a layout comes before those whose fields are a part of its own.
LAYOUTS: dict[str, Layout] = {
    "dolly": Layout(
        "instruction, context, response", _has("instruction", "context", "response"), _read_dolly
    ),
    "unni": Layout(
        "instruction, instances of instruction_with_input, input, output",
        _is_unnatural,
        _read_unnatural,
        min_answer_words=11,
    ),
    "self-instruct": Layout(
        "instruction, instances of input, output", _has("instruction", "instances"), _read_self_instruct
    ),
    "s-ni": Layout(
        "Definition and Instances or Instance of input, output; or definition, inputs, targets",
        _is_natural,
        _read_natural,
        min_answer_words=11,
    ),
    "vicuna": Layout(
        "question_id, turns or text",
        lambda fields: "question_id" in fields and ("turns" in fields or "text" in fields),
        _read_vicuna,
    ),
    "alpaca": Layout("instruction, output, maybe input", _has("instruction", "output"), _read_alpaca),
    "prompt": Layout(
        f"prompt and one of {', '.join(_RESPONSE_FIELDS)}",
        lambda fields: "prompt" in fields and not fields.keys().isdisjoint(_RESPONSE_FIELDS),
        _read_prompt,
    ),
    "gsm8k": Layout("question, answer", _has("question", "answer"), _read_question),
}
