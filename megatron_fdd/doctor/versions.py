"""Checks of Python and of the packages that a run needs or can use, against what this project requires."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_fdd.doctor.finding import Finding, first_line

PACKAGE = "megatron_fdd"
# Packages that are shown with their version; all other required ones share one line.
_NAMED = ("torch", "megatron-core", "transformers", "numpy")


def python() -> Iterator[Finding]:
    """Check the interpreter and the platform."""
    found, asked = platform.python_version(), metadata.metadata(PACKAGE)["Requires-Python"]
    if SpecifierSet(asked).contains(found, prereleases=True):
        yield Finding("ok", "Python", f"{found} ({asked})")
    else:
        yield Finding(
            "FAIL", "Python", f"{found}, needed is {asked}", "make an environment with such a Python"
        )
    system, machine = platform.system(), platform.machine()
    if (system, machine) == ("Linux", "x86_64"):
        yield Finding("ok", "platform", f"{system} {machine}")
    else:
        remedy = "constraints.txt and every test are for Linux x86_64"
        yield Finding("warn", "platform", f"{system} {machine} has never been tried", remedy)


def packages() -> Iterator[Finding]:
    """Check everything that the package requires, by its metadata."""
    others = []
    for line in metadata.requires(PACKAGE) or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        asked = str(requirement.specifier) or "any version"
        if found is None:
            text = f"not installed, needed is {asked}"
        elif not requirement.specifier.contains(found, prereleases=True):
            text = f"{found}, needed is {asked}"
        elif requirement.name in _NAMED:
            yield Finding("ok", requirement.name, f"{found} ({asked})")
            continue
        else:
            others.append(requirement.name)
            continue
        yield Finding(
            "FAIL", requirement.name, text, f"pip install '{requirement}', or all with constraints.txt"
        )
    yield Finding("ok", "other packages", ", ".join(others))


def accelerators() -> Iterator[Finding]:
    """Check the packages that Megatron and the fused losses use if they are installed."""
    has_gpu = _has_gpu()
    yield _transformer_engine(has_gpu)
    apex = _version("apex")
    yield Finding("ok", "apex", apex or "not installed; nothing needs it")
    triton = _version("triton")
    if triton is not None:
        yield Finding("ok", "triton", triton)
    elif has_gpu:
        remedy = "install it, or give --fdd-kernels torch"
        yield Finding("FAIL", "triton", "not installed, and the fused losses use it on a GPU", remedy)
    else:
        yield Finding("ok", "triton", "not installed; only a GPU needs it")


def _transformer_engine(has_gpu: bool) -> Finding:
    """Check TransformerEngine.

    Megatron uses it wherever it can be imported, and fails where it is installed but cannot be imported.
    """
    name, found = "transformer-engine", _version("transformer-engine")
    if found is None and has_gpu:
        remedy = "pip install -e '.[te]', or give --transformer-impl local"
        return Finding("warn", name, "not installed, and Megatron's modules are its own by default", remedy)
    if found is None:
        return Finding("ok", name, "not installed; only a GPU needs it")
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:
        text = f"{found} cannot be imported ({first_line(error)}), so neither can Megatron"
        return Finding("FAIL", name, text, "install it for this torch and CUDA, or uninstall it")
    return Finding("ok", name, f"{found} (this project has never run whole with it on a GPU)")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
