"""What the lists of seams and patches say about the code: which files use a seam, which functions install a patch."""

from __future__ import annotations

import importlib

from megatron_fdd.doctor.seam_table import SEAMS
from megatron_fdd.host.patches.table import PATCHES, REHEARSAL_PATCHES
from tests.harness.markdown import ROOT


def test_every_file_that_uses_a_seam_names_it() -> None:
    assert len({seam.name for seam in SEAMS}) == len(SEAMS)
    for seam in SEAMS:
        for path in seam.where:
            text = (ROOT / "megatron_fdd" / path).read_text(encoding="utf-8")
            owner, name = seam.name.split(".")[-2:]
            used = {owner, name, *seam.parameters} - {"forward", "args", "config", "model", "save", "load"}
            assert any(word in text for word in used), f"{path} does not use {seam.name}"


def test_every_patch_is_installed_by_the_function_named() -> None:
    targets = [patch.target for patch in PATCHES + REHEARSAL_PATCHES]
    assert len(set(targets)) == len(targets)
    for patch in PATCHES + REHEARSAL_PATCHES:
        module, _, function = patch.installed_by.rpartition(".")
        loaded = importlib.import_module(f"megatron_fdd.{module}")
        assert callable(getattr(loaded, function))
        source = (ROOT / "megatron_fdd" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
        assert patch.target.rpartition(".")[2] in source
