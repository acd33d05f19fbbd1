"""The parts of the quickstart that need no download: text, verdict, rotary order, set-up without a Python."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))

import corpus  # noqa: E402
import teacher  # noqa: E402
import verdict  # noqa: E402


def test_documents_are_cleaned_and_split_by_their_text_alone(tmp_path: Path) -> None:
    sentence = "Something about modules that is long enough to be a document of its own. " * 4
    (tmp_path / "test").mkdir()
    for name in ("one.py", "copy.py", "test/skipped.py", "short.py"):
        body = "Short." if name == "short.py" else f"Title\n    ====\n\n\n\n    {sentence}{'skip' in name}"
        (tmp_path / name).write_text(f'"""{body}"""\n')
    ours = [text for text in corpus.documents(tmp_path) if text.startswith("Title")]
    assert ours == [corpus.clean(f"Title\n\n{sentence}False")]
    texts = [f"document {number}" for number in range(500)]
    held_out = [text for text in texts if corpus.is_validation(text, 10)]
    assert 25 < len(held_out) < 80
    assert held_out == [text for text in texts[::-1] if corpus.is_validation(text, 10)][::-1]


def test_rotary_order_is_undone() -> None:
    heads, head_dim, hidden = 3, 8, 5
    weight = np.random.default_rng(0).normal(size=(heads * head_dim, hidden))
    halves = weight.reshape(heads, 2, head_dim // 2, hidden)
    llama_cpp = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(heads * head_dim, hidden)
    assert not np.array_equal(llama_cpp, weight)
    np.testing.assert_array_equal(teacher.undo_rotary_order(llama_cpp, heads), weight)


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="no-such-package-here is not installed"):
        teacher.find_gguf("no-such-package-here")


@pytest.mark.parametrize(
    ("kl_after", "cross_entropy", "status"), [(2.0, 5.0, 0), (2.1, 5.0, 1), (2.0, 6.0, 1), (1.0, 5.9, 0)]
)
def test_verdict(tmp_path: Path, kl_after: float, cross_entropy: float, status: int) -> None:
    texts = {
        "before": {"kl_to_teacher": 4.0},
        "after": {
            "kl_to_teacher": kl_after,
            "perplexity": math.exp(cross_entropy),
            "unigram_cross_entropy": 6.0,
        },
    }
    command = [sys.executable, str(ROOT / "examples/quickstart/verdict.py")]
    for name, text in texts.items():
        (tmp_path / name).write_text(json.dumps({"text": text}))
        command += [f"--{name}", str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("FAILED" in done.stdout) == bool(status)
    before, after = ({"text": text} for text in texts.values())
    assert verdict.judge(before, after)[0][0] == (kl_after <= 2.0)


def source_env(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Source tools/env.sh in a shell that sees only the Python that `environment` shows it."""
    paths = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path), "VENV": str(tmp_path / "venv")}
    return subprocess.run(
        ["/bin/bash", "-euo", "pipefail", "-c", f'source "{ROOT}/tools/env.sh"; echo sourced'],
        env=paths | environment,
        capture_output=True,
        text=True,
    )


def executable(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_set_up_without_a_fitting_python_says_what_to_install(tmp_path: Path) -> None:
    done = source_env(tmp_path, PYTHON=str(executable(tmp_path / "old", "exit 1")))
    assert done.returncode == 1
    assert "sourced" not in done.stdout
    assert "no Python 3.12 or 3.13" in done.stderr
    assert "apt install python3.12" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "venv").exists()


def test_set_up_passes_over_a_shim_that_leads_nowhere(tmp_path: Path) -> None:
    executable(tmp_path / "python3.12", "exit 127")
    log = tmp_path / "log"
    answer = f'[ "$1" = -c ] && exec {sys.executable} "$@"; echo "$@" >>{log}; exit 1'
    chosen = executable(tmp_path / ".pyenv/versions/3.12.9/bin/python3", answer)
    done = source_env(tmp_path)
    assert f"from {chosen}" in done.stdout
    assert log.read_text().startswith("-m venv")
    assert done.returncode == 1  # this Python makes no venv, and a failed set-up leaves no stamp
    assert not list(tmp_path.glob("venv/.megatron_fdd*"))


def test_a_finished_set_up_is_only_checked(tmp_path: Path) -> None:
    log = tmp_path / "log"
    executable(
        tmp_path / "venv/bin/python",
        f'[ "$1" = -c ] && exec {sys.executable} "$@"; echo "$@" >>{log}; [ "$2" = pip ]',
    )
    assert source_env(tmp_path).stdout.endswith("sourced\n")
    assert "pip install" in log.read_text()
    log.unlink()
    assert source_env(tmp_path).stdout == "sourced\n"
    assert not log.exists()
