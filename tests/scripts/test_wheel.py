"""The wheel, in an empty folder and an environment that does not see the checkout: from a teacher to a report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.convert import toys
from tests.harness.packages import build, copy_checkout

TIMEOUT_S = 180
TRAINING = (
    "--use-checkpoint-args --seq-length 16 --micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --train-iters 3 "
    "--lr-decay-iters 3 --eval-interval 100 --eval-iters 0 --fdd-layers 2 --hidden-dropout 0 --attention-dropout 0 "
    "--tokenizer-type HuggingFaceTokenizer --save-interval 3"
).split()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment with the wheel; it takes all else from the environment of the tests, without its checkout."""
    root = tmp_path_factory.mktemp("wheel")
    (root / "dist").mkdir()
    wheel = build("wheel", copy_checkout(root / "source"), root / "dist")
    environment = root / "env"
    venv.create(environment, with_pip=False)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = environment / "lib" / version / "site-packages"
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python"), "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)], check=True)
    # Python searches a folder in a .pth file, but does not read the .pth files in it (an editable install is one).
    (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment


def fdd(environment: Path, folder: Path, words: str, **variables: str) -> str:
    """Return the standard output of `fdd WORDS`, which must succeed."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    inherited |= {"OMP_NUM_THREADS": "1", "PATH": f"{environment}/bin:{os.environ['PATH']}", **variables}
    command = [str(environment / "bin/fdd"), *words.split()]
    done = subprocess.run(
        command, cwd=folder, env=inherited, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_from_a_teacher_to_a_report(installed: Path, tmp_path: Path) -> None:
    toys.make_llama(tmp_path / "teacher-hf", num_hidden_layers=6)
    lines = [json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 4}) for _ in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))

    def run(words: str) -> str:
        return fdd(installed, tmp_path, words)

    tokenizer = "--tokenizer-type HuggingFaceTokenizer --tokenizer-model teacher-hf"
    assert "4 layers of teacher-hf" in run("student --hf-model teacher-hf --num-layers 4 --hf-out student-hf")
    run("import --hf-model teacher-hf --save teacher")
    run("import --hf-model student-hf --save student")
    assert "40 documents" in run(f"prepare text.jsonl --output-prefix text {tokenizer} --append-eod")
    flags = " ".join(
        [*TRAINING, "--tokenizer-model teacher-hf --teacher-load teacher --train-data-path text"]
    )
    assert "teacher" in run(f"plan --world-size 2 -- --load student {flags}")
    places = "--load run --save run --pretrained-checkpoint student --fdd-metrics-file run/metrics.jsonl"
    run(f"train --nproc-per-node 2 -- {places} {flags}")
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 3
    assert "ready for from_pretrained" in run("export --load run --hf-out distilled-hf")
    table = run(
        "evaluate --hf-model distilled-hf --teacher teacher-hf --validation-text text.jsonl --length 16 "
        "--max-tokens 64 --device cpu --out evaluation"
    )
    assert "distilled-hf" in table
    assert "1 run" in run("report run --out report")
    assert (tmp_path / "report/report.html").stat().st_size > 10_000
