"""The tokenizer that a checkpoint stores, compared with the one that a run uses."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path

import pytest
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.config import TokenizerConfig

from megatron_fdd.convert.vocabulary import copy_tokenizer
from megatron_fdd.data.encode import EncodeSettings
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.pairing import check_checkpoint_tokenizer, ids_of_tokenizer
from megatron_fdd.data.prepare import PrepareSettings, prepare
from megatron_fdd.data.sources import open_sets
from megatron_fdd.data.token_ids import check_token_ids
from megatron_fdd.data.tokenizer import TokenizerSettings
from megatron_fdd.host.role import Role
from tests.data.conftest import megatron_args, write_jsonl
from tests.data.tokenizer_identity import variants
from tests.data.tokenizer_identity.variants import Content


def checkpoint(folder: Path, content: Content | None = None) -> str:
    """Make a checkpoint's folder that has only its tokenizer."""
    variants.write(folder / "source", content)
    copy_tokenizer(folder / "source", folder / "tokenizer")
    return str(folder)


def check(load: str, own: Path, *flags: str, role: Role = Role.TEACHER) -> None:
    """Check as a run does whose --tokenizer-model is `own`."""
    args = megatron_args(*(flags or ("--mock-data",)))
    args.tokenizer_model, args.tokenizer_type = str(own), "HuggingFaceTokenizer"
    check_checkpoint_tokenizer(
        role, load, args, load_tokenizer(TokenizerSettings(args.tokenizer_type, str(own)))
    )


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return variants.write(tmp_path / "own")


def test_the_same_tokenizer_says_nothing(own: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for role in Role:
            check(checkpoint(tmp_path / role.value), own, role=role)
        check(str(tmp_path), own, role=Role.STUDENT)  # this checkpoint stores none


@pytest.mark.parametrize(
    ("content", "message"),
    [
        # The files of the stored tokenizer exist too, and name what a hash cannot.
        (variants.variant(variants.swap_words), r"id 300 is '.*' in the student and '.*' in this run"),
        (
            variants.variant(variants.with_pattern(variants.ONE_DIGIT)),
            r'"digits" .* from token 3 on is .* in the student and .* in this run',
        ),
        # tokenizer_config.json may overrule this flag: only the stamp knows what was loaded.
        (
            variants.variant(variants.flag_added("<|im_end|>", rstrip=True)),
            "only a hash is stored for the student",
        ),
    ],
)
def test_another_tokenizer_is_refused(content: Content, message: str, own: Path, tmp_path: Path) -> None:
    whole = rf"the student's tokenizer \(.*\) is not the run's \(--tokenizer-model {own}\): .*{message}.*must share"
    with pytest.raises(ValueError, match=whole):
        check(checkpoint(tmp_path / "student", content), own, role=Role.STUDENT)


def test_files_of_an_older_import_are_read_themselves(own: Path, tmp_path: Path) -> None:
    load = checkpoint(tmp_path / "teacher", variants.variant(variants.swap_words))
    path = Path(load) / "tokenizer" / "fdd_tokenizer.json"
    path.write_text(json.dumps({"vocab_size": 5, "vocab_hash": "x"}))
    with pytest.raises(ValueError, match=r"the teacher's tokenizer .*id 300 is"):
        check(load, own)
    load = checkpoint(tmp_path / "same")
    (Path(load) / "tokenizer" / "fdd_tokenizer.json").unlink()
    check(load, own)
    # tokenizer.json does not show how tokenizer_config.json changes an added token.
    index = len(variants.base()["model"]["vocab"]) + len(variants.ADDED) - 1
    flags = {"special": True, "lstrip": False, "rstrip": True, "single_word": False, "normalized": False}
    decoder = {str(index): {**flags, "content": "<|im_end|>"}}
    for folder in (own, Path(load) / "tokenizer"):
        variants.write(folder, added_tokens_decoder=decoder)
    check(load, own)


def test_what_cannot_be_compared_is_said(own: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"the teacher .* stores no tokenizer, so nothing checks"):
        check(str(tmp_path), own)
    with pytest.warns(
        UserWarning, match=r"the teacher's tokenizer .* and the run's: parts of tokenizer.json differ: merges"
    ):
        check(checkpoint(tmp_path / "merges", variants.variant(variants.swap_unrelated_merges)), own)
    args = megatron_args("--mock-data")
    args.tokenizer_type = "NullTokenizer"
    null = build_tokenizer(
        TokenizerConfig(tokenizer_type="NullTokenizer", vocab_size=500, pad_vocab_size=False)
    )
    with pytest.warns(UserWarning, match="--tokenizer-type NullTokenizer has no vocabulary"):
        check_checkpoint_tokenizer(Role.STUDENT, str(tmp_path / "merges"), args, null)
    assert ids_of_tokenizer(str(tmp_path / "merges"), null) is None
    assert ids_of_tokenizer(str(tmp_path)) is None


def test_a_token_that_only_the_student_has_must_not_be_in_the_data(tmp_path: Path) -> None:
    larger = variants.write(tmp_path / "larger", variants.variant(variants.add_added))
    teacher = checkpoint(tmp_path / "teacher")
    encode = EncodeSettings(TokenizerSettings("HuggingFaceTokenizer", str(larger)), "jsonl")
    for name, text in (("without", "two <|im_end|>"), ("with", "two <|new|>")):
        source = write_jsonl(tmp_path / f"{name}.jsonl", [{"text": text}] * 5)
        prepare(PrepareSettings((source,), str(tmp_path / name), encode))
    check(teacher, larger, "--data-path", str(tmp_path / "with"))
    num_ids = ids_of_tokenizer(teacher, load_tokenizer(encode.tokenizer))
    assert num_ids == len(variants.base()["model"]["vocab"]) + len(variants.ADDED)
    for name, expectation in (
        ("without", contextlib.nullcontext()),
        ("with", pytest.raises(ValueError, match=f"with has the token id {num_ids}, and its tokenizer has")),
    ):
        args = megatron_args("--data-path", str(tmp_path / name))
        with expectation:
            check_token_ids(args, open_sets(args), {"its tokenizer": num_ids})
