"""The teacher of the engine `transformers`, from the command line to the engine: one process, one teacher."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch.distributed as dist

from megatron_fdd.convert.hf_companions import write_companions
from megatron_fdd.data.store.identity import TapForm
from megatron_fdd.evaluate.models import num_positions
from megatron_fdd.host.disk import naming
from megatron_fdd.host.patches.helpers import use_built_helpers
from megatron_fdd.teach.data_arguments import check_teacher_ids, data_arguments
from megatron_fdd.teach.engine import Engine
from megatron_fdd.teach.hf_parts import find_parts
from megatron_fdd.teach.hf_teacher import FORM_OF, UNKNOWN, HfTeacher
from megatron_fdd.teach.request import TeachRequest, batch_sizes, chosen_blocks
from megatron_fdd.teach.transformers import TransformersEngine


class TransformersTeacher:
    """A model in a Hugging Face folder; what `PreparedTeacher` says.

    Raises:
        ValueError: something given is wrong, or the folder has no model that can be a teacher.
    """

    unknown: frozenset[str] = UNKNOWN

    def __init__(self, request: TeachRequest) -> None:
        check_one_process("transformers", "--device-map auto spreads the teacher over GPUs")
        dtype = request.dtype or ("float32" if request.form == "float32" else "bfloat16")
        self._teacher = HfTeacher(request.teacher, dtype, _device_map(request.device_map))
        form: TapForm = request.form or FORM_OF[dtype]
        self._teacher.check(form)
        self.outline = self._teacher.outline(chosen_blocks(request, self._teacher.num_layers), form)
        batch_sizes(request)
        self._work = tempfile.TemporaryDirectory(prefix="fdd-teach-")
        self.companions = Path(self._work.name, request.teacher.resolve().name)
        with naming(self.companions, request.teacher):
            write_companions(request.teacher, self.companions)
            self.args: argparse.Namespace = data_arguments(request.flags, self.companions)

    def start(self) -> None:
        """Make a process group of this process."""
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        use_built_helpers()

    def engine(self) -> Engine:
        """Load the teacher, and find its parts. Collectives: none."""
        model = self._teacher.load(Path(self._work.name, "offload"))
        parts = find_parts(model)
        num_ids = model.get_input_embeddings().num_embeddings
        longest = num_positions(self._teacher.config.get_text_config())
        check_teacher_ids(self.args, self.companions, num_ids, longest)
        identity = self._teacher.identity(model, parts, self.outline)
        return TransformersEngine(identity, model, parts, self._teacher.row_limits)


def check_one_process(engine: str, instead: str) -> None:
    """Refuse several processes for an engine of one.

    Args:
        instead: how it gets several GPUs.

    Raises:
        ValueError: torchrun started several.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: --engine {engine} is one process: start it alone; {instead}, and "
            "several producers share the work with --part I/N"
        )


def _device_map(text: str) -> str | dict[str, str | int]:
    """Read --device-map.

    Raises:
        ValueError: it is neither a word nor an object of places.
    """
    if not text.startswith("{"):
        return text
    try:
        places = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--device-map {text}: is no JSON ({error}); give auto, cpu or an object") from error
    wrong = {name: place for name, place in places.items() if type(place) not in (str, int)}
    if not places or wrong:
        raise ValueError(
            f"--device-map {text}: each part needs a GPU's number, cpu or disk, for example "
            '{"model.embed_tokens": 0, "model.layers": "cpu", "model.norm": 0, "lm_head": 0}'
        )
    return dict(places)
