"""An initial student: a teacher without some of its layers and of their channels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_fdd.convert.config_class import check_config_class
from megatron_fdd.convert.derived_weights import Derived, write_derived
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.family import Family, HfConfig
from megatron_fdd.convert.hf_folder import CONFIG_FILES, HfFolder, copy_files
from megatron_fdd.convert.hf_source import check_names
from megatron_fdd.convert.hf_writer import new_folder
from megatron_fdd.convert.kept_parts import KeptParts
from megatron_fdd.convert.kept_rows import cut_rows
from megatron_fdd.convert.left_out import PROCESSOR_FILES
from megatron_fdd.convert.probes import Probe, probes_of
from megatron_fdd.convert.student_sizes import architecture, narrower_config
from megatron_fdd.data.tokenizer_identity import TOKENIZER_FILES
from megatron_fdd.host.field_kinds import shown
from megatron_fdd.host.json_file import write_json

# A model loses most quality when its first or last layers are removed.
_KEPT_AT_EACH_END = 4


def parse_layers(text: str, teacher_layers: int) -> list[int]:
    """Parse a list such as "0-3,6,9" into [0, 1, 2, 3, 6, 9].

    Raises:
        ValueError: the text is not a list of the teacher's 0-based layers and ranges, or it does not increase.
    """
    layers: list[int] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", item)
        span = range(int(match[1]), int(match[2] or match[1]) + 1) if match else range(0)
        if not span:
            raise ValueError(
                f"--layers {text:.60}: {shown(item)} is neither a layer number nor a range such as 0-3"
            )
        if span[-1] >= teacher_layers:
            raise ValueError(
                f"--layers {text:.60}: {item.strip()} must lie within the teacher's 0-{teacher_layers - 1}"
            )
        layers.extend(span)
    if any(later <= earlier for earlier, later in zip(layers, layers[1:], strict=False)):
        raise ValueError(f"--layers {text:.60}: layers must increase")
    return layers


def choose_layers(num_layers: int, teacher_layers: int) -> list[int]:
    """Choose the teacher layers from which a student of `num_layers` layers starts.

    A student of 8 or more layers gets the first four, the last four, and others spread evenly between them. A student
    with fewer layers gets layers spread evenly from the first to the last.

    Raises:
        ValueError: `num_layers` is less than 1, or more than the teacher has.
    """
    if not 1 <= num_layers <= teacher_layers:
        raise ValueError(f"--num-layers {num_layers} must lie between 1 and the teacher's {teacher_layers}")
    ends = _KEPT_AT_EACH_END if num_layers >= 2 * _KEPT_AT_EACH_END else 1
    if num_layers == 1:
        return [0]
    first, last = ends - 1, teacher_layers - ends
    steps = num_layers - 2 * ends + 1
    between = [first + (2 * step * (last - first) + steps) // (2 * steps) for step in range(steps + 1)]
    return [*range(first), *between, *range(last + 1, teacher_layers)]


def count_layers(hf_model: Path) -> int:
    """Return the number of layers of a model folder. ValueError as in `init_student`."""
    config = HfFolder(Path(hf_model)).config
    return family_of(config).megatron_args(config)["num_layers"]


def init_student(
    hf_model: Path,
    layers: Sequence[int],
    hf_out: Path,
    *,
    max_shard_size: str = "5GB",
    progress: bool = False,
) -> int:
    """Write a model folder with the chosen layers (0-based) of another; return its number of parameters.

    Embeddings, final norm, head, generation config and tokenizer are copied.

    Raises:
        ValueError: the teacher lacks a layer, or its weights do not match its config.
    """
    plan = StudentPlan.of(hf_model, layers, {})
    return plan.write(hf_out, {}, max_shard_size=max_shard_size, progress=progress)


@dataclass(frozen=True, slots=True)
class StudentPlan:
    """A student, before its teacher has been run.

    Attributes:
        folder: the teacher's, with its experts apart.
        family: the teacher's, as the folder stores it.
        layers: numbers of the layers that are kept.
        config: the student's.
        probes: the places whose activations tell what to keep; none if the student has the teacher's sizes.
    """

    folder: HfFolder
    family: Family
    layers: Sequence[int]
    config: HfConfig
    probes: list[Probe]

    @classmethod
    def of(cls, hf_model: Path, layers: Sequence[int], sizes: Mapping[str, int]) -> StudentPlan:
        """Plan a student.

        Args:
            sizes: those that become smaller, by the names in `SIZES`.

        Raises:
            ValueError: the teacher lacks a layer, its weights do not match its config, or it cannot have such a size.
        """
        folder = HfFolder(Path(hf_model))
        family = family_of(folder.config).as_stored(folder)
        num_layers = family.megatron_args(folder.config)["num_layers"]
        outside = [layer for layer in layers if not 0 <= layer < num_layers]
        if outside or not layers:
            first = f"layer {outside[0]}" if outside else "no layer"
            raise ValueError(f"{first}: {hf_model} has the layers 0 to {num_layers - 1}; choose from them")
        check_names(family, folder)
        probes = probes_of(family_of(folder.config), folder.config, layers, sizes)
        config = family.without_left_out(family.keep_layers(folder.config, layers))
        config = narrower_config(family, config, sizes)
        plan = cls(folder.apart(family.stacked), family, layers, config, probes)
        parts = {key: count for probe in probes for key, count in probe.keys.items()}
        plan.tensors({key: torch.zeros(count) for key, count in parts.items()})  # refuses what cannot be cut
        return plan

    @property
    def left_out(self) -> list[str]:
        """The names of the teacher's tensors that the student has no place for."""
        if self.family.keeps_left_out:
            return []
        return self.family.left_out_names(self.folder.config, self.folder.names)

    def write(
        self,
        hf_out: Path,
        scores: Mapping[str, Tensor],
        *,
        max_shard_size: str = "5GB",
        progress: bool = False,
    ) -> int:
        """Write the student's folder; return its number of parameters.

        All that is kept is the teacher's, bit for bit, but for the scale of RMS norms over fewer channels. One tensor
        is in memory at a time.

        Args:
            scores: as `measure_importance` returns them for the probes.
        """
        return write_student(
            self.folder,
            self.tensors(scores),
            self.config,
            hf_out,
            max_shard_size=max_shard_size,
            progress=progress,
        )

    def tensors(self, scores: Mapping[str, Tensor]) -> list[Derived]:
        """List the student's tensors. ValueError for parts that cannot be cut."""
        teacher = architecture(self.family, self.folder.config)
        kept = KeptParts.of_scores(teacher, architecture(self.family, self.config), self.layers, scores)
        return cut_rows(self.folder, self.family, self.config, kept)


def write_student(
    teacher: HfFolder,
    tensors: Sequence[Derived],
    config: HfConfig,
    hf_out: Path,
    *,
    max_shard_size: str,
    progress: bool,
) -> int:
    """Write a folder of tensors made of a teacher's, with all else that it has; return the number of parameters.

    Raises:
        ValueError: transformers cannot read the config, or the disk cannot take the folder.
    """
    check_config_class(config)
    with new_folder(Path(hf_out), "--hf-out") as unfinished:
        parameters = write_derived(
            teacher, tensors, unfinished, max_shard_size=max_shard_size, progress=progress
        )
        write_json(unfinished / CONFIG_FILES[0], config)
        copy_files([*CONFIG_FILES[1:], *TOKENIZER_FILES, *PROCESSOR_FILES], teacher.path, unfinished)
    return parameters
