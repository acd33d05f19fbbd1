"""Files and texts of many kinds, each changed at random and read by the code of the tools."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.hf_source import check_names
from megatron_fdd.convert.vocabulary import copy_tokenizer
from megatron_fdd.data.chat import ChatSampler
from megatron_fdd.data.chat_template import ChatSettings
from megatron_fdd.data.encode import Encoder, EncodeSettings
from megatron_fdd.data.megatron_tokenizer import load_tokenizer, text_tokenizer
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.prepared import open_set
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.data.tokenizer_identity import identity_of_folder
from megatron_fdd.evaluate import tokenizer as evaluate_tokenizer
from megatron_fdd.evaluate.answers import AnswersFile
from megatron_fdd.evaluate.data_file import Selection, read_data_file
from megatron_fdd.evaluate.models import NamedModel, num_positions
from megatron_fdd.evaluate.perplexity import read_texts
from megatron_fdd.evaluate.report import make_report
from megatron_fdd.evaluate.report.runs import read_runs
from megatron_fdd.step.metrics import MetricsFile, check_metrics_file
from tests.convert import toys
from tests.data.chat_templates import CHATML, chat_template
from tests.evaluate import report_files
from tests.hostile import configs, mutate
from tests.hostile.fuzz_inputs import CHATS, VARIANTS, root_of, tokenizer_settings
from tests.hostile.tools import QUESTION

_PIECES = """
{% for m in messages %}|{% endfor %}|{% if m %}|{% else %}|{% endif %}|{{ m.content }}|{{ m.role }}|{{ messages }}
{{ messages[0] }}|{{ messages[5].x.y }}|{{ 1 / 0 }}|{{ 'x' * 10000000000 }}|{{ 7 ** 9 }}|{% set a = 'x' * 1000 %}
{% set a = a ~ a %}|{{ a }}|{% for i in range(99999) %}|{{ i }}|{{ tools | tojson }}|{{ raise_exception('no') }}
{{ strftime_now('%Y') }}|{{ strftime_now(5) }}|{% generation %}|{% endgeneration %}|{% macro f(x) %}|{% endmacro %}
{{ f(f(1)) }}|{{ messages | map(attribute='x') }}|{{ '%099999999d' | format(1) }}|{{ 'a' | center(100000000) }}
{{ messages | sum }}|{% break %}|{{ -5 % 0 }}|{{ [1] | first + 'a' }}|{{ namespace(a=1) }}
{{ messages.__class__ }}|{{ ''.join(5) }}|{% set messages = 5 %}|\x00|\ud800
""".replace("\n", "|").split("|")


def config(rng: random.Random, folder: Path) -> None:
    """Read a config.json by its family."""
    config = mutate.json_value(rng, configs.config_of(rng.choice(VARIANTS)))
    family = family_of(config)
    args = family.megatron_args(config)
    family.rows(config)
    family.keep_layers(config, range(0, args["num_layers"], 2))


def safetensors(rng: random.Random, folder: Path) -> None:
    """Read the files of weights, or their index."""
    shutil.copytree(root_of(folder) / "shards", folder / "hf")
    path = rng.choice(sorted((folder / "hf").glob("*.safetensors*")))
    content = path.read_bytes()
    if path.suffix == ".json":
        path.write_text(mutate.json_text(rng, json.loads(content)))
    else:
        length = int.from_bytes(content[:8], "little")
        header = content[8 : 8 + length]
        if rng.random() < 0.5:
            header = mutate.json_text(rng, json.loads(header)).encode("utf-8", "surrogatepass")
        else:
            header = mutate.raw(rng, header)
        length = len(header) if rng.random() < 0.8 else rng.choice(mutate.NUMBERS) % 2**64
        path.write_bytes(length.to_bytes(8, "little") + header + content[8 + length :])
    opened = HfFolder(folder / "hf")
    check_names(family_of(opened.config), opened)
    for name in opened.tensors:
        opened.read(name).sum()


def lines(rng: random.Random, folder: Path) -> None:
    """Prepare JSON lines, or read them to evaluate."""
    rows = [mutate.json_text(rng, rng.choice(CHATS)) for _ in range(3)]
    path = folder / "data.jsonl"
    path.write_bytes("\n".join(rows).encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        path.write_bytes(mutate.raw(rng, path.read_bytes()))
    template = rng.choice((None, "alpaca", "none", "chat"))
    settings = EncodeSettings(
        tokenizer_settings(root_of(folder)), "instruction", seq_length=24, template=template
    )
    if rng.random() < 0.5:
        read = rng.choice((lambda: read_texts(path), lambda: read_data_file("data", path, Selection())))
        read()
        return
    prepare(PrepareSettings((str(path),), str(folder / "set"), settings))


def tokenizer_files(rng: random.Random, folder: Path) -> None:
    """Read the files of a tokenizer."""
    place = root_of(folder) / "teacher-hf"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(place / name, folder / name)
    name = rng.choice(("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json"))
    content = {"a": 1, "b": 0} if not (folder / name).exists() else json.loads((folder / name).read_text())
    if name == "vocab.json":
        (folder / "tokenizer.json").unlink()
    text = mutate.json_text(rng, content)
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    act = rng.choice((identity_of_folder, _copy_tokenizer, _load_tokenizer, _encoder))
    act(folder)


def _copy_tokenizer(folder: Path) -> None:
    copy_tokenizer(folder, folder / "copy")


def _load_tokenizer(folder: Path) -> None:
    evaluate_tokenizer.load_tokenizer(folder, str(folder))


def _encoder(folder: Path) -> None:
    settings = EncodeSettings(TokenizerSettings("HuggingFaceTokenizer", str(folder)), "jsonl")
    Encoder(settings, text_tokenizer(load_tokenizer(settings.tokenizer)))


def prepared_set(rng: random.Random, folder: Path) -> None:
    """Open a prepared set."""
    ends = (".bin", ".idx", ".prepared.json")
    for end in ends:
        shutil.copyfile(f"{root_of(folder) / 'text'}{end}", folder / f"text{end}")
    path = folder / f"text{rng.choice(ends[1:])}"
    if path.suffix == ".json":
        path.write_text(mutate.json_text(rng, json.loads(path.read_text())))
    else:
        path.write_bytes(mutate.raw(rng, path.read_bytes()))
    open_set(str(folder / "text"))


def report(rng: random.Random, folder: Path) -> None:
    """Read metrics and an evaluation, and draw some of them."""
    (folder / "run").mkdir()
    records = [report_files.record(number) for number in range(1, 6)]
    records[rng.randrange(5)] = mutate.json_value(rng, records[2])
    lines = [json.dumps(record) for record in records]
    if rng.random() < 0.3:
        lines[rng.randrange(5)] = mutate.json_text(rng, records[2])
    (folder / "run/metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "run/evaluation.json").write_text(mutate.json_text(rng, report_files.evaluation()))
    runs = read_runs([str(folder / "run")])
    if rng.random() < 0.1:
        make_report(runs)  # draws pictures, which takes seconds


def resumed_metrics(rng: random.Random, folder: Path) -> None:
    """Go on with a metrics file."""
    path = folder / "metrics.jsonl"
    lines = [json.dumps(report_files.record(number)) for number in range(1, 6)]
    lines[rng.randrange(5)] = mutate.json_text(rng, report_files.record(2))
    path.write_text("\n".join(lines) + rng.choice(("", "\n")))
    check_metrics_file(str(path))
    MetricsFile(str(path), rng.randrange(7))


def answers(rng: random.Random, folder: Path) -> None:
    """Go on with a file of answers."""
    lines = [
        {"settings": {"seed": 10, "a": [1]}},
        *({"number": n, "answer": "a", "rouge_l": 5.0} for n in range(3)),
    ]
    texts = [json.dumps(line) for line in lines]
    texts[rng.randrange(4)] = mutate.json_text(rng, rng.choice(lines))
    (folder / "answers.jsonl").write_text("\n".join(texts) + "\n")
    AnswersFile(folder / "answers.jsonl", {"seed": 10, "a": [1]})


def evaluated_model(rng: random.Random, folder: Path) -> None:
    """Read the config.json of a model to evaluate."""
    config = mutate.json_value(rng, configs.config_of(rng.choice(VARIANTS)))
    toys.write_json(folder / "config.json", config)
    num_positions(NamedModel("m", folder).config())


def template(rng: random.Random, folder: Path) -> None:
    """Write a conversation with a chat template."""
    drawn = "".join(rng.choices(_PIECES, k=rng.randrange(1, 12)))
    text = mutate.text(rng, CHATML) if rng.random() < 0.3 else drawn
    ChatSampler(chat_template(text), ChatSettings()).samples(QUESTION, "x", Counter())
