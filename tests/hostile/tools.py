"""Files and templates with which a tool must end in one line: evaluations, metrics, answers, models, chat templates."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fdd.data.conversations import Conversation
from tests.convert import toys
from tests.evaluate import report_files

DEEP = '{"a":' * 10**5
DIGITS = "1" * 5000


def changed(path: str, value: Any) -> dict[str, Any]:
    """Return an evaluation.json with another value at a path of keys."""
    content = json.loads(json.dumps(report_files.evaluation()))
    *keys, last = path.split(".")
    part = content
    for key in keys:
        part = part[key]
    part[last] = value
    return content


# A place in evaluation.json, a value of another type, and what the message says is allowed.
EVALUATIONS: tuple[tuple[str, Any, str], ...] = (
    ("answers", [], "an object"),
    ("answers", 5, "an object"),
    ("answers.dolly", "20", "an object"),
    ("answers.dolly.rouge_l", None, "an object"),
    ("answers.dolly.rouge_l", 20, "an object"),
    ("answers.dolly.rouge_l.mean", "20", "a number"),
    ("answers.dolly.rouge_l.mean", None, "a number"),
    ("answers.dolly.rouge_l.mean", 10**400, "a number"),
    ("answers.dolly.rouge_l.spread", [], "a number"),
    ("answers.dolly.rouge_l.by_seed", [1, 2], "an object"),
    ("answers.dolly.rouge_l.by_seed", {"10": "x"}, "an object"),
    ("answers.dolly.num_examples", "7", "a whole number"),
    ("text", "v.jsonl", "an object"),
    ("text.perplexity", "20", "a number"),
    ("text.num_tokens", [64], "a whole number"),
    ("text.teacher", ["big"], "a text"),
    ("settings", [], "an object"),
    ("samples", ["a"], "an object"),
    ("samples", {"a": 5}, "an object"),
    ("model", ["m"], "a text"),
)
# The content of an evaluation.json that is none, and the message.
NO_EVALUATIONS: tuple[tuple[str, str], ...] = (
    ("[]", "must hold a JSON object, not a list"),
    ("{}", "not an evaluation of version 1"),
    ('{"version": [1]}', "not an evaluation of version 1"),
    (DEEP, "nested too deeply"),
    ('{"version": ' + DIGITS + "}", "thousands of digits"),
    ("\ud800", "is not valid JSON"),
)
# A line before the last of a metrics file, and the message.
METRICS: tuple[tuple[str, str], ...] = (
    (DEEP, "line 2: malformed JSON .too long or too deep"),
    ('{"iteration": ' + DIGITS + "}", "line 2: malformed JSON .too long or too deep"),
    ('{"iteration": ' + str(2**70) + "}", 'line 2: not an object with an "iteration"'),
    ('{"iteration": true}', 'line 2: not an object with an "iteration"'),
    ('{"iteration": 2.0}', 'line 2: not an object with an "iteration"'),
    ("[1, 2]", 'line 2: not an object with an "iteration"'),
)
# Values of metrics that are left out, as those that are not finite are.
LEFT_OUT = ("1" + "0" * 400, "1e999", '"x"', "[1]", "null", "true", "-1e301")
# Records of which a resumed run's metrics file must have none.
NO_RECORDS: tuple[str, ...] = ("[1, 2]", '{"total": 1}', '{"iteration": "2"}', '{"iteration": -1}', "5", "x")
# Files of answers that hold none.
NO_ANSWERS: tuple[str, ...] = (
    '{"settings": [1, 2]}\n',
    '{"settings": 5}\n',
    "[]\n",
    "5\n",
    DEEP + "\n",
    DIGITS + "\n",
    '{"settings": {}}\n{"number": "0", "answer": "a", "rouge_l": 1}\n',
    '{"settings": {}}\n{"number": 0, "answer": 5, "rouge_l": 1}\n',
    '{"settings": {}}\n{"number": 0, "answer": "a", "rouge_l": "x"}\n',
    '{"settings": {}}\n{"number": [0], "answer": "a", "rouge_l": 1}\n',
    '{"settings": {}}\n{"number": 0, "answer": "a", "rouge_l": ' + "9" * 400 + "}\n",
    '{"settings": {}}\n[1]\n',
)


def _config(**changes: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        toys.write_json(folder / "config.json", toys.llama_config(**changes))

    return write


def _raw_config(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "config.json").write_text(text)

    return write


# Configs with which `fdd evaluate` must not start, and the message.
MODELS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no heads": (_config(num_attention_heads=0), '"num_attention_heads": 0, which must be a whole number'),
    "layers in words": (_config(num_hidden_layers="4"), "\"num_hidden_layers\": '4', which must be"),
    "very many layers": (
        _config(variant="qwen2", num_hidden_layers=10**9),
        '"num_hidden_layers": 1000000000, which must be',
    ),
    "no vocabulary": (_config(vocab_size=0), "vocab_size"),
    "theta in words": (_config(rope_theta="x"), "config.json|does not load"),
    "rope scaling in a list": (_config(rope_scaling=[1]), "config.json cannot be read"),
    "window in words": (_config(variant="mistral", sliding_window="x"), "config.json|does not load"),
    "deep": (_raw_config(DEEP), "nested too deeply"),
    "a list": (_raw_config("[1]"), "must hold a JSON object"),
    "a kernel of the hub": (
        _config(attn_implementation="somebody/kernel"),
        "\"attn_implementation\": 'somebody/kernel', which is code on the hub",
    ),
    "a kernel for a part": (
        _config(text_config={"_experts_implementation": {"": "a/b@c"}}),
        "_experts_implementation.*, which is code on the hub",
    ),
    "model type in a list": (_config(model_type=["llama"]), "config.json cannot be read"),
}


def write_program(folder: Path, sign: Path) -> None:
    """Make a model, of a type that nobody knows, and a tokenizer, which are programs that make a folder."""
    toys.make_llama(folder)
    toys.make_tokenizer(folder)
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    for file, changes in (
        ("config.json", {"model_type": "own"}),
        ("tokenizer_config.json", {"tokenizer_class": "Own"}),
    ):
        content = toys.read_json(folder / file) if (folder / file).is_file() else {}
        toys.write_json(folder / file, {**content, **changes, "auto_map": names})
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(sign)!r})\nclass Own: pass\n")


def write_pickle(folder: Path, sign: Path) -> None:
    """Write weights as a pickle that makes a folder when it is loaded without limits."""

    class Payload:
        def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
            return Path.mkdir, (sign,)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Payload()}))


QUESTION = Conversation(
    ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}), (False, True)
)
_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
_DOUBLING = (
    "{% set ns = namespace(t='xxxxxxxx') %}"
    "{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}"
)
_NESTING = (
    "{% set ns = namespace(a=[1], b=[1], c=(1,)) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}"
    "{% set ns.b = [ns.b, ns.b] %}{% set ns.c = (ns.c, ns.c) %}{% endfor %}"
)
# One operation of Python that takes for ever, which no handler of Python's can end.
ENDLESS = {
    "search in one call": "{{ ('a' * 8000000).rfind('ab' + 'a' * 4000000) }}",
    "comparison in one call": _NESTING + "{{ ns.a == ns.b }}",
    "hash in one call": _NESTING + "{{ {ns.c: 1} | length }}",
    "text of what it raises": _NESTING + "{{ raise_exception(ns.a) }}",
}
# Chat templates that are programs gone wrong, and what is said of each.
TEMPLATES: dict[str, tuple[str, str]] = {
    "division by zero": ("{{ 1 // (messages | length - messages | length) }}", "ZeroDivisionError"),
    "sum of list and number": ("{{ messages + 5 }}", "TypeError"),
    "huge range": ("{% for i in range(2 ** 63) %}x{% endfor %}", "a power"),
    "large range": (
        "{% for i in range(9223372036854775808) %}x{% endfor %}",
        "the number 9223372036854775808",
    ),
    "range above the sandbox's": ("{% for i in range(9000000) %}x{% endfor %}", "OverflowError"),
    "long text": ("{{ 'x' * 100000000000 }}", "the number 100000000000"),
    "wide text": ("{{ '%099999999d' | format(1) }}", "the width in '%099999999d'"),
    "long text of a variable": ("{{ 'x' * (messages | length * 9000000 * 9000000) }}", "more than 512 MiB"),
    "text above the limit": ("{{ 'x' * 9000000 }}{{ 'x' * 8000000 }}", "writes 17,000,000 characters"),
    "doubling": (_DOUBLING, "(more than 512 MiB|computes for more than)"),
    "power of powers": ("{{ 9 ** 9 ** 9 }}", "a power"),
    "endless loop": (_LOOP, "computes for more than"),
    "deep recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "(RecursionError|computes for)"),
    "endless in our own texts": (
        "{% if messages[-1].content == 'vxwq' %}"
        + _LOOP
        + "{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}",
        "refuses it .TemplateLimitError: it computes for more than",
    ),
    "many digits": ("{{ '9' * 5000 | int }}", ""),
    **{name: (text, "computes for more than") for name, text in ENDLESS.items()},
}
