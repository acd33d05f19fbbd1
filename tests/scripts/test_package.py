"""The source distribution and the wheel: their content, and a build that leaves the source folder unchanged."""

from __future__ import annotations

import email
import tarfile
import zipfile
from pathlib import Path

import pytest

import megatron_fdd
from tests.harness.markdown import ROOT
from tests.harness.packages import build, copy_checkout

NAME = f"megatron_fdd-{megatron_fdd.__version__}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture(scope="module")
def before(source: Path) -> set[Path]:
    """Return all paths of the copy before anything was built in it."""
    return set(source.rglob("*"))


@pytest.fixture(scope="module")
def sdist(source: Path, before: set[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build and unpack a source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build("sdist", source, folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(
    request: pytest.FixtureRequest, source: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = source if request.param == "checkout" else sdist
    return build("wheel", folder, tmp_path_factory.mktemp("wheel"))


def package_files() -> set[str]:
    """Return the files that an installation must have, by their paths in the wheel."""
    package = ROOT / "megatron_fdd"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "megatron_fdd/py.typed" in names
    assert {name for name in names if ".dist-info/" not in name} == package_files()


def test_wheel_states_version_and_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = email.message_from_bytes(archive.read(f"{NAME}.dist-info/METADATA"))
    assert metadata["Version"] == megatron_fdd.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert archive.read(f"{NAME}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_sdist_holds_package_and_documentation(sdist: Path) -> None:
    names = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    pages = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")}
    assert package_files() | pages | {"README.md", "LICENSE", "CHANGELOG.md", "SECURITY.md"} <= names
    assert {path.name for path in sdist.iterdir() if path.is_dir()} == {"megatron_fdd", "docs"}


def test_a_build_leaves_nothing_behind(source: Path, before: set[Path], sdist: Path, wheel: Path) -> None:
    assert sorted(set(source.rglob("*")) - before) == []
