"""The teacher of the engine `vllm`, from the command line to the engine: one process, which asks a server."""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch.distributed as dist
import xxhash

from megatron_fdd.convert.hf_companions import write_companions
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.convert.stored_tensor import StoredTensor
from megatron_fdd.data.store.identity import StoreIdentity, TapForm
from megatron_fdd.data.store.lens import StoredLens
from megatron_fdd.evaluate.models import num_positions
from megatron_fdd.host import console
from megatron_fdd.host.disk import naming
from megatron_fdd.host.patches.helpers import use_built_helpers
from megatron_fdd.teach.data_arguments import check_teacher_ids, data_arguments
from megatron_fdd.teach.engine import Engine
from megatron_fdd.teach.hf_parts import Parts
from megatron_fdd.teach.hf_quantised import method_of
from megatron_fdd.teach.hf_teacher import DTYPES, FORM_OF, UNKNOWN, HfTeacher
from megatron_fdd.teach.request import TeachRequest, batch_sizes, chosen_blocks
from megatron_fdd.teach.transformers_teacher import check_one_process
from megatron_fdd.teach.vllm.checks import LAST_READ, Expected, check_version
from megatron_fdd.teach.vllm.client import Client
from megatron_fdd.teach.vllm.engine import VllmEngine
from megatron_fdd.teach.vllm.in_process import LocalSource, is_installed, own_folder
from megatron_fdd.teach.vllm.lens_model import find_lens
from megatron_fdd.teach.vllm.settings import ANY_FOLDER, VllmSettings
from megatron_fdd.teach.vllm.source import ServerSource, Source
from megatron_fdd.teach.vllm.state_file import StateFiles

_PORT = 8000
# So many bytes of each tensor's middle are hashed: a large teacher takes too long to be read as a whole.
_HASHED_BYTES, _HASHING_THREADS = 1 << 16, 8
# Two tokens that every vocabulary has.
_GREETING = np.array([1, 2], np.int32)


class VllmTeacher:
    """A model in a Hugging Face folder, which vLLM runs; what `PreparedTeacher` says.

    A server is asked for a text of two tokens at once, so that a wrong one is refused before the data are looked
    through.

    Raises:
        ValueError: something given is wrong, no vLLM is there, or it is not started as this needs it.
    """

    unknown: frozenset[str] = UNKNOWN

    def __init__(self, request: TeachRequest) -> None:
        check_one_process("vllm", "vLLM spreads the teacher over GPUs by itself")
        self._dtype = request.dtype or ("float32" if request.form == "float32" else "bfloat16")
        self._teacher = HfTeacher(request.teacher, self._dtype, "cpu")
        form: TapForm = request.form or FORM_OF[self._dtype]
        self._teacher.check_files(form)
        blocks = chosen_blocks(request, self._teacher.num_layers)
        self.outline = replace(self._teacher.outline(blocks, form), engine="vllm")
        batch_sizes(request)
        self._work = tempfile.TemporaryDirectory(prefix="fdd-teach-")
        self.companions = Path(self._work.name, request.teacher.resolve().name)
        with naming(self.companions, request.teacher):
            write_companions(request.teacher, self.companions)
            self.args: argparse.Namespace = data_arguments(request.flags, self.companions)
        self._server, self._is_dry = request.server, request.dry_run
        self._positions = num_positions(self._teacher.config.get_text_config())
        self._source: Source | None = None
        if not request.dry_run:
            self._meet()

    def start(self) -> None:
        """Make a process group of this process; with --dry-run say how the server is started."""
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        use_built_helpers()
        if self._is_dry:
            console.say(f"a server of vLLM for this: {self._command}")

    def engine(self) -> Engine:
        """Find norm and head, start vLLM if it is not a server, and compare nothing yet. Collectives: none."""
        folder = self._teacher.folder
        parts, num_ids = find_lens(folder, self._teacher.config, self._dtype)
        source = self._source or self._started()
        check_teacher_ids(self.args, self.companions, num_ids, min(self._positions, source.max_model_len - 1))
        identity = self._identity(parts, source)
        lens = StoredLens(parts.folded_norm, parts.head_VT.cpu(), float("nan"), parts.extras)
        return VllmEngine(identity, source, lens, self._expected)

    @property
    def _command(self) -> str:
        folder = self._server.folder if self._server is not None else ANY_FOLDER
        return self._settings(folder).command(self._server.port if self._server is not None else _PORT)

    def _settings(self, folder: Path) -> VllmSettings:
        return VllmSettings(
            teacher=self._teacher.folder,
            blocks=self.outline.blocks,
            folder=folder,
            longest=self.args.seq_length,
            positions=self._positions,
            dtype=self._dtype,
        )

    @property
    def _expected(self) -> Expected:
        named = LocalSource.source if self._server is None else f"--url {self._server.url}"
        return Expected(named, self.outline.blocks, self.outline.hidden_size, DTYPES[self._dtype])

    def _meet(self) -> None:
        """Refuse a server that cannot do this, or the want of one."""
        if self._server is None:
            if not is_installed():
                raise ValueError(
                    "--engine vllm: vLLM is not installed here, and no server is named: start one with: "
                    f"{self._command} (and the GPUs it needs), then give --url http://HOST:{_PORT} --hidden-states DIR"
                )
            return
        client = Client(self._server.url)
        files = StateFiles(self._server.folder, client.stopped)
        source = ServerSource(client, files, self._teacher.folder, self._command)
        if check_version(source.version, source.source):
            console.say(
                f"vLLM {source.version} is newer than {'.'.join(map(str, LAST_READ))}, whose sources this engine was "
                "written by; what comes of it is compared all the same"
            )
        if source.max_model_len <= self.args.seq_length:
            raise ValueError(
                f"{source.source}: takes requests of {source.max_model_len} tokens, and a unit of --seq-length and the "
                f"token that it must generate are {self.args.seq_length + 1}; start it again with: {self._command}"
            )
        if count := files.sweep():
            console.say(f"{self._server.folder}: removed {count} file(s) that killed producers had asked for")
        source.ask([_GREETING], self._expected, (), lambda answer: np.zeros(0, np.uint8))
        if Path(source.root).name != self._teacher.folder.resolve().name:
            console.say(f"the server calls its model {source.root}; it is taken for {self._teacher.folder}")
        self._source = source

    def _started(self) -> Source:
        """Start vLLM in this process."""
        self._folder = own_folder()
        return LocalSource(self._settings(Path(self._folder.name)))

    def _identity(self, parts: Parts, source: Source) -> StoreIdentity:
        ran = {
            "dtype": self._dtype,
            "quantisation": method_of(self._teacher.config) or "no",
            "vllm": source.version,
        }
        if self._teacher.row_limits:  # vLLM chooses the one rotation of longrope by it, for all rows
            ran["max_model_len"] = str(source.max_model_len)
        return replace(
            self.outline,
            weights=sampled_digest(self._teacher.folder),
            final_norm=self._teacher.final_norm_digest(parts),
            hidden_size=parts.head.in_features,
            vocab_size=parts.head.out_features,
            ran=ran,
        )


def sampled_digest(folder: Path) -> str:
    """Return a hash of each tensor's name, dtype, shape and the bytes of its middle, whatever file it is in."""
    tensors = sorted(HfFolder(folder).tensors.items())

    def sample(tensor: StoredTensor) -> str:
        size = min(_HASHED_BYTES, tensor.num_bytes)
        with (folder / tensor.file).open("rb") as file:
            file.seek(tensor.offset + (tensor.num_bytes - size) // 2)
            return xxhash.xxh3_128_hexdigest(file.read(size))

    total = hashlib.sha256()
    with ThreadPoolExecutor(_HASHING_THREADS) as threads:
        sums = threads.map(sample, (tensor for _, tensor in tensors))
        for (name, tensor), found in zip(tensors, sums, strict=True):
            total.update(f"{name}\t{tensor.dtype}\t{tensor.shape}\t{found}\n".encode())
    return total.hexdigest()
