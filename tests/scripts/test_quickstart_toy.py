"""The whole quickstart script with a toy teacher: every step, the skipping of finished steps, and the verdict."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.convert.toys import make_llama, make_tokenizer
from tests.harness import forked_python

ROOT = Path(__file__).parents[2]


def quickstart(folder: Path, **knobs: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **forked_python.environment(),
        "WORK": str(folder / "work"),
        "TEACHER_HF": str(folder / "teacher"),
        "STUDENT_LAYERS": "0,1,3,5",
        "SEQ_LENGTH": "32",
        "TRAIN_ITERS": "4",
        "WARMUP_ITERS": "1",
        "SAVE_INTERVAL": "2",
        "EVAL_TOKENS": "256",
        "PROMPT": "a student",
        "PRECISION": "fp32",
        "EXTRA_TRAIN_FLAGS": "--fdd-layers 2",
        **knobs,
    }
    return subprocess.run(
        ["bash", str(ROOT / "examples/quickstart.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def check_terminal(shown: str, work: Path) -> None:
    """Assert that the terminal shows a page that a person can read to its end; the log has the rest."""
    lines = shown.replace("\r", "\n").splitlines()
    assert len(lines) <= 60, shown
    assert [line.split()[1] for line in lines if line.startswith("   step")] == ["1/4", "4/4"], shown
    for wanted in ("to " + str(work / "quickstart.log"), "== comparison: ", "report: ", "quickstart: "):
        assert wanted in shown, shown
    assert "arning" not in shown, shown
    log = (work / "quickstart.log").read_text()
    assert "--fdd-metrics-file" in log
    assert "end of arguments" in (work / "training/logs/rank0.log").read_text()


def test_quickstart_at_toy_size(tmp_path: Path) -> None:
    make_llama(tmp_path / "teacher", num_hidden_layers=6, vocab_size=300, tokenizer=False)
    make_tokenizer(tmp_path / "teacher", added=(), vocab_size=80)
    done = quickstart(tmp_path)
    # Four steps with a random teacher: the verdict must be that the goal was missed, and nothing else is wrong.
    assert done.returncode == 1, done.stdout + done.stderr
    assert "KL" in done.stdout, done.stdout + done.stderr
    assert "torchrun --standalone --nproc-per-node 2 -m megatron_fdd.distill" in done.stdout
    check_terminal(done.stdout + done.stderr, tmp_path / "work")
    work = tmp_path / "work"
    texts = {
        name: json.loads((work / f"evaluation/{name}/evaluation.json").read_text())["text"]
        for name in ("student before", "student after", "teacher")
    }
    assert texts["student before"]["kl_to_teacher"] != texts["student after"]["kl_to_teacher"]
    assert texts["teacher"]["kl_to_teacher"] == 0
    records = [json.loads(line) for line in (work / "training/metrics.jsonl").open()]
    assert [record["iteration"] for record in records if "tokens" in record] == [1, 2, 3, 4]
    assert records[-1]["valid kd"] > 0
    assert (work / "report/losses.png").read_bytes().startswith(b"\x89PNG")
    page = (work / "report/report.html").read_text()
    assert "student after" in page
    assert "--fdd-layers" in page  # read from the checkpoint
    assert (work / "student-after-hf/model.safetensors").is_file()
    assert (work / "student-after-hf/tokenizer.json").is_file()

    again = quickstart(tmp_path)
    assert again.returncode == 1
    assert "torchrun" not in again.stdout
    assert again.stdout.count("done before") == again.stdout.count("== ")

    failed = quickstart(tmp_path, EXTRA_TRAIN_FLAGS="--fdd-layers 9")
    assert failed.returncode == 1
    assert "failed: train " in failed.stderr
    assert "megatron_fdd: error: --fdd-layers 9 needs a student of at least 10 layers" in failed.stderr
    assert len(failed.stderr.splitlines()) <= 20, failed.stderr
