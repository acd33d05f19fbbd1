"""Models of text and images: the text part is a model of a family here, and all else passes a conversion untouched.

Files have one of two spellings: the published one, and that of transformers 5 in memory.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_fdd.convert.families.config_fields import check_fields, check_kinds
from megatron_fdd.convert.families.family import (
    Family,
    HfConfig,
    LeftOut,
    MegatronArgs,
    StoredFolder,
    WeightRow,
    refuse_field,
)
from megatron_fdd.host.field_kinds import OBJECT

_TEXT, _TIE = "text_config", "tie_word_embeddings"
# They say how images become vectors in the place of some tokens.
_ABOUT_IMAGES = frozenset(
    {
        *("vision_config", "vision_feature_layer", "spatial_merge_size", "mm_tokens_per_image"),
        *("projector_hidden_act", "multimodal_projector_bias", "initializer_range"),
        *(f"{token}_token_{kind}" for token in ("image", "boi", "eoi") for kind in ("index", "id")),
    }
)
_IMAGE_PARTS = r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\..*"


@dataclass(frozen=True, slots=True)
class Multimodal:
    """A model type for text and images.

    Attributes:
        texts: the model types that its text part can have here.
        models, limits: as in `Family`.
        ties: whether transformers ties the embeddings of a config.json that does not say it.
    """

    model_type: str
    architecture: str
    texts: tuple[str, ...]
    models: str
    limits: str = "images: the text part is trained, the rest comes back untouched"
    ties: bool = True

    def family(self, config: Mapping[str, Any], families: Mapping[str, Family]) -> Family:
        """Return the family of the text part of a config.json.

        Raises:
            ValueError: there is no text part, or one of another type.
        """
        text: Any = config.get(_TEXT)
        if not OBJECT.fits(text):
            refuse_field(
                _TEXT, text, f"where a {self.model_type} has the config of its text model; give that"
            )
        check_kinds(text)
        found = text.get("model_type")
        if found not in self.texts:
            refuse_field(
                _TEXT,
                {"model_type": found},
                f"and of a {self.model_type} only the text models {' and '.join(self.texts)} convert; choose another",
            )
        return _TextPart(self, families[found]).family()


@dataclass(frozen=True, slots=True)
class _TextPart:
    """The text part of a model.

    Attributes:
        text: the family that it would be by itself.
        is_as_in_memory: whether files spell names as transformers 5 does in memory; so are modules named.
        is_tied: whether the embeddings are tied, whatever the text part says: transformers ties those of files without
            a head.
    """

    kind: Multimodal
    text: Family
    is_as_in_memory: bool = True
    is_tied: bool = False

    def family(self) -> Family:
        head, embedding = self.text.tied
        return replace(
            self.text,
            model_type=self.kind.model_type,
            megatron_args=self.megatron_args,
            hf_config=self.hf_config,
            keep_layers=self.keep_layers,
            rows=self.rows,
            layer_prefix=self.spelled(self.text.layer_prefix),
            tied=(self.spelled(head), self.spelled(embedding)),
            left_out=LeftOut("the part for images", lambda _: _IMAGE_PARTS, dict, is_kept_always=True),
            uncut={
                **self.text.uncut,
                "hidden_size": "makes vectors of that width from images, which this would change",
            },
            variant=self.as_stored,
            of_args=self.of_args,
        )

    def spelled(self, name: str) -> str:
        """Return the name that a tensor of the text model has here."""
        if self.is_as_in_memory:
            return re.sub(r"^model\.", "model.language_model.", name)
        return f"language_model.{name}"

    def as_stored(self, _family: Family, folder: StoredFolder) -> Family:
        if not any(re.fullmatch(_IMAGE_PARTS, name) for name in folder.names):
            raise ValueError(
                f"the model is a {self.kind.model_type} without a tensor for images: get all its files, or make its "
                f"{_TEXT} the config.json of a text model"
            )
        found = replace(self, is_as_in_memory=any(name.startswith("model.") for name in folder.names))
        head, embedding = map(found.spelled, self.text.tied)
        lacks_head = embedding in folder.names and head not in folder.names
        return replace(found, is_tied=self.is_tied or (lacks_head and self.may_tie(folder.config))).family()

    def of_args(self, config: HfConfig, args: Namespace) -> Family:
        is_tied = not args.untie_embeddings_and_output_weights and self.may_tie(config)
        return replace(self, is_tied=is_tied).family()

    def may_tie(self, config: HfConfig) -> bool:
        """Whether transformers ties the embeddings of files without a head."""
        return config.get(_TIE, self.kind.ties)

    def read(self, config: HfConfig) -> HfConfig:
        """Return the config of the text model."""
        check_fields(
            config,
            model_type=self.kind.model_type,
            architecture=self.kind.architecture,
            mapped={_TEXT, _TIE},
            harmless=_ABOUT_IMAGES,
            neutral={},
        )
        return {**config[_TEXT], **({_TIE: True} if self.is_tied else {})}

    def write(self, config: HfConfig, text: HfConfig) -> HfConfig:
        """Return `config` with another text model."""
        if text == self.read(config):
            return dict(config)
        changed = {_TIE: text[_TIE]} if text.get(_TIE) != config[_TEXT].get(_TIE) else {}
        return {**config, _TEXT: text, **changed}

    def megatron_args(self, config: HfConfig) -> MegatronArgs:
        return self.text.megatron_args(self.read(config))

    def hf_config(self, config: HfConfig, args: Namespace) -> HfConfig:
        return self.write(config, self.text.hf_config(self.read(config), args))

    def keep_layers(self, config: HfConfig, layers: Sequence[int]) -> HfConfig:
        return self.write(config, self.text.keep_layers(self.read(config), layers))

    def rows(self, config: HfConfig) -> list[WeightRow]:
        rows = self.text.rows(self.read(config))
        return [replace(row, sources=tuple(map(self.spelled, row.sources))) for row in rows]


MISTRAL3 = Multimodal(
    "mistral3",
    "Mistral3ForConditionalGeneration",
    ("mistral", "ministral3"),
    models="Mistral Small 3.1 and 3.2, Ministral 3",
)
GEMMA3 = Multimodal("gemma3", "Gemma3ForConditionalGeneration", ("gemma3_text",), models="Gemma 3 from 4B on")
LLAMA4 = Multimodal(
    "llama4", "Llama4ForConditionalGeneration", ("llama4_text",), models="Llama 4 Maverick", ties=False
)
