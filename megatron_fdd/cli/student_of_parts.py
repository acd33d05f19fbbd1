"""`fdd student` with parts of a teacher: its layers, its channels and heads, or one MLP of its experts' channels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from megatron_fdd.convert import DensePlan, StudentPlan
    from megatron_fdd.convert.dense_student import FittedMlp
    from megatron_fdd.convert.hf_folder import HfFolder

WINDOW = 512
# More hardly make a better fit (benchmarks/LOG.md).
_TOKENS_OF_A_CHANNEL = 10


def read(path: Path | None) -> list[str]:
    """Return the texts of a file, or the built-in one. ValueError if there is none."""
    from megatron_fdd.evaluate.bits import SAMPLE
    from megatron_fdd.evaluate.perplexity import read_texts

    texts = [SAMPLE] if path is None else read_texts(path)
    if not texts:
        raise ValueError(f"{path}: holds no text; give another")
    return texts


def write(
    hf_model: Path, hf_out: Path, max_shard_size: str, sizes: dict[str, int], given: dict[str, Any]
) -> str:
    """Write a student; return what to say of it.

    Args:
        sizes: those that become smaller, by the names in `SIZES`.
        given: the command's other options.
    """
    from megatron_fdd import convert

    num_layers = convert.count_layers(hf_model)
    if given["layers"] is not None:
        layers = convert.parse_layers(given["layers"], num_layers)
    else:
        layers = convert.choose_layers(
            num_layers if given["num_layers"] is None else given["num_layers"], num_layers
        )
    convert.check_new_folder(hf_out, "--hf-out")
    plan: StudentPlan | DensePlan
    if given["dense_ffn_hidden_size"] is not None:
        plan = convert.DensePlan.of(hf_model, layers, given["dense_ffn_hidden_size"])
        mlps, told = _fit(plan, given)
        parameters = plan.write(hf_out, mlps, max_shard_size=max_shard_size, progress=True)
        most = plan.mixtures[0].num_channels
        changed = f"; a {plan.config['model_type']} with {plan.width:,} of {most:,} channels in each MLP"
    else:
        plan = convert.StudentPlan.of(hf_model, layers, sizes)
        scores, told = _score(plan, given) if sizes else ({}, [])
        parameters = plan.write(hf_out, scores, max_shard_size=max_shard_size, progress=True)
        changed = "".join(f"; {name.replace('_', '-')} {value:,}" for name, value in sizes.items())
    kept = "all" if len(layers) == num_layers else ",".join(str(layer) for layer in layers)
    line = f"{hf_out}: {parameters:,} parameters, {len(layers)} layers of {hf_model}: {kept}{changed}"
    return "\n".join([line, *told, *_left_out(plan), *_pairs(layers, num_layers)])


def _score(plan: StudentPlan, given: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Run the teacher on a text; return what scores its parts have there, and what to say of it."""
    from megatron_fdd import convert

    windows = _windows(plan.folder, given)
    scores = convert.measure_importance(_load(plan.folder), plan.probes, windows, progress=True)
    return scores, [f"scored on {_read(windows)} of {given['calibration_text']}"]


def _fit(plan: DensePlan, given: dict[str, Any]) -> tuple[dict[int, FittedMlp], list[str]]:
    """Run the teacher on a text; return the MLPs that fit it there, and what to say of it."""
    windows = _windows(plan.folder, given)
    more = _more_tokens(plan.width, windows, given["calibration_text"])
    mlps = plan.fit(_load(plan.folder), windows, progress=True)
    return mlps, [f"fitted to {_read(windows)} of {given['calibration_text']}{more}"]


def _read(windows: Tensor) -> str:
    return f"{len(windows)} windows of {windows.shape[1]} tokens"


def _more_tokens(width: int, windows: Tensor, text: Path) -> str:
    """Return what to say of a text that has few tokens for each channel.

    Raises:
        ValueError: it has fewer tokens than channels.
    """
    each = windows.numel() / width
    if each < 1:
        raise ValueError(
            f"--dense-ffn-hidden-size {width}: {_read(windows)} of {text} are read, and as many channels need at least "
            "as many tokens, better ten for each; give a longer text, or more --calibration-samples"
        )
    if each >= _TOKENS_OF_A_CHANNEL:
        return ""
    samples = math.ceil(_TOKENS_OF_A_CHANNEL * width / windows.shape[1])
    return f", {each:.1f} tokens for a channel; ten fit better: --calibration-samples {samples}, if the text has them"


def _left_out(plan: StudentPlan | DensePlan) -> list[str]:
    """Say which tensors of the teacher the student has no place for."""
    names = plan.left_out
    if not names or plan.family.left_out is None:
        return []
    return [f"{len(names)} tensors of {plan.family.left_out.what} ({names[0]} ...) are left out"]


def _pairs(layers: list[int], num_layers: int) -> list[str]:
    """Say which layers to compare in training, where the rule would pair layers of different origin."""
    from megatron_fdd.config import FddConfig
    from megatron_fdd.losses.pairs import sample_blocks

    config = FddConfig()
    count = min(config.layers, len(layers) - 1)
    if len(layers) == num_layers or count < 1:
        return []
    blocks = sample_blocks(config.layer_rule, count, len(layers), "student")
    pairs = ",".join(f"{block}:{layers[block - 1] + 1}" for block in blocks)
    return [f"pairs of layers with one origin, for the training: --fdd-layer-pairs {pairs}"]


def _windows(folder: HfFolder, given: dict[str, Any]) -> Tensor:
    """Return int64 [windows, length]: at most as many of the text as are given, for the teacher to read."""
    from megatron_fdd.evaluate.models import NamedModel, num_positions
    from megatron_fdd.evaluate.perplexity import cut_windows

    text, num_samples = given["calibration_text"], given["calibration_samples"]
    named = NamedModel(folder.path.resolve().name, folder.path)
    named.check()
    length = int(min(WINDOW, num_positions(named.config())))
    try:
        windows = cut_windows(read(text), named.tokenizer(), length, num_samples * length)[:, :-1]
    except ValueError as error:
        raise ValueError(f"--calibration-text {text} is too short ({error}); give another") from error
    named.check_ids(int(windows.max()))
    return windows


def _load(folder: HfFolder) -> PreTrainedModel:
    """Load the teacher, to read the text."""
    from transformers.utils import logging

    from megatron_fdd.evaluate.models import Placement

    logging.disable_progress_bar()
    return Placement(Placement.choose(None, None).device, "auto").load(folder.path)
