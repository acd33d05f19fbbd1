"""Weights that go through Megatron-Bridge, in both directions, with the whole model in the memory of one process."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_fdd.convert.bridge import Bridge
from megatron_fdd.convert.checkpoint_entries import tensors_of
from megatron_fdd.convert.checksums import Checksums, check_finite, digest
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.hf_writer import Shard, TensorSpec
from megatron_fdd.convert.mcore_checkpoint import StoredWeights, stored_layout
from megatron_fdd.convert.mcore_model import DTYPES, complete_args, name_of

# Endings of names of tensors whose dtype differs from the weights': routers' biases are float32 in every model.
_NOT_WEIGHTS = ("e_score_correction_bias", "rotary_emb.inv_freq")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


class BridgeSource:
    """Megatron parameters made from a Hugging Face folder, and checked by converting them back to its tensors.

    Attributes:
        args: the model's complete args.
        model: the model on the CPU, with its values.
        digests: name -> SHA-256 of every tensor of the folder that is in the model.
        dtype: the dtype of the weights among these tensors, such as bfloat16; "mixed" where they differ.

    Raises:
        ValueError: there are several ranks; or something cannot be converted exactly, and the message names it.
    """

    def __init__(self, hf_model: Path, dtype: str, vocabulary_divisor: int, groups: Any) -> None:
        _check_alone()
        bridge, self._folder = Bridge(hf_model / "config.json"), HfFolder(hf_model)
        self._names = [name for name in self._folder.tensors if bridge.converts(name)]
        self.config, self.digests = bridge.config, dict[str, str]()
        weights = [name for name in self._folder.tensors if not name.endswith(_NOT_WEIGHTS)]
        params_dtype = self._folder.common_dtype(weights) if dtype == "checkpoint" else DTYPES[dtype]
        self.args = complete_args(bridge.values, dtype=params_dtype, vocabulary_divisor=vocabulary_divisor)
        self.model = bridge.build(self.args, groups)
        bridge.load(self.model, hf_model)
        self._check_way_back(bridge, keep_dtype=dtype == "checkpoint")
        _pad_vocabulary(self.model, self.args.padded_vocab_size)
        self.parameters = tensors_of(self.model)

    @property
    def dtype(self) -> str:
        """Dtype of the weights in the model, such as bfloat16; "mixed" where they differ."""
        weights = [name for name in self._names if not name.endswith(_NOT_WEIGHTS)]
        found = {name_of(self._folder.dtype(name)) for name in weights}
        return found.pop() if len(found) == 1 else "mixed"

    @property
    def num_parameters(self) -> int:
        """Number of parameters, without padding and multi-token prediction."""
        return sum(math.prod(self._folder.shape(name)) for name in self._names)

    def read(self, name: str) -> Tensor:
        """Return a parameter's padded value."""
        return self.parameters[name].detach()

    def _check_way_back(self, bridge: Bridge, *, keep_dtype: bool) -> None:
        """Refuse a folder unless the model gives every tensor back unchanged; keep the digests of the tensors."""
        expected = Checksums.read(self._folder.path)
        left = set(self._names)
        for name, tensor in bridge.export(self.model):
            if name not in left:
                raise ValueError(f"{self._folder.path} lacks {name}, which Megatron-Bridge would export")
            left.remove(name)
            source = self._folder.read(name)
            check_finite(source, f"{self._folder.path}: {name}", "take other weights")
            self.digests[name] = digest(source)
            if expected is not None:
                expected.check(self._folder.path, name, self.digests[name])
            wanted, found = (
                (source, tensor.to(source.dtype)) if keep_dtype else (source.to(tensor.dtype), tensor)
            )
            if wanted.shape != found.shape or digest(wanted) != digest(found):
                raise ValueError(f"{self._folder.path}: Megatron-Bridge does not convert {name} exactly")
        if left:
            raise ValueError(f"{self._folder.path}: Megatron-Bridge leaves out {', '.join(sorted(left))}")


class BridgeExport:
    """A model of a Megatron checkpoint, to be written as Hugging Face tensors.

    Attributes:
        config: config.json of the export.
        dtype: the dtype of the weights to write.

    Raises:
        ValueError: there are several ranks; or `config_path` describes another model than the checkpoint's.
    """

    def __init__(self, checkpoint: Path, args: Namespace, config_path: Path, dtype: str, groups: Any) -> None:
        _check_alone()
        self._bridge = Bridge(config_path)
        self._bridge.check_trained(args)
        self.config = self._bridge.config
        self.dtype = stored_layout(checkpoint)[0] if dtype == "checkpoint" else DTYPES[dtype]
        own_args = complete_args(self._bridge.values, dtype=self.dtype, vocabulary_divisor=1)
        self._model = self._bridge.build(own_args, groups)
        weights = StoredWeights(checkpoint, self._model, groups)
        if dtype == "checkpoint":
            weights.common_dtype()
        for name, tensor in tensors_of(self._model).items():
            tensor.detach().copy_(weights.read(name))
        self._tensors = self._bridge.export(self._model)

    def specs(self) -> Iterator[TensorSpec]:
        """Yield every Hugging Face tensor, in the order of Megatron-Bridge."""
        for name, tensor in self._bridge.export(self._model):
            yield TensorSpec(name, tensor.dtype, tuple(tensor.shape))

    def read(self, shard: Shard) -> Iterator[Tensor]:
        """Yield the tensors of one file; the files must be read in their order."""
        for spec, (name, tensor) in zip(shard.tensors, self._tensors, strict=False):
            assert name == spec.name, (name, spec)
            yield tensor


def _check_alone() -> None:
    """Refuse more than one rank."""
    if dist.get_world_size() > 1:
        raise ValueError("--via bridge holds the whole model in one process: start it without torchrun")


def _pad_vocabulary(model: torch.nn.Module, rows: int) -> None:
    """Add rows of zeros behind the rows of the vocabulary, as other conversions do."""
    for name, parameter in model.named_parameters():
        if name in _VOCABULARY:
            parameter.data = F.pad(parameter.data, (0, 0, 0, rows - parameter.shape[0]))
