"""The datasets of a training run: the function that `pretrain` calls to build them.

Every rank builds and reads its own data (`is_distributed`): each stage with a tap needs the masks, which Megatron's
broadcast gives to the last stage only. Megatron builds the index of a text set on rank 0; the other ranks wait at a
barrier and then read the files that rank 0 wrote. An error on rank 0 would leave them waiting, so `checks` first
looks for everything that can go wrong, on every rank, without a collective.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.object_storage_utils import is_object_storage_path
from megatron.core.tokenizers import MegatronTokenizerBase
from megatron.training import get_args, get_tokenizer

from megatron_fdd.data.batch import Batch, get_batch
from megatron_fdd.data.checks import check_data_args
from megatron_fdd.data.datasets import InstructionDataset, MockTextDataset, TextDataset
from megatron_fdd.data.index_cache import keep_cache_sums, told_cache
from megatron_fdd.data.packing import PackedInstructionDataset
from megatron_fdd.data.prepared import set_kind
from megatron_fdd.data.sources import blends, cuts_documents, data_prefixes, evaluates

__all__ = ["Batch", "build_datasets", "check_data_args", "get_batch", "train_valid_test_provider"]


def train_valid_test_provider(
    num_samples: Sequence[int | None], vp_stage: int | None = None
) -> list[MegatronDataset | list[MegatronDataset] | None]:
    """Return the train, validation and test dataset; None for those that the run does not read.

    `vp_stage` is part of Megatron's interface; every chunk reads the same data. Collectives over the world: one
    barrier for each text dataset.
    """
    return build_datasets(get_args(), num_samples, get_tokenizer())


def build_datasets(
    args: argparse.Namespace, num_samples: Sequence[int | None], tokenizer: MegatronTokenizerBase
) -> list[MegatronDataset | list[MegatronDataset] | None]:
    """Return what `train_valid_test_provider` returns, from explicit arguments.

    Raises:
        ValueError: the index cache could not be written; on rank 0 alone, the only one that writes it.
    """
    prefixes = data_prefixes(args)
    config = _dataset_config(args, tokenizer)
    dataset_class: type[MegatronDataset] = TextDataset
    if config.mock:
        dataset_class = MockTextDataset
    elif _has_documents(args, prefixes[0]):  # all sets have one kind (checks.check_data_args)
        dataset_class = PackedInstructionDataset if config.inter_document_masking else InstructionDataset
    builder = BlendedMegatronDatasetBuilder(dataset_class, list(num_samples), lambda: True, config)
    with told_cache(args):
        built = builder.build()
    keep_cache_sums(args)
    return built


def _has_documents(args: argparse.Namespace, prefix: str) -> bool:
    """Whether samples are made of single documents: instructions, or text with `--fdd-text-units documents`."""
    if is_object_storage_path(prefix):
        return False
    return set_kind(prefix) == "instruction" or cuts_documents(args)


def _dataset_config(args: argparse.Namespace, tokenizer: MegatronTokenizerBase) -> GPTDatasetConfig:
    """Return Megatron's dataset configuration for Megatron's flags."""
    blend, per_part = blends(args)
    sequences = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path, encoding="utf-8") as file:
            sequences = json.load(file)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=per_part,
        # Megatron's default of --split is set even if each part has a data path of its own and needs none.
        split=args.split if blend is not None else None,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=tokenizer,
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        inter_document_masking=args.dataloader_inter_document_masking,
        # Causal attention needs no mask, and with [S, S] for each sample it would be the largest tensor of a batch.
        create_attention_mask=args.reset_attention_mask,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        sequences_per_dataset=sequences,
        context_parallel_size=args.context_parallel_size,
    )
    if blend is not None and not evaluates(args):
        # Otherwise they would be built all the same, and the loader would refuse them: "no sample to consume".
        config.split_matrix[1:] = [None, None]
    return config
