"""Chat templates of our own that behave like published ones, one for each behaviour that decides what is learned.

They write other words and share no line with the published ones. They are alike in the order of the parts, in what
they leave out, in what they raise and in what ends a turn. The lines of a template are joined without their line
breaks: the text that it writes is in quotes.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_fdd.data.chat_template import ChatTemplate

DATE = datetime.date(2026, 1, 2)
_PLAIN = "<think> </think> <tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value>"


@dataclass(frozen=True)
class Family:
    """A template and the tokens of its tokenizer.

    Attributes:
        text: jinja.
        special: special tokens, with blanks between.
        stop: the tokenizer's end token, which need not be the end of a turn.
        bos: the value of `bos_token`.
    """

    text: str
    special: str
    stop: str
    bos: str = ""

    def template(self, **variables: Any) -> ChatTemplate:
        """Return the template with `variables` as those of --chat-template-kwargs."""
        return chat_template(self.text, self.special, self.stop, self.bos, variables)


def chat_template(
    text: str | Mapping[str, str],
    special: str = "<|im_start|> <|im_end|>",
    stop: str = "<|im_end|>",
    bos: str = "",
    variables: Mapping[str, Any] | None = None,
) -> ChatTemplate:
    """Return a template on a tokenizer with these special tokens, on the day `DATE`."""
    added = {**dict.fromkeys(special.split(), True), **dict.fromkeys(_PLAIN.split(), False)}
    names = {"bos_token": bos, "eos_token": stop}
    return ChatTemplate(text, names, added, frozenset({stop}), variables or {}, DATE)


def joined(lines: str) -> str:
    """Return a template without the line breaks between its lines."""
    return "".join(line.strip() for line in lines.splitlines())


_TOOLS = r"""{% for t in tools or [] %}{{ "\n" + t | tojson }}{% endfor %}"""
_CALLS = r"""
{% for c in m.tool_calls or [] %}{{ "\n" if m.content or not loop.first }}
{{ "<tool_call>" + {"name": c.function.name, "arguments": c.function.arguments} | tojson + "</tool_call>" }}{% endfor %}
"""
# Consecutive results stand in one user turn.
_RESULTS = r"""
{{ "<|im_start|>user" if loop.first or loop.previtem.role != "tool" }}
{{ "\n<tool_response>" + m.content + "</tool_response>" }}
{{ "<|im_end|>\n" if loop.last or loop.nextitem.role != "tool" }}
"""
_LAST_USER = r"""
{% set ns = namespace(last=-1) %}
{% for m in messages %}{% if m.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
"""
# The reasoning, from its own field or from the text before </think>, and the answer after it.
_THOUGHT = r"""
{% set thought, said = m.reasoning_content or "", m.content %}
{% if "</think>" in said and not thought %}
{% set thought = said.split("</think>")[0].replace("<think>", "").strip("\n") %}
{% set said = said.split("</think>")[-1].lstrip("\n") %}
{% endif %}
"""
_NO_THINKING = r"""{{ "<think>\n\n</think>\n\n" if enable_thinking is defined and not enable_thinking }}"""

CHATML = joined(r"""
{% for m in messages %}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{% endfor %}
{{ "<|im_start|>assistant\n" if add_generation_prompt }}
""")

QWEN2_5 = joined(
    r"""
{% set first = messages[0] %}
{{ "<|im_start|>system\n" + (first.content if first.role == "system" else "Be kind.") }}
"""
    + _TOOLS
    + r"""
{{ "<|im_end|>\n" }}
{% for m in messages %}{% if m.role == "tool" %}
"""
    + _RESULTS
    + r"""
{% elif m.role != "system" or not loop.first %}{{ "<|im_start|>" + m.role + "\n" + m.content }}
"""
    + _CALLS
    + r"""
{{ "<|im_end|>\n" }}{% endif %}{% endfor %}
{{ "<|im_start|>assistant\n" if add_generation_prompt }}
"""
)

# Reasoning is written only after the last question, and empty reasoning only in the very last message.
QWEN3 = joined(
    _LAST_USER
    + r"""
{% if tools %}{{ "<|im_start|>system\nTools:" }}"""
    + _TOOLS
    + r"""{{ "<|im_end|>\n" }}{% endif %}
{% for m in messages %}{% if m.role == "tool" %}
"""
    + _RESULTS
    + r"""
{% elif m.role == "assistant" %}
"""
    + _THOUGHT
    + r"""
{{ "<|im_start|>assistant\n" }}
{% if loop.index0 > ns.last and (loop.last or thought) %}{{ "<think>\n" + thought + "\n</think>\n\n" }}{% endif %}
{{ said }}
"""
    + _CALLS
    + r"""
{{ "<|im_end|>\n" }}
{% else %}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ "<|im_start|>assistant\n" }}"""
    + _NO_THINKING
    + r"""{% endif %}
"""
)

QWEN3_THINKING = QWEN3.replace(_NO_THINKING, r"""{{ "<think>\n" }}""")

# Like Qwen3, but reasoning is written for every message after the last question, and calls are not JSON.
QWEN3_5 = joined(
    _LAST_USER
    + r"""
{% if tools %}{{ "<|im_start|>system\nTools:" }}"""
    + _TOOLS
    + r"""{{ "<|im_end|>\n" }}{% endif %}
{% for m in messages %}{% if m.role == "tool" %}
"""
    + _RESULTS
    + r"""
{% elif m.role == "assistant" %}
"""
    + _THOUGHT
    + r"""
{{ "<|im_start|>assistant\n" }}
{% if loop.index0 > ns.last %}{{ "<think>\n" + thought + "\n</think>\n\n" }}{% endif %}{{ said }}
{% for c in m.tool_calls or [] %}{{ "<tool_call><function=" + c.function.name + ">" }}
{% for key, value in c.function.arguments | items %}{{ "<parameter=" + key + ">" + value }}{% endfor %}
{{ "</tool_call>" }}{% endfor %}
{{ "<|im_end|>\n" }}
{% else %}{{ "<|im_start|>" + m.role + "\n" + m.content + "<|im_end|>\n" }}{% endif %}{% endfor %}
{{ "<|im_start|>assistant\n" + ("<think>\n" if enable_thinking | default(true) else "<think>\n\n</think>\n\n")
if add_generation_prompt }}
"""
)

# The prompt opens the reasoning; in a message only the content can open it.
QWQ = joined(r"""
{% for m in messages %}{{ "<|im_start|>" + m.role + "\n" }}
{{ m.content if loop.last or m.role != "assistant" else m.content.split("</think>")[-1].lstrip("\n") }}
{{ "<|im_end|>\n" }}{% endfor %}
{{ "<|im_start|>assistant\n<think>\n" if add_generation_prompt }}
""")

LLAMA3 = joined(r"""
{{ bos_token }}{% for m in messages %}
{{ "<|start_header_id|>" + m.role + "<|end_header_id|>\n\n" + m.content | trim + "<|eot_id|>" }}{% endfor %}
{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" if add_generation_prompt }}
""")

LLAMA3_1 = joined(
    r"""
{{ bos_token + "<|start_header_id|>system<|end_header_id|>\n\nToday: " + date_string | default("26 Jul 2024") + "\n" }}
{% set has_system = messages[0].role == "system" %}
{{ (messages[0].content | trim if has_system else "") + "<|eot_id|>" }}
{% for m in messages[1 if has_system else 0:] %}
{% set role = "ipython" if m.role == "tool" else m.role %}
{{ "<|start_header_id|>" + role + "<|end_header_id|>\n\n" }}
{% if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{% set f = m.tool_calls[0].function %}{{ {"name": f.name, "parameters": f.arguments} | tojson + "<|eot_id|>" }}
{% else %}
{% if tools and loop.first %}{{ "Tools:" }}"""
    + _TOOLS
    + r"""{{ "\n" }}{% endif %}
{{ m.content | trim + "<|eot_id|>" }}{% endif %}{% endfor %}
{{ "<|start_header_id|>assistant<|end_header_id|>\n\n" if add_generation_prompt }}
"""
)

LLAMA3_2 = LLAMA3_1.replace('"26 Jul 2024"', 'strftime_now("%d %b %Y")')

MISTRAL_V1 = joined(r"""
{{ bos_token }}{% for m in messages %}
{% if (m.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("take turns, please") }}{% endif %}
{{ "[INST] " + m.content + " [/INST]" if m.role == "user" else m.content + eos_token + " " }}{% endfor %}
""")

# Tools stand before the last question; a system message is passed over (v0.3), or (Nemo) written into the question
# while that is the last message.
_MISTRAL = (
    _LAST_USER
    + r"""
{{ bos_token }}{% for m in messages %}
{% if m.role == "user" %}
{% if tools and loop.index0 == ns.last %}{{ "[AVAILABLE_TOOLS]" }}"""
    + _TOOLS
    + r"""{{ "[/AVAILABLE_TOOLS]" }}{% endif %}
{{ "[INST]" + SYSTEM + m.content + "[/INST]" }}
{% elif m.role == "tool" %}{{ "[TOOL_RESULTS]" + m.content + "[/TOOL_RESULTS]" }}
{% elif m.tool_calls %}{{ "[TOOL_CALLS]" }}{% for c in m.tool_calls %}
{% if c.id | length != 9 %}{{ raise_exception("ids have nine characters") }}{% endif %}
{{ {"name": c.function.name, "arguments": c.function.arguments, "id": c.id} | tojson }}{% endfor %}{{ eos_token }}
{% elif m.role == "assistant" %}{{ m.content + eos_token }}{% endif %}{% endfor %}
"""
)
MISTRAL_V3 = joined(_MISTRAL.replace("SYSTEM", '""'))
NEMO = joined(
    _MISTRAL.replace(
        "SYSTEM",
        r'(messages[0].content + "\n\n" if loop.last and messages[0].role == "system" else "")',
    )
)

_GEMMA = r"""
{% for m in turns %}
{% if (m.role == "user") != (loop.index0 % 2 == 0) %}{{ raise_exception("take turns, please") }}{% endif %}
{{ "<start_of_turn>" + ("model" if m.role == "assistant" else m.role) + "\n" }}{{ before if loop.first }}
{{ m.content | trim + "<end_of_turn>\n" }}{% endfor %}
{{ "<start_of_turn>model\n" if add_generation_prompt }}
"""
GEMMA2 = joined(r"{{ bos_token }}{% set turns = messages %}" + _GEMMA)
GEMMA3 = joined(
    r"""
{% set has_system = messages[0].role == "system" %}
{% set turns, before = (messages[1:], messages[0].content + "\n\n") if has_system else (messages, "") %}
{{ bos_token }}
"""
    + _GEMMA
)

PHI3 = joined(r"""
{% for m in messages if m.role in ("system", "user", "assistant") %}
{{ "<|" + m.role + "|>\n" + m.content + "<|end|>\n" }}{% endfor %}
{{ "<|assistant|>\n" if add_generation_prompt else eos_token }}
""")

PHI4 = joined(r"""
{% for m in messages if m.role in ("system", "user", "assistant") %}
{{ "<|im_start|>" + m.role + "<|im_sep|>" + m.content + "<|im_end|>" }}{% endfor %}
{{ "<|im_start|>assistant<|im_sep|>" if add_generation_prompt }}
""")

# The question brings the header of the answer, whether one is asked for or not.
PHI4_FIRST = joined(r"""
{% for m in messages %}
{% if m.role == "assistant" %}{{ m.content + "<|im_end|>" }}
{% else %}{{ "<|im_start|>" + m.role + "<|im_sep|>" + m.content + "<|im_end|>" }}{% endif %}
{{ "<|im_start|>assistant<|im_sep|>" if m.role == "user" }}{% endfor %}
""")

DEEPSEEK = joined(r"""
{{ bos_token }}{% for m in messages %}
{% if m.role == "user" %}{{ "<｜User｜>" + m.content }}
{% elif m.role == "tool" %}{{ "<｜tool▁output▁begin｜>" + m.content + "<｜tool▁output▁end｜>" }}
{% elif m.role == "assistant" %}
{{ "<｜Assistant｜>" if loop.first or loop.previtem.role != "tool" }}{{ m.content.split("</think>")[-1] }}
{% for c in m.tool_calls or [] %}
{{ "<｜tool▁call▁begin｜>" + c.function.name + "\n" + c.function.arguments + "<｜tool▁call▁end｜>" }}{% endfor %}
{{ eos_token }}
{% else %}{{ m.content }}{% endif %}{% endfor %}
{{ "<｜Assistant｜>" if add_generation_prompt and messages[-1].role != "tool" }}
""")
R1_DISTILL = DEEPSEEK.replace('{{ "<｜Assistant｜>" if add', r'{{ "<｜Assistant｜><think>\n" if add')

SMOLLM2 = (
    joined(r"""
{{ "<|im_start|>system\nI am small.<|im_end|>\n" if messages[0].role != "system" }}
""")
    + CHATML
)

# The author enclosed the header and the line break.
SMOLLM3 = joined(
    r"""
{{ "<|im_start|>system\nDate: " + strftime_now("%d %B %Y") }}"""
    + _TOOLS
    + r"""
{{ "\n" + messages[0].content if messages[0].role == "system" }}{{ "<|im_end|>\n" }}
{% for m in messages %}
{% if m.role == "assistant" %}
{% generation %}{{ "<|im_start|>assistant\n" + m.content + "<|im_end|>\n" }}{% endgeneration %}
{% elif m.role == "tool" %}{{ "<|im_start|>user\n" + m.content + "<|im_end|>\n" }}
{% elif m.role == "user" %}{{ "<|im_start|>user\n" + m.content + "<|im_end|>\n" }}{% endif %}{% endfor %}
{{ "<|im_start|>assistant\n" if add_generation_prompt }}
"""
)

# Analysis before a call is dropped once there is a final answer; before a final answer, once another follows.
GPT_OSS = joined(
    r"""
{{ "<|start|>system<|message|>" + strftime_now("%Y-%m-%d") + "<|end|>" }}
{% set system = messages[0].content if messages[0].role == "system" else "" %}
{% if system or tools %}{{ "<|start|>developer<|message|>" + system }}"""
    + _TOOLS
    + r"""{{ "<|end|>" }}{% endif %}
{% for m in messages %}{% set here = loop.index %}
{% if m.role == "user" %}{{ "<|start|>user<|message|>" + m.content + "<|end|>" }}
{% elif m.role == "tool" %}{{ "<|start|>functions." + m.name + " to=assistant<|message|>" + m.content + "<|end|>" }}
{% elif m.role == "assistant" %}
{% set ended = messages[here:] | selectattr("role", "equalto", "assistant") | rejectattr("tool_calls") | list %}
{% if m.reasoning_content and (not ended if m.tool_calls else loop.last) %}
{{ "<|start|>assistant<|channel|>analysis<|message|>" + m.reasoning_content + "<|end|>" }}{% endif %}
{% if m.tool_calls %}{% set f = m.tool_calls[0].function %}
{{ "<|start|>assistant to=functions." + f.name + "<|channel|>commentary json<|message|>" + f.arguments | tojson }}
{{ "<|call|>" }}
{% else %}{{ "<|start|>assistant<|channel|>final<|message|>" + m.content }}
{{ "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}{% endif %}{% endif %}{% endfor %}
{{ "<|start|>assistant" if add_generation_prompt }}
"""
)

# An answer ends only with the marker of the next speaker.
GLM = joined(
    _LAST_USER
    + r"""
{{ "[gMASK]<sop>" }}{% if tools %}{{ "<|system|>\nTools:" }}"""
    + _TOOLS
    + r"""{% endif %}
{% for m in messages %}{% if m.role == "assistant" %}
"""
    + _THOUGHT
    + r"""
{{ "<|assistant|>\n<think>" + (thought if loop.index0 > ns.last else "") + "</think>" }}
{{ "\n" + said | trim if said | trim }}
{% for c in m.tool_calls or [] %}{{ "\n<tool_call>" + c.function.name }}
{% for key, value in c.function.arguments | items %}
{{ "\n<arg_key>" + key + "</arg_key>\n<arg_value>" + value + "</arg_value>" }}{% endfor %}
{{ "\n</tool_call>" }}{% endfor %}
{% elif m.role == "tool" %}{{ "<|observation|>" if loop.previtem.role != "tool" }}{{ "\n<r>" + m.content + "</r>" }}
{% else %}{{ "<|" + m.role + "|>\n" + m.content }}{% endif %}{% endfor %}
{% if add_generation_prompt %}{{ "<|assistant|>" }}
{{ "\n<think></think>" if enable_thinking is defined and not enable_thinking }}{% endif %}
"""
)

OLMO2 = joined(r"""
{{ bos_token }}{% for m in messages %}{{ "<|" + m.role + "|>\n" + m.content }}
{{ eos_token if m.role == "assistant" }}{{ "\n" if not loop.last or m.role != "assistant" }}{% endfor %}
{{ "<|assistant|>\n" if add_generation_prompt }}
""")

GRANITE = joined(r"""
{% if messages[0].role != "system" %}
{{ "<|start_of_role|>system<|end_of_role|>" + strftime_now("%B %d, %Y") + "<|end_of_text|>\n" }}{% endif %}
{% for m in messages %}
{{ "<|start_of_role|>" + m.role + "<|end_of_role|>" + m.content + "<|end_of_text|>\n" }}{% endfor %}
{{ "<|start_of_role|>assistant<|end_of_role|>" if add_generation_prompt }}
""")

COHERE2 = joined(r"""
{% for m in messages %}{% set is_answer = m.role == "assistant" %}
{{ ("<|BOT|>" if is_answer else "<|USER|>") + m.content + ("<|END_RESPONSE|>" if is_answer else "") + eos_token }}
{% endfor %}
{{ "<|BOT|>" if add_generation_prompt }}
""")

_IM = "<|im_start|> <|im_end|> <|endoftext|>"
_LLAMA = "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>"
_BRACKETS = (
    "<s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]"
)
_TURNS = "<bos> <eos> <start_of_turn> <end_of_turn>"
_DEEPSEEK = "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
_ROLES = "<|endoftext|> <|system|> <|user|> <|assistant|>"

FAMILIES = {
    "qwen2.5": Family(QWEN2_5, _IM, "<|im_end|>"),
    "qwen3": Family(QWEN3, _IM, "<|im_end|>"),
    "qwen3-thinking": Family(QWEN3_THINKING, _IM, "<|im_end|>"),
    "qwen3.5": Family(QWEN3_5, _IM, "<|im_end|>"),
    "qwq": Family(QWQ, _IM, "<|im_end|>"),
    "llama3": Family(LLAMA3, _LLAMA, "<|end_of_text|>", "<|begin_of_text|>"),
    "llama3.1": Family(LLAMA3_1, _LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "llama3.2": Family(LLAMA3_2, _LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "mistral-v0.1": Family(MISTRAL_V1, "<s> </s>", "</s>", "<s>"),
    "mistral-v0.3": Family(MISTRAL_V3, _BRACKETS, "</s>", "<s>"),
    "nemo": Family(NEMO, _BRACKETS, "</s>", "<s>"),
    "gemma2": Family(GEMMA2, _TURNS, "<eos>", "<bos>"),
    "gemma3": Family(GEMMA3, _TURNS, "<eos>", "<bos>"),
    "phi3": Family(PHI3, _ROLES + " <|end|>", "<|endoftext|>"),
    "phi4": Family(PHI4, _IM + " <|im_sep|>", "<|im_end|>"),
    "phi4-first": Family(PHI4_FIRST, _IM + " <|im_sep|>", "<|im_end|>"),
    "deepseek": Family(DEEPSEEK, _DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "r1-distill": Family(R1_DISTILL, _DEEPSEEK, "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
    "smollm2": Family(SMOLLM2, _IM, "<|im_end|>"),
    "smollm3": Family(SMOLLM3, _IM, "<|im_end|>"),
    "gpt-oss": Family(GPT_OSS, "<|start|> <|end|> <|message|> <|channel|> <|call|> <|return|>", "<|return|>"),
    "glm": Family(GLM, _ROLES + " <|observation|> [gMASK] <sop>", "<|endoftext|>"),
    "olmo2": Family(OLMO2, "<|endoftext|>", "<|endoftext|>", "<|endoftext|>"),
    "cohere2": Family(COHERE2, "<|USER|> <|BOT|> <|END_RESPONSE|> <|END_OF_TURN|>", "<|END_OF_TURN|>"),
    "granite": Family(GRANITE, "<|start_of_role|> <|end_of_role|> <|end_of_text|>", "<|end_of_text|>"),
}
