"""Models of text and images: their text part converts, and all else comes back from an export byte for byte."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_fdd import convert
from megatron_fdd.convert.families import MULTIMODAL, add_family, family_of
from megatron_fdd.convert.families.mistral import MISTRAL
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.evaluate.models import Placement
from tests.convert import mcore, toys
from tests.convert.multimodal_toys import (
    FIRST_IMAGE_TOKEN,
    MODELS,
    make_multimodal,
    multimodal_config,
    multimodal_logits,
)
from tests.harness.ranks import distributed

TEXT = toys.TOKENS % FIRST_IMAGE_TOKEN
UNTIED = {"tie_word_embeddings": False}
HEAD = "language_model.lm_head.weight"


def _check(tmp_path: Path, name: str, **made: Any) -> None:
    source, saved, back = tmp_path / "source", tmp_path / "mcore", tmp_path / "back"
    if dist.get_rank() == 0:
        make_multimodal(source, name, **made)
    dist.barrier()
    imported = convert.hf_to_mcore(source, saved)
    assert (imported.left_out_are, imported.left_out_kept) == ("the part for images", True)
    model, _ = mcore.from_own_args(saved)
    expected = multimodal_logits(source, TEXT)
    assert expected.std() > 0.3
    got = mcore.logits(model, TEXT)[..., : toys.SHAPE["vocab_size"]]
    assert (got - expected).abs().max() < toys.LOGIT_TOLERANCE
    exported = convert.mcore_to_hf(saved, back)
    wanted = toys.tensor_hashes(source)
    assert (exported.num_tensors, exported.unchanged) == (len(wanted), len(wanted))
    assert toys.tensor_hashes(back) == wanted
    for file in ("config.json", "preprocessor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (back / file).read_bytes() == (source / file).read_bytes(), file


# transformers ties the embeddings of a mistral3 unless it is told otherwise, whatever its text part says.
@pytest.mark.tier("default")
@pytest.mark.parametrize(
    ("name", "made"),
    [
        *((name, {}) for name in MODELS),
        *(("mistral3", {"is_published": is_published, **UNTIED}) for is_published in (True, False)),
        ("gemma3", {"is_published": False}),
    ],
)
@distributed(tp=1)
def test_there_and_back(tmp_path: Path, name: str, made: dict[str, Any]) -> None:
    _check(tmp_path, name, **made)


@pytest.mark.tier("default")
@pytest.mark.parametrize(("name", "changes"), [("mistral3", UNTIED), ("gemma3", {}), ("llama4", {})])
@distributed(tp=2)
def test_two_ranks(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    _check(tmp_path, name, **changes)


@pytest.mark.tier("default")
def test_an_evaluation_of_text(tmp_path: Path) -> None:
    """transformers has no class of a mistral3 for text alone."""
    folder = make_multimodal(tmp_path / "source", "mistral3")
    with torch.no_grad():
        got = Placement("cpu", "float32").load(folder)(input_ids=TEXT).logits
    assert (got - multimodal_logits(folder, TEXT)).abs().max() < toys.LOGIT_TOLERANCE


@pytest.mark.tier("default")
@distributed(tp=1)
def test_a_student_of_some_layers(tmp_path: Path) -> None:
    """It keeps the part for images, and its own import and export too."""
    source = make_multimodal(tmp_path / "source", "gemma3")
    convert.init_student(source, [0, 2], tmp_path / "student")
    convert.hf_to_mcore(tmp_path / "student", tmp_path / "mcore")
    convert.mcore_to_hf(tmp_path / "mcore", tmp_path / "back")
    kept, got = toys.tensor_hashes(tmp_path / "student"), toys.tensor_hashes(tmp_path / "back")
    assert got == kept
    whole = toys.tensor_hashes(source)
    assert {name: kept[name] for name in kept if "layers.1." not in name} == {
        name: whole[name.replace("model.layers.1.", "model.layers.2.")]
        for name in kept
        if "layers.1." not in name
    }
    assert multimodal_logits(tmp_path / "back", TEXT).isfinite().all()
    assert (tmp_path / "back" / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("name", ["mistral3", "gemma3"])
@pytest.mark.parametrize("is_published", [True, False])
def test_a_narrower_student(tmp_path: Path, name: str, is_published: bool) -> None:
    """The modules that are looked at have transformers' names, whatever those of the files."""
    teacher = make_multimodal(tmp_path / "teacher", name, is_published=is_published)
    plan = convert.StudentPlan.of(teacher, [0, 2], {"ffn_hidden_size": 40})
    scores = convert.measure_importance(Placement("cpu", "float32").load(teacher), plan.probes, TEXT)
    plan.write(tmp_path / "student", scores)
    before, after = (HfFolder(tmp_path / folder) for folder in ("teacher", "student"))
    [matrix] = [each for each in before.names if each.endswith("layers.2.mlp.down_proj.weight")]
    kept = scores["decoder.layers.2.mlp"].topk(40).indices.sort().values
    assert torch.equal(after.read(matrix.replace("layers.2", "layers.1")), before.read(matrix)[:, kept])
    assert multimodal_logits(tmp_path / "student", TEXT).isfinite().all()


@pytest.mark.tier("default")
@distributed(tp=1)
def test_without_what_was_kept(tmp_path: Path) -> None:
    """Only the text model can be exported then, and only where that is asked for."""
    make_multimodal(tmp_path / "source", "mistral3", **UNTIED)
    saved = tmp_path / "mcore"
    convert.hf_to_mcore(tmp_path / "source", saved)
    shutil.rmtree(saved / "left-out")
    with pytest.raises(ValueError, match="kept the part for images.*left-out/.*copy it, or export the text"):
        convert.mcore_to_hf(saved, tmp_path / "back")
    text = toys.read_json(tmp_path / "source" / "config.json")["text_config"]
    toys.write_json(tmp_path / "text.json", {**text, "architectures": ["MistralForCausalLM"]})
    convert.mcore_to_hf(saved, tmp_path / "text", hf_config=tmp_path / "text.json")
    difference = toys.hf_logits(tmp_path / "text", TEXT) - multimodal_logits(tmp_path / "source", TEXT)
    assert difference.abs().max() < toys.LOGIT_TOLERANCE


@pytest.mark.tier("default")
@distributed(tp=1)
def test_folders_refused(tmp_path: Path) -> None:
    source = make_multimodal(tmp_path / "source", "mistral3", **UNTIED)
    [file] = source.glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: value for name, value in tensors.items() if name != HEAD}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"Missing: {HEAD}"):
        convert.hf_to_mcore(source, tmp_path / "mcore")
    text = {name: value for name, value in tensors.items() if name.startswith("language_model.")}
    save_file(text, file, {"format": "pt"})
    with pytest.raises(ValueError, match="a mistral3 without a tensor for images: get all its files"):
        convert.hf_to_mcore(source, tmp_path / "mcore")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="tokens that stand for images.*give its text model alone"):
        convert.replace_vocabulary(source, source, tmp_path / "new")


@pytest.mark.tier("default")
@distributed(tp=1)
def test_a_damaged_part_for_images(tmp_path: Path) -> None:
    """An import compares it with the folder's checksums, and an export with those of the import."""
    make_multimodal(tmp_path / "source", "mistral3")
    convert.hf_to_mcore(tmp_path / "source", tmp_path / "mcore")
    back = tmp_path / "back"
    convert.mcore_to_hf(tmp_path / "mcore", back)
    again = tmp_path / "again"
    for folder, convert_it in (
        (tmp_path / "mcore" / "left-out", lambda: convert.mcore_to_hf(tmp_path / "mcore", again)),
        (back, lambda: convert.hf_to_mcore(back, again)),
    ):
        [file] = folder.glob("*.safetensors")
        tensors = load_file(file)
        tensors["vision_tower.ln_pre.weight"] += 1
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"vision_tower\.ln_pre\.weight is not what checksums.json says"):
            convert_it()


@pytest.mark.tier("default")
@distributed(tp=1)
def test_a_part_for_images_that_no_export_could_write(tmp_path: Path) -> None:
    """It is refused before a training, not after it."""
    source = make_multimodal(tmp_path / "source", "mistral3")
    [file] = source.glob("*.safetensors")
    tensors, name = load_file(file), "vision_tower.ln_pre.weight"
    for value, message in (
        (tensors[name] * torch.inf, "16 of 16 values are not finite"),
        (tensors[name].byte(), "is stored as U8; only"),
    ):
        save_file({**tensors, name: value}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{name}.*{message}"):
            convert.hf_to_mcore(source, tmp_path / "mcore")
        assert not (tmp_path / "mcore").exists()


@pytest.mark.tier("default")
@distributed(tp=1)
def test_a_part_for_images_of_another_model(tmp_path: Path) -> None:
    for name in ("mistral3", "gemma3"):
        make_multimodal(tmp_path / name, name)
        convert.hf_to_mcore(tmp_path / name, tmp_path / f"{name}-mcore")
    kept = tmp_path / "mistral3-mcore" / "left-out"
    shutil.rmtree(kept)
    shutil.copytree(tmp_path / "gemma3-mcore" / "left-out", kept)
    with pytest.raises(ValueError, match="left-out is of another model: its .* copy the folder"):
        convert.mcore_to_hf(tmp_path / "mistral3-mcore", tmp_path / "back")
    (kept / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match="left-out, which the import kept .* is damaged .*copy it from there"
    ):
        convert.mcore_to_hf(tmp_path / "mistral3-mcore", tmp_path / "back")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text_config": ...}, "text_config.*None, where a mistral3 has the config of its text model"),
        ({"text_config": [1]}, "text_config.*where a mistral3 has the config"),
        (
            {"text_config": {}},
            "text_config.*None.*only the text models mistral and ministral3 convert; choose another",
        ),
        (
            {"text_config": {"model_type": "mistral4"}},
            "mistral4.*only the text models mistral and ministral3",
        ),
        ({"text_config": {"model_type": "mistral", "hidden_size": "4"}}, "hidden_size.*a whole number"),
        ({"architectures": ["MistralForCausalLM"]}, "architectures.*only Mistral3ForConditionalGeneration"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"new": 1}, "the mistral3 conversion does not understand: new"),
    ],
)
def test_configs_refused(changes: dict[str, Any], named: str) -> None:
    config = multimodal_config("mistral3", **changes)
    with pytest.raises(ValueError, match=named):
        family_of(config).megatron_args(config)


def test_a_run_sees_the_text_model() -> None:
    config = multimodal_config("mistral3 of ministral3")
    text, family = config["text_config"], family_of(config)
    assert family.megatron_args(config) == family_of(text).megatron_args(text)
    assert family.fixed == family_of(text).fixed
    assert family.fixed["fdd_layer_spec"] == "ministral3"


def test_a_model_type_is_added_once() -> None:
    for name in MULTIMODAL:
        with pytest.raises(ValueError, match=f"a family for the model type '{name}' already"):
            add_family(replace(MISTRAL, model_type=name))
