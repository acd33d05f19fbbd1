"""The flags of a training that decide which text it reads."""

from __future__ import annotations

from collections.abc import Collection, Sequence

# What decides which text a training reads. All else that its command says is about the student and its layout.
_OF_THE_DATA = frozenset(
    (
        *("seed", "seq_length", "train_iters", "train_samples", "skip_train", "phase_transition_iterations"),
        *("eval_iters", "eval_interval", "start_eval_at_iter", "full_validation", "multiple_validation_sets"),
        *("validation_set_names",),
        *("global_batch_size", "eval_global_batch_size", "dataloader_type", "mock_data", "fim_data", "sft"),
        *("data_path", "split", "train_data_path", "valid_data_path", "test_data_path"),
        *("data_args_path", "per_split_data_args_path", "per_dataset_sequences_path", "data_cache_path"),
        *("dataloader_fast_cache_load", "dataloader_defer_npy_index_mmap", "mmap_bin_files"),
        *("num_dataset_builder_threads", "object_storage_cache_path", "mid_level_dataset_surplus"),
        *("dataloader_inter_document_masking", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
        *("allow_ambiguous_pad_tokens", "vocab_size", "vocab_file", "merge_file", "vocab_extra_ids"),
        *("fdd_text_units", "fdd_plugin"),
        *("metadata_path", "special_tokens", "chat_template", "pad_vocab_size"),
    )
)
# With these beginnings too.
_PREFIXES = ("tokenizer_", "tiktoken_", "null_tokenizer_")


def is_of_the_data(name: str) -> bool:
    """Whether an argument, by its name in Megatron's namespace, decides which text is read."""
    return name in _OF_THE_DATA or name.startswith(_PREFIXES)


def data_words(words: Sequence[str], also: Collection[str] = ()) -> list[str]:
    """Return the words of a command line that decide which text is read: flags with what stands behind each.

    Args:
        also: names of other arguments that are wanted.
    """
    found, is_kept = [], False
    for word in words:
        if word.startswith("--"):
            name = word.removeprefix("--").partition("=")[0].replace("-", "_")
            is_kept = is_of_the_data(name) or name in also
        if is_kept:
            found.append(word)
    return found
