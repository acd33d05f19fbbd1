"""What the doctor finds about Python and packages."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterable

import pytest

from megatron_fdd.doctor import versions
from megatron_fdd.doctor.finding import Finding


def named(findings: Iterable[Finding], name: str) -> Finding:
    """Return the finding of this name."""
    [found] = [each for each in findings if each.name == name]
    return found


def have(monkeypatch: pytest.MonkeyPatch, **found: str | None) -> None:
    """Pretend that these versions are installed (None: not installed), beside those of this environment."""
    real: Callable[[str], str | None] = versions._version
    monkeypatch.setattr(
        versions,
        "_version",
        lambda name: found[name.replace("-", "_")] if name.replace("-", "_") in found else real(name),
    )


def test_this_environment_has_what_it_needs() -> None:
    findings = [*versions.python(), *versions.packages()]
    assert [each for each in findings if each.level != "ok"] == []
    assert named(findings, "megatron-core").text.endswith("(~=0.19.2)")


def test_another_python_and_another_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.9.18")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    python, system = versions.python()
    assert (python.level, system.level) == ("FAIL", "warn")
    assert "3.9.18, needed is" in python.text
    assert "aarch64" in system.text


@pytest.mark.parametrize(
    ("found", "text"), [("0.18.0", "0.18.0, needed is ~=0.19.2"), (None, "not installed")]
)
def test_another_megatron(found: str | None, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, megatron_core=found)
    finding = named(versions.packages(), "megatron-core")
    assert finding.level == "FAIL"
    assert finding.text.startswith(text)
    assert "pip install" in finding.remedy


def test_a_missing_package_of_the_others_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, einops=None)
    assert named(versions.packages(), "einops").level == "FAIL"


@pytest.mark.parametrize(("has_gpu", "levels"), [(True, ["warn", "ok", "FAIL"]), (False, ["ok", "ok", "ok"])])
def test_without_accelerators(has_gpu: bool, levels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, transformer_engine=None, apex=None, triton=None)
    monkeypatch.setattr(versions, "_has_gpu", lambda: has_gpu)
    assert [each.level for each in versions.accelerators()] == levels


def test_a_transformer_engine_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, transformer_engine="2.20.2")
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    finding = named(versions.accelerators(), "transformer-engine")
    assert finding.level == "FAIL"
    assert "cannot be imported" in finding.text
