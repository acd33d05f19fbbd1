"""The Hugging Face files that travel beside a Megatron checkpoint: `hf/` and `tokenizer/` in its folder."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from megatron_fdd.convert.config_class import check_config_class
from megatron_fdd.convert.hf_folder import CONFIG_FILES, copy_files
from megatron_fdd.convert.left_out import LEFT_OUT_FOLDER
from megatron_fdd.convert.vocabulary import copy_tokenizer
from megatron_fdd.data.tokenizer_identity import TOKENIZER_FOLDER, check_copy, has_tokenizer
from megatron_fdd.host.json_file import read_json

HF_FOLDER = "hf"
_STALE_S = 24 * 3600.0


def write_companions(hf_model: Path, folder: Path) -> None:
    """Copy a model's configs and tokenizer beside the checkpoint in `folder`.

    Raises:
        ValueError: they are damaged, or transformers cannot read them.
    """
    check_config_class(read_json(hf_model / CONFIG_FILES[0]))
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

    With them, `mcore_to_hf` needs no flags for the trained checkpoint. A folder appears when it is whole, whoever else
    copies it at the same time. What runs left that were killed more than a day ago is removed.

    Raises:
        OSError: names what cannot be read, or the folder that cannot be made.
    """
    for name in (HF_FOLDER, TOKENIZER_FOLDER):
        _carry(load / name, save, shutil.copyfile)


def link_left_out(load: Path, save: Path) -> None:
    """Give the save folder what an import kept beside the checkpoint `load`, as `carry_companions` does.

    Its files are linked, for they may have the size of a model. Where the file system has no such links an export
    looks for them beside `load`.
    """
    with contextlib.suppress(OSError):
        _carry(load / LEFT_OUT_FOLDER, save, os.link)


def _carry(folder: Path, save: Path, copy: Callable[[Path, Path], object]) -> None:
    """Copy a folder file by file, if it is there and `save` has none of its name."""
    _sweep(save, folder.name)
    if not folder.is_dir() or _is_there(save / folder.name):
        return
    partial = save / f".{folder.name}.{secrets.token_hex(8)}.incomplete"
    try:
        _copy_folder(folder, partial, copy)
        partial.rename(save / folder.name)  # an empty folder is replaced
    except OSError as error:
        if _is_there(save / folder.name):
            return
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if any(Path(name).is_relative_to(partial) for name in names):  # which is gone when one reads of it
            raise OSError(error.errno, error.strerror, str(save / folder.name)) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_there(folder: Path) -> bool:
    """Whether something is in the place of a folder, other than an empty one."""
    if folder.is_dir():
        return any(folder.iterdir())
    return folder.exists() or folder.is_symlink()


def _sweep(save: Path, name: str) -> None:
    """Remove copies that were begun long ago and not ended."""
    for partial in save.glob(f".{name}.*incomplete"):
        with contextlib.suppress(OSError):  # what cannot be removed harms nobody
            if time.time() - partial.lstat().st_mtime > _STALE_S and partial.is_dir():
                shutil.rmtree(partial)


def _copy_folder(source: Path, target: Path, copy: Callable[[Path, Path], object]) -> None:
    """Copy a folder, and stop at the first error; `shutil.copytree` makes one without words of all of them."""
    target.mkdir()
    for path in sorted(source.iterdir()):
        if path.is_dir():
            _copy_folder(path, target / path.name, copy)
        else:
            copy(path, target / path.name)


def _started_from(args: Namespace) -> list[Path]:
    """List the checkpoints that the training run behind `args` was given."""
    given = [getattr(args, name, None) for name in ("load", "pretrained_checkpoint")]
    return [Path(path) for path in given if path]


def find_beside(load: Path, args: Namespace, name: str) -> Path | None:
    """Find a folder of this name beside the checkpoint, or beside the one that the training run started from."""
    return next((folder / name for folder in (load, *_started_from(args)) if (folder / name).is_dir()), None)


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
        ValueError: none of these places has one, or what is found is damaged.
    """
    if given is not None:
        if not has_tokenizer(Path(given)):
            raise ValueError(f"--tokenizer {given}: not a folder with a tokenizer; give another")
        check_copy(Path(given))
        return Path(given)
    candidates = [folder / TOKENIZER_FOLDER for folder in (load, *_started_from(args))]
    if getattr(args, "tokenizer_model", None):
        candidates.append(Path(args.tokenizer_model))
    for folder in candidates:
        if has_tokenizer(folder):
            check_copy(folder)
            return folder
    raise ValueError(
        f"no tokenizer for {load} ({', '.join(str(path) for path in candidates)}); pass --tokenizer with a "
        "folder that holds one"
    )
