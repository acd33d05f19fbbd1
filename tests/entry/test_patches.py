"""The tables of `megatron_fdd.host.patches.table`, compared with the names that live runs replace."""

from __future__ import annotations

import pytest

from megatron_fdd.host.patches.table import PATCHES, REHEARSAL_PATCHES
from tests.entry.conftest import Toys
from tests.entry.megatron_names import replaced_in_a_run
from tests.harness.ranks import Layout, run_on_ranks
from tests.transformer_engine import IMAGE as TRANSFORMER_ENGINE
from tests.transformer_engine import needs_python

UNTOUCHED = "tests.entry.untouched_rank_image"
NO_REHEARSAL = {"FDD_REHEARSE": "0", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
ON_CPUS = "--distributed-backend gloo --attention-backend unfused --use-cpu-initialization --num-workers 0"
WHILE_TRAINING = {patch.target for patch in PATCHES if patch.when == "always, while training"}


def replaced(
    toy: Toys, flags: str, image: str, environment: dict[str, str] | None = None
) -> tuple[set[str], set[str]]:
    """Return the names that are replaced while a run trains, and after it."""
    arguments = {"command": toy.command(*flags.split()), "environment": environment}
    [(ending, during, after)] = run_on_ranks(replaced_in_a_run, Layout(ranks=1), arguments, image=image)
    assert ending.status == 0, ending.err
    return during, after


@pytest.mark.tier("all")
def test_a_run_with_local_modules_replaces_what_the_tables_list(toy: Toys) -> None:
    """Without apex and TransformerEngine, from a wheel: every patch is needed."""
    during, after = replaced(toy, f"--transformer-impl local {ON_CPUS}", UNTOUCHED, NO_REHEARSAL)
    every = {patch.target for patch in PATCHES + REHEARSAL_PATCHES}
    assert during == every
    assert after == every - WHILE_TRAINING


@needs_python
@pytest.mark.tier("all")
def test_a_run_with_transformer_engine_leaves_adam_alone(toy: Toys) -> None:
    during, after = replaced(toy, "--transformer-impl transformer_engine", TRANSFORMER_ENGINE)
    here = {
        "megatron.core.datasets.utils.compile_helpers",
        "torch._weights_only_unpickler._get_allowed_globals",
        "torch.distributed.checkpoint.filesystem.pickle",
        # The rank started in a rehearsal, which replaces local norms whatever a run uses.
        "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
    }
    rehearsals = {patch.target for patch in REHEARSAL_PATCHES}
    assert during - rehearsals == here | WHILE_TRAINING
    assert after - rehearsals == here
