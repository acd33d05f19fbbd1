"""A dense student of a mixture of experts: its teacher with one MLP in place of each layer's experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from megatron_fdd.convert.dense_fit import choose_channels, fit_mlps
from megatron_fdd.convert.derived_weights import Derived
from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.families.family import Family, HfConfig, WeightRow
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.hf_writer import TensorSpec
from megatron_fdd.convert.kept_parts import KeptParts
from megatron_fdd.convert.mixtures import Mixture, mixtures_of
from megatron_fdd.convert.student import StudentPlan, write_student
from megatron_fdd.convert.student_sizes import architecture

_FLAG = "--dense-ffn-hidden-size"


@dataclass(frozen=True, slots=True)
class FittedMlp:
    """An MLP that replaces a mixture.

    Attributes:
        channels: int64 [F], numbers of the mixture's channels, increasing.
        down: [H, F], its second matrix, on the CPU.
    """

    channels: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class DensePlan:
    """A dense student, before its teacher has been run.

    Attributes:
        folder: the teacher's, with its experts apart.
        family: the teacher's, as the folder stores it.
        layers: numbers of the layers that are kept.
        mixtures: those of them with experts.
        config: the student's.
        width: channels of its MLPs.
    """

    folder: HfFolder
    family: Family
    layers: Sequence[int]
    mixtures: Sequence[Mixture]
    config: HfConfig
    width: int

    @classmethod
    def of(cls, hf_model: Path, layers: Sequence[int], width: int) -> DensePlan:
        """Plan a student.

        Raises:
            ValueError: the teacher lacks a layer, its weights do not match its config, or no dense model of its layers
                has MLPs of such a width.
        """
        plan = StudentPlan.of(hf_model, layers, {})
        teacher = plan.folder.config
        args = architecture(plan.family, teacher)
        told = f"{_FLAG} {width}: {hf_model}"
        if args["num_experts"] is None:
            raise ValueError(f"{told} has no experts; make its MLPs narrower with --ffn-hidden-size")
        sibling = plan.family.dense
        if isinstance(sibling, str):
            why = sibling or "its family names no dense one"
            raise _impossible(f"{told} is of the type {plan.family.model_type}: {why}")
        found = mixtures_of(plan.family, teacher, args, family_of(teacher).layer_prefix)
        mixtures = [found[layer] for layer in layers if layer in found]
        _check_width(told, width, mixtures)
        dense = [layer for layer in layers if layer not in found]
        if dense and args["ffn_hidden_size"] != width:
            own = args["ffn_hidden_size"]
            raise ValueError(
                f"{told}: layer {dense[0]} has no experts and an MLP of {own} channels, and all MLPs of a student have "
                f"one width; give {own}, or choose other layers with --layers"
            )
        try:
            config = sibling.config(plan.config, width)
        except ValueError as error:
            why = str(error).partition(";")[0]  # what follows is the remedy of an export
            raise _impossible(f"{told} cannot become a {sibling.model_type} ({why})") from error
        return cls(plan.folder, plan.family, layers, mixtures, config, width)

    @property
    def left_out(self) -> list[str]:
        """The names of the teacher's tensors that the student has no place for."""
        return self.family.left_out_names(self.folder.config, self.folder.names)

    def fit(self, model: nn.Module, windows: Tensor, *, progress: bool = False) -> dict[int, FittedMlp]:
        """Choose the channels of the MLPs and fit their second matrices, as the teacher runs on a text.

        Args:
            model: transformers' model of the teacher, in evaluation mode.
            windows: int64 [windows, tokens].

        Returns:
            By number of the teacher's layer.
        """
        channels = choose_channels(model, self.mixtures, self.width, windows, progress=progress)

        def first(mixture: Mixture) -> Tensor:
            gathered = mixture.gathered(channels[mixture.layer])
            return gathered.join(self.folder.read(name) for name in gathered.sources)

        return {
            mixture.layer: FittedMlp(channels[mixture.layer], down.to(self._dtype(mixture)))
            for mixture, down in fit_mlps(model, self.mixtures, first, windows, progress=progress)
        }

    def write(
        self,
        hf_out: Path,
        mlps: Mapping[int, FittedMlp],
        *,
        max_shard_size: str = "5GB",
        progress: bool = False,
    ) -> int:
        """Write the student's folder; return its number of parameters.

        All but the second matrices of new MLPs is the teacher's, bit for bit.

        Args:
            mlps: as `fit` returns them.
        """
        tensors = list(self._tensors(mlps))
        return write_student(
            self.folder, tensors, self.config, hf_out, max_shard_size=max_shard_size, progress=progress
        )

    def _tensors(self, mlps: Mapping[int, FittedMlp]) -> Iterator[Derived]:
        """Yield the student's tensors, in the order of an export."""
        old = {row.mcore: row for row in self.family.rows(self.folder.config)}
        kept = KeptParts(architecture(self.family, self.folder.config), self.layers)
        new_mlps = {f"decoder.layers.{each.layer}.mlp.": each for each in self.mixtures}
        for row in family_of(self.config).rows(self.config):
            source = kept.source_of(row.mcore)
            mlp, found, _ = source.partition(".linear_fc")
            mixture = new_mlps.get(f"{mlp}.") if found else None
            if mixture is None:
                yield from self._copies(old[source], row)
            elif row.sources:
                yield from self._made(mixture, mlps[mixture.layer], row)

    def _copies(self, old: WeightRow, new: WeightRow) -> Iterator[Derived]:
        """Yield the tensors of a parameter that stays."""
        for name, source in zip(new.sources, old.sources, strict=True):
            yield Derived(TensorSpec(name, self.folder.dtype(source), self.folder.shape(source)), (source,))

    def _made(self, mixture: Mixture, mlp: FittedMlp, new: WeightRow) -> Iterator[Derived]:
        """Yield the tensors of one matrix of a new MLP."""
        dtype, down = self._dtype(mixture), mlp.down
        if new.mcore.endswith("linear_fc2.weight"):
            (name,) = new.sources
            yield Derived(TensorSpec(name, dtype, tuple(down.shape)), (), lambda _parts: down)
            return
        gathered = mixture.gathered(mlp.channels)
        first = torch.empty(2 * self.width, len(down), device="meta")
        for number, (name, part) in enumerate(zip(new.sources, new.transform.split(first), strict=True)):

            def change(parts: Iterator[Tensor], number: int = number) -> Tensor:
                return new.transform.split(gathered.join(parts))[number]

            yield Derived(TensorSpec(name, dtype, tuple(part.shape)), gathered.sources, change)

    def _dtype(self, mixture: Mixture) -> torch.dtype:
        """Return the dtype of a mixture's matrices."""
        return self.folder.dtype(mixture.first[0].sources[0])


def _check_width(told: str, width: int, mixtures: Sequence[Mixture]) -> None:
    """Refuse a student without a mixture in its layers, and more channels than one has."""
    if not mixtures:
        raise ValueError(f"{told}: none of the layers that are kept has experts; leave the flag out")
    most = mixtures[0].num_channels
    if not 1 <= width <= most:
        raise ValueError(f"{told}: must lie between 1 and the {most:,} channels of all experts of a layer")


def _impossible(why: str) -> ValueError:
    return ValueError(
        f"{why}; keep fewer experts with --num-experts and --moe-ffn-hidden-size, or give another model its vocabulary "
        "with --vocabulary-of"
    )
