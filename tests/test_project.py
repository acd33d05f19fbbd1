"""What says the project's version and the versions of its tools says the same everywhere."""

from __future__ import annotations

import re

import yaml

import megatron_fdd
from tests.harness.markdown import ROOT


def test_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    newest = re.search(r"^## \[(\d.*?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert [citation["version"], newest[1]] == [megatron_fdd.__version__] * 2


def test_hooks_lint_as_the_tests_do() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    packages = {package for hook in hooks for package in hook["additional_dependencies"]}
    ruff = {package for package in packages if package.startswith("ruff==")}
    assert ruff & set((ROOT / "constraints.txt").read_text().splitlines()) == ruff != set()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", package) for package in packages)


def test_workflows_call_what_a_person_would() -> None:
    called, permissions = set(), []
    for path in (ROOT / ".github/workflows").glob("checks*.yml"):
        workflow = yaml.safe_load(path.read_text())
        permissions.append(workflow["permissions"])
        called |= {step.get("run") for job in workflow["jobs"].values() for step in job["steps"]}
    assert called >= {"bash tests/run.sh fast", "bash tests/run.sh", "bash .ci/run"}
    assert permissions == [{"contents": "read"}]
