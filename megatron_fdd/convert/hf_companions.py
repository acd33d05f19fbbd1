"""The Hugging Face files that travel beside a Megatron checkpoint: `hf/` and `tokenizer/` in its folder."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

from megatron_fdd.convert.hf_folder import CONFIG_FILES, copy_files
from megatron_fdd.convert.vocabulary import copy_tokenizer
from megatron_fdd.data.tokenizer_identity import TOKENIZER_FOLDER, has_tokenizer

HF_FOLDER = "hf"


def write_companions(hf_model: Path, folder: Path) -> None:
    """Copy a model's configs and tokenizer beside the checkpoint in `folder`."""
    copy_files(CONFIG_FILES, hf_model, folder / HF_FOLDER)
    if has_tokenizer(hf_model):
        copy_tokenizer(hf_model, folder / TOKENIZER_FOLDER)


def set_tokenizer(args: Namespace, hf_model: Path, save: Path) -> None:
    """Let the arguments name the tokenizer's copy in the checkpoint `save`, where the model has one."""
    if has_tokenizer(hf_model):
        args.tokenizer_type = "HuggingFaceTokenizer"
        args.tokenizer_model = str((save / TOKENIZER_FOLDER).absolute())


def carry_companions(load: Path, save: Path) -> None:
    """Copy the companions of the checkpoint that a training run starts from to its save folder, if they are not there.

    With them, `mcore_to_hf` needs no flags for the trained checkpoint. Only one rank calls this. A folder appears when
    it is whole: what a killed run left is replaced.
    """
    for name in (HF_FOLDER, TOKENIZER_FOLDER):
        if (load / name).is_dir() and not (save / name).exists():
            partial = save / f".{name}.incomplete"
            if partial.is_dir() and not partial.is_symlink():
                shutil.rmtree(partial)
            partial.unlink(missing_ok=True)
            _copy_folder(load / name, partial)
            partial.rename(save / name)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy a folder, and stop at the first error; `shutil.copytree` makes one without words of all of them."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        copy = _copy_folder if path.is_dir() else shutil.copyfile
        copy(path, target / path.name)


def _started_from(args: Namespace) -> list[Path]:
    """List the checkpoints that the training run behind `args` was given."""
    given = [getattr(args, name, None) for name in ("load", "pretrained_checkpoint")]
    return [Path(path) for path in given if path]


def find_hf_config(load: Path, args: Namespace, given: Path | None) -> Path:
    """Find the config.json from which an export starts.

    The places are, in this order: `given` (a file, or a folder with one), the folder beside the checkpoint, and the
    folder beside the checkpoint that the training run started from.

    Raises:
        ValueError: none of these places has one.
    """
    if given is not None:
        path = Path(given) / CONFIG_FILES[0] if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise ValueError(
                f"--hf-config {given}: no such file, nor a folder with {CONFIG_FILES[0]}; give another"
            )
        return path
    candidates = [folder / HF_FOLDER / CONFIG_FILES[0] for folder in (load, *_started_from(args))]
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(
        f"no Hugging Face config for {load} ({', '.join(str(path) for path in candidates)}); pass --hf-config "
        "with the config.json of a model of the same family"
    )


def find_tokenizer(load: Path, args: Namespace, given: Path | None) -> Path:
    """Find the tokenizer folder for an export, in the places of `find_hf_config` and then in `--tokenizer-model`.

    Raises:
        ValueError: none of these places has one.
    """
    if given is not None:
        if not has_tokenizer(Path(given)):
            raise ValueError(f"--tokenizer {given}: not a folder with a tokenizer; give another")
        return Path(given)
    candidates = [folder / TOKENIZER_FOLDER for folder in (load, *_started_from(args))]
    if getattr(args, "tokenizer_model", None):
        candidates.append(Path(args.tokenizer_model))
    for folder in candidates:
        if has_tokenizer(folder):
            return folder
    raise ValueError(
        f"no tokenizer for {load} ({', '.join(str(path) for path in candidates)}); pass --tokenizer with a "
        "folder that holds one"
    )
