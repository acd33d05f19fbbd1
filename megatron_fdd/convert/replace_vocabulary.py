"""A student with the vocabulary of a teacher from another family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_fdd.convert.config_class import check_config_class
from megatron_fdd.convert.derived_weights import Derived, write_derived
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.family import Family, HfConfig
from megatron_fdd.convert.hf_folder import CONFIG_FILES, HfFolder
from megatron_fdd.convert.hf_source import check_names
from megatron_fdd.convert.hf_writer import TensorSpec, check_new_folder, new_folder
from megatron_fdd.convert.new_vocabulary import NewVocabulary
from megatron_fdd.convert.vocabulary import copy_loadable_tokenizer
from megatron_fdd.convert.vocabulary_source import ROLES, VocabularySource
from megatron_fdd.data.tokenizer_identity import compare, identity_of_folder
from megatron_fdd.host.json_file import read_json, write_json

_FLAG = "--vocabulary-of"


def replace_vocabulary(
    hf_model: Path,
    vocabulary_of: Path,
    hf_out: Path,
    *,
    max_shard_size: str = "5GB",
    progress: bool = False,
) -> NewVocabulary:
    """Write a model folder that is another one with the tokenizer of a third; return where its rows come from.

    Embedding and head get rows for the tokens of `vocabulary_of` (`NewVocabulary`), as many as its own embedding has.
    Its tokenizer, chat template and the ids of tokens with a role are taken, all else is the student's.

    Args:
        vocabulary_of: a Hugging Face folder, a folder with a tokenizer alone, or a Megatron checkpoint.

    Raises:
        ValueError: the student's weights do not match its config, or transformers cannot read it; a tokenizer is
            missing, or its tokens cannot be compared; or both have the same vocabulary already.
    """
    check_new_folder(Path(hf_out), "--hf-out")
    folder = HfFolder(Path(hf_model))
    family = family_of(folder.config).as_stored(folder)
    if family.keeps_left_out:
        raise ValueError(
            f"--from {folder.path}: a {family.model_type} has tokens that stand for images, which another vocabulary "
            "lacks; give its text model alone, from fdd export --hf-config with its text_config as a config.json"
        )
    check_names(family, folder)
    old = VocabularySource.find(folder.path, "--from")
    new = VocabularySource.find(Path(vocabulary_of), _FLAG)
    _check_different(old, new)
    vocabulary = NewVocabulary.between(old, new)
    config = _with_ids(family.without_left_out(folder.config), new.ids(CONFIG_FILES[0])) | {
        "vocab_size": new.num_rows
    }
    check_config_class(config)
    folder = folder.apart(family.stacked)
    tensors = _tensors(folder, family, vocabulary)
    with new_folder(Path(hf_out), "--hf-out") as unfinished:
        write_derived(folder, tensors, unfinished, max_shard_size=max_shard_size, progress=progress)
        write_json(unfinished / CONFIG_FILES[0], config)
        if any(each.has(CONFIG_FILES[1]) for each in (old, new)):
            before = read_json(folder.path / CONFIG_FILES[1]) if old.has(CONFIG_FILES[1]) else {}
            write_json(unfinished / CONFIG_FILES[1], _with_ids(before, new.ids(CONFIG_FILES[1])))
        copy_loadable_tokenizer(new.tokenizer, unfinished, "the new folder's copy")
    return vocabulary


def _check_different(old: VocabularySource, new: VocabularySource) -> None:
    """Refuse models with one vocabulary, unless the new one has ids for which the old one has no row."""
    has_rows = new.tokens.num_ids <= old.num_rows
    theirs, ours = identity_of_folder(new.tokenizer), identity_of_folder(old.tokenizer)
    if has_rows and compare(theirs, ours).difference is None:
        raise ValueError(
            f"{_FLAG} {new.tokenizer}: {old.tokenizer} has this vocabulary already, so there is nothing to do; use it "
            "as it is"
        )


def _tensors(folder: HfFolder, family: Family, vocabulary: NewVocabulary) -> list[Derived]:
    """List the tensors of the new folder. ValueError if one with a row for each token has another number of rows."""
    rows = {name for row in family.rows(folder.config) if row.vocabulary for name in row.sources}
    rows.add(family.tied[0])  # a tied model may repeat it
    old_size = family.megatron_args(folder.config)["vocab_size"]
    left_out = family.left_out_names(folder.config, folder.names)
    tensors = []
    for name in folder.names:
        dtype, shape = folder.dtype(name), folder.shape(name)
        if name.endswith(family.ignored) or name in left_out:
            continue
        if name not in rows:
            tensors.append(Derived(TensorSpec(name, dtype, shape), (name,)))
            continue
        if shape[:1] != (old_size,):
            raise ValueError(
                f"{folder.path}: {name} of shape {list(shape)} does not fit config.json, which makes it "
                f"{[old_size, *shape[1:]]}; copy the model again"
            )
        spec = TensorSpec(name, dtype, (len(vocabulary.origins), *shape[1:]))
        tensors.append(Derived(spec, (name,), lambda parts: vocabulary.rows(next(parts))))
    return tensors


def _with_ids(config: HfConfig, ids: Mapping[str, Any]) -> HfConfig:
    """Return a config with the new model's tokens in place of its own.

    `ids` has null for what the new model lacks: transformers gives a class's own ids to a config without the field.
    """
    return {**{name: value for name, value in config.items() if name in ids or name not in ROLES}, **ids}
