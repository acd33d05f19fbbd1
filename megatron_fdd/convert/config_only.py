"""A checkpoint with a model's arguments and without its weights: to plan a run before they are downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.hf_companions import HF_FOLDER, set_tokenizer, write_companions
from megatron_fdd.convert.hf_folder import CONFIG_FILES, HfFolder
from megatron_fdd.convert.hf_writer import check_new_folder
from megatron_fdd.convert.mcore_model import DTYPES, complete_args
from megatron_fdd.convert.ranks import conversion_ranks, shared_new_folder
from megatron_fdd.host.checkpoint import RELEASE, TRACKER_FILE
from megatron_fdd.host.json_file import read_json, write_json
from megatron_fdd.host.together import together


def config_to_mcore(
    hf_model: Path, save: Path, *, dtype: str = "checkpoint", vocabulary_divisor: int = 128
) -> None:
    """Write the checkpoint of `hf_to_mcore` without weights, from config.json and tokenizer alone.

    A run refuses such a checkpoint (`find_checkpoint`), but `--fdd-dry-run` accepts it.

    Args:
        dtype, vocabulary_divisor: as for `hf_to_mcore`; "checkpoint" is the dtype that config.json names.

    Collectives: those of `dist_checkpointing.save`, and barriers, over all ranks.

    Raises:
        ValueError: something in config.json cannot be converted exactly; the message names it. The same on every rank.
    """
    hf_model, save = Path(hf_model), Path(save)
    with conversion_ranks():
        from megatron.core import dist_checkpointing

        from megatron_fdd.convert.checkpoint_entries import Pieces
        from megatron_fdd.convert.mcore_checkpoint import told_causes
        from megatron_fdd.convert.streaming_save import StreamingSave

        with together():
            check_new_folder(save, "--save")
            config = HfFolder(hf_model).config
            family = family_of(config)
            args = complete_args(
                {**family.fixed, **family.megatron_args(config)},
                dtype=_dtype(config) if dtype == "checkpoint" else DTYPES[dtype],
                vocabulary_divisor=vocabulary_divisor,
            )
            set_tokenizer(args, hf_model, save)
        with shared_new_folder(save, "--save") as unfinished:
            target = unfinished / RELEASE
            if dist.get_rank() == 0:
                target.mkdir()
            dist.barrier()
            state = {"args": args, "checkpoint_version": 3.0, "iteration": 0}
            with told_causes():
                dist_checkpointing.save(state, str(target), StreamingSave(Pieces({}, ()), _read_nothing))
            with together():
                if dist.get_rank() == 0:
                    (unfinished / TRACKER_FILE).write_text(RELEASE)
                    write_companions(hf_model, unfinished)
                    if config != read_json(hf_model / CONFIG_FILES[0]):
                        write_json(unfinished / HF_FOLDER / CONFIG_FILES[0], config)


def _read_nothing(name: str) -> list[torch.Tensor]:
    raise AssertionError(f"{name} is not to be written")


def _dtype(config: dict[str, object]) -> torch.dtype:
    """Return the dtype that transformers wrote into a config, under the newer or the older name of the field."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise ValueError(f"config.json names the dtype {name!r}; choose one with --dtype")
    return DTYPES[str(name)]
