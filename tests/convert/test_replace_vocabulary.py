"""A student with another model's vocabulary: its rows, its files, what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from megatron_fdd import convert
from megatron_fdd.convert.new_vocabulary import NewVocabulary
from megatron_fdd.convert.token_bytes import TokenBytes
from megatron_fdd.convert.vocabulary_source import VocabularySource
from megatron_fdd.data.tokenizer_identity import compare, identity_of_folder
from megatron_fdd.host.checkpoint import TRACKER_FILE
from tests.convert import toy_gpt2, toys
from tests.convert.toy_vocabularies import make_student, make_teacher, write_byte_level, write_sentencepiece
from tests.data.tokenizer_identity import variants


def row_of(old: torch.Tensor, origin: list[int], is_kept: bool) -> torch.Tensor:
    """Return the float64 row: an old one, or halfway between the mean of the pieces and that of all rows."""
    mean = (old[origin] if origin else old).double().mean(0)
    return mean if is_kept else (mean + old.double().mean(0)) / 2


def expected_origins(student: Path, teacher: Path, rows: int) -> list[list[int]]:
    """By definition, a token at a time."""
    old, new = TokenBytes.read(student), TokenBytes.read(teacher)
    origins = []
    for number in range(rows):
        data = new.by_id.get(number)
        same = [each for each, found in old.by_id.items() if found == data]
        same = [each for each in same if not old.is_idle(each)]
        origins.append(same[:1] or ([] if data is None else old.pieces(data)))
    return origins


@pytest.mark.parametrize("variant", ["plain", "tied", "bfloat16", "gemma3_text"])
def test_rows_are_old_ones_or_like_their_pieces(tmp_path: Path, variant: str) -> None:
    student, teacher = make_student(tmp_path / "student", variant), make_teacher(tmp_path / "teacher")
    vocabulary = convert.replace_vocabulary(student, teacher, tmp_path / "new", max_shard_size="60KB")
    origins = expected_origins(student, teacher, 500)
    origins[449] = [2]  # the end of a text
    assert [list(origin) for origin in vocabulary.origins][:450] == origins[:450]
    counts = vocabulary.num_kept, vocabulary.num_cut, vocabulary.num_without
    assert sum(counts) == 500
    assert min(counts) > 10
    before = {
        name: value for path in student.glob("*.safetensors") for name, value in load_file(path).items()
    }
    files = sorted((tmp_path / "new").glob("*.safetensors"))
    assert len(files) > 1
    after = {name: value for path in files for name, value in load_file(path).items()}
    assert after.keys() == before.keys()
    changed = {"model.embed_tokens.weight", "lm_head.weight"} & before.keys()
    for name, value in after.items():
        if name not in changed:
            assert torch.equal(value, before[name])
            continue
        assert value.shape == (500, 48)
        assert value.dtype == before[name].dtype
        for number, origin in enumerate(vocabulary.origins):
            is_kept = vocabulary.is_kept[number]
            if is_kept:
                assert torch.equal(value[number], before[name][origin[0]])
            mean = row_of(before[name], list(origin), is_kept)
            assert torch.allclose(
                value[number].double(), mean, rtol=1e-2 if variant == "bfloat16" else 1e-5, atol=1e-6
            )
    assert toys.hf_logits(tmp_path / "new", toys.TOKENS).shape[-1] == 500


def test_files_of_both_models(tmp_path: Path) -> None:
    student, teacher = make_student(tmp_path / "student"), make_teacher(tmp_path / "teacher")
    new = tmp_path / "new"
    convert.replace_vocabulary(student, teacher, new)
    before = toys.read_json(student / "config.json")
    ids = {"bos_token_id": None, "eos_token_id": 449, "pad_token_id": None}
    assert toys.read_json(new / "config.json") == {**before, **ids, "vocab_size": 500}
    generation = {"temperature": 0.6, **ids, "eos_token_id": [449, 451]}
    assert toys.read_json(new / "generation_config.json") == generation
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (new / name).read_bytes() == (teacher / name).read_bytes()
    assert compare(identity_of_folder(new), identity_of_folder(teacher)).difference is None
    assert {path.name for path in new.iterdir()} == {
        "checksums.json", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_a_renumbered_vocabulary_is_the_same_model(tmp_path: Path) -> None:
    """Gradients of nothing: tokens that only have other ids give the same logits."""
    toys.make_llama(tmp_path / "student", tokenizer=False, vocab_size=452)
    write_byte_level(tmp_path / "student")
    words = variants.base()["model"]["vocab"]
    order = torch.randperm(449, generator=torch.Generator().manual_seed(5)).tolist()

    def renumber(content: dict[str, Any]) -> None:
        content["model"]["vocab"] = {token: order[number] for token, number in words.items()}

    variants.write(tmp_path / "teacher", variants.variant(renumber))
    assert len(words) == 449
    vocabulary = convert.replace_vocabulary(tmp_path / "student", tmp_path / "teacher", tmp_path / "new")
    assert vocabulary.num_kept == 452
    theirs = torch.tensor([*order, 449, 450, 451])
    ours = toys.hf_logits(tmp_path / "student", toys.TOKENS)
    assert torch.equal(toys.hf_logits(tmp_path / "new", theirs[toys.TOKENS])[..., theirs], ours)


def origins_of(student: Path, teacher: Path) -> dict[str, list[int]]:
    sources = [VocabularySource.find(folder, "--flag") for folder in (student, teacher)]
    vocabulary = NewVocabulary.between(*sources)
    names = TokenBytes.read(teacher).tokenizer.get_vocab()
    return {token: list(vocabulary.origins[number]) for token, number in names.items()}


def test_special_tokens_by_name_then_by_role_then_by_pieces(tmp_path: Path) -> None:
    student = write_byte_level(tmp_path / "student", bos_token="<|im_start|>", eos_token="<|im_end|>")
    write_sentencepiece(tmp_path / "teacher", ("<|im_start|>", "<begin>", "<fin>"))
    found = origins_of(student, tmp_path / "teacher")
    old = TokenBytes.read(student)
    names = old.tokenizer.get_vocab()
    assert found["<|im_start|>"] == [names["<|im_start|>"]]  # by name, though it is "unknown" there
    assert found["<fin>"] == [names["<|im_end|>"]]
    # The old begin has been given away: two rows alike would share its probability.
    assert found["<begin>"] == old.pieces(b"<begin>") != []
    assert found["<0x61>"] == []
    assert found["<0x0A>"] == [old.by_bytes[b"\n"]]


def test_a_text_that_looks_like_a_special_token_is_none(tmp_path: Path) -> None:
    """Gemma's `<s>` is text, and Llama's begins one."""
    gemma = write_sentencepiece(tmp_path / "gemma", ("<unk>", "<bos>", "<eos>"))
    tokenizer = Tokenizer.from_file(str(gemma / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ("<s>", "<call>")])
    tokenizer.save(str(gemma / "tokenizer.json"))
    llama = write_sentencepiece(tmp_path / "llama")
    found = origins_of(gemma, llama)
    assert [found[name] for name in ("<s>", "</s>")] == [[1], [2]]
    found = origins_of(llama, gemma)
    assert [found[name] for name in ("<bos>", "<eos>")] == [[1], [2]]
    assert found["<s>"] == TokenBytes.read(llama).pieces(b"<s>") != [1]
    assert 1 not in found["<s>"]
    markers = write_sentencepiece(tmp_path / "markers", ("<unk>", "<call>", "<fin>"))
    assert origins_of(gemma, markers)["<call>"] == [1]  # a role comes before a name that is text


def test_where_a_vocabulary_is_found(tmp_path: Path) -> None:
    student = make_student(tmp_path / "student")
    teacher = make_teacher(
        tmp_path / "teacher", text_config={"vocab_size": 490, "eos_token_id": 3}, vocab_size=495
    )
    alone = write_byte_level(tmp_path / "alone")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(alone, checkpoint / "tokenizer")
    shutil.copytree(teacher, checkpoint / "hf")
    (checkpoint / TRACKER_FILE).write_text("release")
    for place, rows, ends in ((teacher, 495, 449), (alone, 452, 449), (checkpoint, 495, 449)):
        convert.replace_vocabulary(student, place, tmp_path / "new")
        config = toys.read_json(tmp_path / "new" / "config.json")
        assert (config["vocab_size"], config["eos_token_id"]) == (rows, ends)
        shutil.rmtree(tmp_path / "new")
    config = toys.read_json(teacher / "config.json")
    del config["vocab_size"]
    toys.write_json(teacher / "config.json", config)
    assert VocabularySource.find(teacher, "--flag").num_rows == 490
    toys.write_json(teacher / "config.json", {**config, "vocab_size": 100})  # added tokens without rows
    assert VocabularySource.find(teacher, "--flag").num_rows == 452


def test_gpt2_and_a_head_that_repeats_the_embedding(tmp_path: Path) -> None:
    student = toy_gpt2.make_gpt2(tmp_path / "student", "plain", vocab_size=298)
    write_sentencepiece(student)
    tensors = load_file(student / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, student / "model.safetensors", metadata={"format": "pt"})
    convert.replace_vocabulary(student, make_teacher(tmp_path / "teacher"), tmp_path / "new")
    after = load_file(tmp_path / "new" / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["transformer.wte.weight"])
    assert len(after["lm_head.weight"]) == 500
    assert toys.hf_logits(tmp_path / "new", toys.TOKENS).isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("same", "has this vocabulary already, so there is nothing to do"),
        ("no folder", "^--vocabulary-of .* is not a folder; give"),
        ("no tokenizer", "^.*teacher: has no tokenizer.json; save"),
        ("no own tokenizer", "^.*student: has no tokenizer.json; save"),
        ("size", "has vocab_size: 'many', which must be"),
        ("rows", "lm_head.weight of shape .298, 48. does not fit config.json, which makes it .299, 48."),
        ("damaged", "model.embed_tokens.weight is not what checksums.json says"),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path: Path, wrong: str, message: str) -> None:
    student, teacher = make_student(tmp_path / "student"), make_teacher(tmp_path / "teacher")
    given = {"same": student, "no folder": tmp_path / "none"}.get(wrong, teacher)
    if wrong in ("no tokenizer", "no own tokenizer"):
        ((teacher if wrong == "no tokenizer" else student) / "tokenizer.json").unlink()
    elif wrong in ("size", "rows"):
        path = (teacher if wrong == "size" else student) / "config.json"
        size = "many" if wrong == "size" else 299
        toys.write_json(path, {**toys.read_json(path), "vocab_size": size})
    elif wrong == "damaged":
        convert.init_student(student, [0, 1], tmp_path / "copy")
        student = tmp_path / "copy"
        tensors = load_file(student / "model.safetensors")
        tensors["model.embed_tokens.weight"][7] += 1
        save_file(tensors, student / "model.safetensors")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        convert.replace_vocabulary(student, given, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_more_ids_for_the_same_words_are_a_new_vocabulary(tmp_path: Path) -> None:
    """A chat model's teacher has markers for which the base model has no row."""
    toys.make_llama(tmp_path / "student", tokenizer=False, vocab_size=452)
    write_byte_level(tmp_path / "student")
    variants.write(tmp_path / "teacher", variants.variant(variants.add_added))
    vocabulary = convert.replace_vocabulary(tmp_path / "student", tmp_path / "teacher", tmp_path / "new")
    assert (vocabulary.num_kept, vocabulary.num_cut) == (452, 1)
