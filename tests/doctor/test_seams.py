"""The doctor on a Megatron that lacks something: it says what, and who uses it."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import megatron.core.utils
import megatron.training.training as megatron_training
import pytest
from megatron.core.models.gpt import GPTModel

from megatron_fdd.doctor import report, seams
from megatron_fdd.doctor.finding import Finding
from megatron_fdd.host.patches import table as patches


def failed() -> dict[str, Finding]:
    """Return the findings that fail, by name."""
    found = [*seams.imported_names(), *seams.signatures(), *seams.patches()]
    return {each.name: each for each in found if each.level == "FAIL"}


def test_this_megatron_has_every_seam() -> None:
    assert failed() == {}
    [counted] = seams.imported_names()
    assert int(counted.text.split()[1]) > 60


def test_a_function_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(megatron.core.utils, "make_viewless_tensor")
    [name] = failed()
    assert name == "megatron.core.utils.make_viewless_tensor"
    by_import, by_seam = [
        each for check in (seams.imported_names, seams.signatures) for each in check() if each.level == "FAIL"
    ]
    assert "injection.py" in by_import.remedy
    assert "injection.py" in by_seam.remedy
    assert "losses on inner pipeline stages" in by_seam.text


def test_a_parameter_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self, input_ids, packed_seq_params=None, extra_block_kwargs=None): ...

    monkeypatch.setattr(GPTModel, "forward", forward)
    [(name, finding)] = failed().items()
    assert name == "megatron.core.models.gpt.GPTModel.forward"
    assert "no parameter output_processor any more" in finding.text
    assert "packed_seq_params" not in finding.text
    assert "taps.py" in finding.remedy


def test_a_patched_name_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(megatron_training, "evaluate_and_print_results")
    finding = failed()["megatron.training.training.evaluate_and_print_results"]
    assert "schedule" in finding.remedy
    with pytest.raises(ValueError, match="has no megatron.training.training.evaluate_and_print_results"):
        patches.replace("megatron.training.training.evaluate_and_print_results", None)


@pytest.mark.parametrize("gone", ["megatron.core.gone.name", "megatron.core.utils.Gone.name"])
def test_a_module_or_class_that_is_gone(gone: str) -> None:
    with pytest.raises(ValueError, match=f"this Megatron has no {gone}"):
        patches.current(gone)


def test_a_megatron_that_cannot_be_imported_is_one_line_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    checks = ["seams.imported_names", "seams.signatures", "seams.patches"]
    found = list(report.findings(checks))
    assert [each.level for each in found] == ["FAIL"] * len(checks)
    assert all("ModuleNotFoundError" in each.text for each in found)


def test_only_listed_names_are_replaced() -> None:
    with pytest.raises(AssertionError, match="is in no table"):
        patches.replace("megatron.training.training.train", None)


def test_a_block_leaves_no_trace() -> None:
    names = ("megatron.training.training.training_log", "megatron.core.datasets.utils.compile_helpers")
    before = [patches.current(name) for name in names]
    with contextlib.suppress(KeyError), patches.replaced(dict.fromkeys(names, len)):
        assert [patches.current(name) for name in names] == [len, len]
        raise KeyError
    assert [patches.current(name) for name in names] == before


def test_imports_are_found_wherever_they_are(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "import os\nimport megatron.core.optimizer as o\nfrom megatron.bridge import AutoBridge\n"
        "def later():\n    from megatron.training import pretrain\n"
    )
    assert list(seams.names_imported(source)) == ["megatron.core.optimizer", "megatron.training.pretrain"]
