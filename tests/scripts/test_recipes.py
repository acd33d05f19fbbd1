"""Every recipe at toy size: the script runs to its end as a user starts it, then a second time with nothing to do."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.convert.published import PUBLISHED
from tests.harness import forked_python

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(recipe: str, work: Path, *, forked: bool = True, **knobs: str) -> subprocess.CompletedProcess[str]:
    """Run `REHEARSE=1 bash examples/RECIPE/run.sh` with these variables.

    Args:
        forked: False if every `python` and `torchrun` has to be a real one.
    """
    environment = {
        **os.environ,
        **forked_python.environment(forked=forked),
        "REHEARSE": "1",
        "WORK": str(work),
        "OMP_NUM_THREADS": "1",
        **knobs,
    }
    return subprocess.run(
        ["bash", str(EXAMPLES / recipe / "run.sh")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def finished(recipe: str, work: Path, *, forked: bool = True, **knobs: str) -> str:
    """Return the output of a run that must end well."""
    done = run(recipe, work, forked=forked, **knobs)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def check_second_run(recipe: str, work: Path, **knobs: str) -> None:
    """Assert that a second run repeats nothing."""
    again = finished(recipe, work, **knobs)
    assert again.count("== ") == again.count("done before") > 3
    assert "torchrun" not in again


def records_of(work: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of training steps, without those of validations."""
    records = [json.loads(line) for line in (work / name / "metrics.jsonl").open()]
    return [record for record in records if "total" in record]


def check_student(work: Path, name: str, steps: list[int]) -> None:
    """Check the run's record, and that its export differs from the start."""
    assert [record["iteration"] for record in records_of(work, name)] == steps
    before, after = (
        load_file(folder / "model.safetensors") for folder in (work / "toys/student-hf", work / f"{name}-hf")
    )
    assert before.keys() == after.keys()
    changed = [key for key in before if not before[key].equal(after[key])]
    assert len(changed) > len(before) // 2
    assert (work / f"{name}-hf/tokenizer.json").is_file()


def check_evaluation(work: Path, *names: str) -> None:
    """Check that the untrained student and each run have a score, and that there is a page about them."""
    for name in ("start", *names):
        scores = json.loads((work / f"evaluation/{name}/evaluation.json").read_text())
        assert 0 <= scores["mean_rouge_l"] <= 100
    assert (work / "report/report.html").is_file()


def terms(work: Path, name: str) -> set[str]:
    """Return the terms that are part of the total, from the last record."""
    last = records_of(work, name)[-1]
    return {key.removeprefix("share ") for key, share in last.items() if key.startswith("share ") and share}


def test_ten_layers_of_smollm2(tmp_path: Path) -> None:
    out = finished("smollm2-10-layers", tmp_path)
    assert "torchrun --standalone --nproc-per-node 2 -m megatron_fdd.distill" in out
    assert json.loads((tmp_path / "student-after-hf/config.json").read_text())["num_hidden_layers"] == 10
    check_second_run("smollm2-10-layers", tmp_path)


@pytest.mark.parametrize(
    ("pair", "knobs", "ranks"),
    [("gpt2", {}, 1), ("tinyllama", {"TEACHER_EPOCHS": "0", "EVALUATE": "0"}, 2)],
)
def test_a_pair_of_the_paper(tmp_path: Path, pair: str, knobs: dict[str, str], ranks: int) -> None:
    # One recipe runs only real programs.
    out = finished("paper-pairs", tmp_path, PAIR=pair, SET_UP="0", forked=pair != "tinyllama", **knobs)
    assert f"torchrun --standalone --nproc-per-node {ranks} -m megatron_fdd.distill" in out
    check_student(tmp_path, "finetuned", [1])
    check_student(tmp_path, "distilled", [1])
    assert terms(tmp_path, "finetuned") == {"ce"}
    assert terms(tmp_path, "distilled") == {"kd", "trajectory", "delta"}
    assert (tmp_path / "finetuned-teacher").is_dir() == (pair == "gpt2")
    if pair == "gpt2":
        check_evaluation(tmp_path, "finetuned", "distilled")
    check_second_run("paper-pairs", tmp_path, PAIR=pair, SET_UP="0", **knobs)


def test_tensor_parallel_qwen3(tmp_path: Path) -> None:
    out = finished("qwen3-32b", tmp_path, SET_UP="0")
    assert "--tensor-model-parallel-size 2 --sequence-parallel" in out
    check_student(tmp_path, "distilled", [1])
    check_evaluation(tmp_path, "distilled")
    check_second_run("qwen3-32b", tmp_path, SET_UP="0")


def test_rounds_on_the_students_own_text(tmp_path: Path) -> None:
    """Stopped after a step, gone on with, and a round added; half of the text is the student's."""
    knobs = {"SET_UP": "0", "OWN_FRACTION": "0.5", "SAVE_INTERVAL": "1", "ROUNDS": "1"}
    stopped = run("on-policy", tmp_path, **knobs, STOP_FLAGS="--exit-interval 1")
    assert stopped.returncode == 75, stopped.stdout[-3000:] + stopped.stderr[-3000:]
    assert "stopped at step 1 of 2" in stopped.stdout
    assert finished("on-policy", tmp_path, **knobs).count("done before") == 8
    out = finished("on-policy", tmp_path, **knobs | {"ROUNDS": "2"})
    assert [record["iteration"] for record in records_of(tmp_path, "training")] == [1, 2, 3, 4]
    rows = (tmp_path / "own-text.md").read_text().splitlines()[2:]
    assert [row.split(" |")[0] for row in rows] == ["| start", "| after round 1", "| after round 2"]
    assert len({row.split(" | ")[1] for row in rows}) == 3
    assert "\n".join(rows) in out
    first, second = (
        [json.loads(line) for line in (tmp_path / f"round-{number}/answers/text.jsonl").open()]
        for number in (1, 2)
    )
    given = [json.loads(line) for line in (tmp_path / "prompts/train.jsonl").open()]
    assert [sum(record in given for record in records) for records in (first, second)] == [4, 4]
    assert first != second
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "student-1/hf", tmp_path / "student-2/hf")
    )
    assert any(not before[key].equal(after[key]) for key in before)
    check_second_run("on-policy", tmp_path, **knobs | {"ROUNDS": "2"})
    for changed in ({"STEPS": "3"}, {"OWN_FRACTION": "1"}, {"GENERATE": "sglang"}):
        refused = run("on-policy", tmp_path, **knobs | changed)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1


SRUN = """\
#!/usr/bin/env bash
# Every node is this machine.
while [[ $1 == --* ]]; do
    case $1 in --nodes=*) nodes=${1#*=} ;; --output=*) output=${1#*=} ;; esac
    shift
done
for ((node = 0; node < nodes; node++)); do
    log=${output//%j/$SLURM_JOB_ID}
    SLURM_NODEID=$node "$@" >>"${log//%n/$node}" 2>&1 &
done
status=0
for job in $(jobs -p); do wait "$job" || status=$?; done
exit "$status"
"""
SCONTROL = """\
#!/usr/bin/env bash
case $* in "show hostnames"*) printf 'localhost\\nlocalhost\\n' ;; *) echo "$*" >>"$0.log" ;; esac
"""


def slurm(folder: Path) -> dict[str, str]:
    """Return the environment of a job on two nodes, with stand-ins for Slurm's commands."""
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {
        "PATH": f"{folder}:{forked_python.environment()['PATH']}",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": "2",
        "SLURM_CPUS_ON_NODE": "1",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SET_UP": "0",
        "EVALUATE": "0",
    }


def test_a_slurm_job_that_is_queued_again(tmp_path: Path) -> None:
    """Two nodes of two ranks, with two pipeline stages and experts over two ranks, stop after the first step."""
    job = slurm(tmp_path / "bin")
    work = tmp_path / "work"
    stopped = run("qwen3-235b-slurm", work, **job, STOP_FLAGS="--exit-interval 1")
    assert stopped.returncode == 75, stopped.stdout[-3000:] + stopped.stderr[-3000:]
    assert "stopped at step 1 of 2" in stopped.stdout
    assert (tmp_path / "bin/scontrol.log").read_text() == "requeue 4711\n"
    out = finished("qwen3-235b-slurm", work, **job)
    assert "srun --nodes=2 --ntasks=2" in out
    assert "--rdzv-endpoint localhost:24711" in out
    assert "4 rank(s) = tensor 1 x context 1 x pipeline 2 x data 2" in logs_of(work)
    assert "4 in each of 10 layer(s), 2 to a token; 2 on a rank" in logs_of(work)
    check_student(work, "distilled", [1, 2])
    assert (tmp_path / "bin/scontrol.log").read_text() == "requeue 4711\n"
    check_second_run("qwen3-235b-slurm", work, **job)


def test_a_teacher_that_runs_first_as_a_job_array(tmp_path: Path) -> None:
    """Two tasks, each on two nodes of two ranks, share the teacher's work; then the student trains without it."""
    job = slurm(tmp_path / "bin") | {"TEACHER": "store"}
    work = tmp_path / "work"
    finished("qwen3-235b-slurm", work, **job, STEP="prepare")
    for task in ("1", "0"):
        array = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "2"}
        finished("qwen3-235b-slurm", work, **job, **array, STEP="teach")
        assert f"Megatron's own output: {work}/logs/teach-{task}of2/rank*.log" in logs_of(work)
        assert list((work / f"logs/teach-{task}of2").glob("rank?.log"))
    finished("qwen3-235b-slurm", work, **job, STEP="train")
    logs = logs_of(work)
    assert "are missing, part 1/2" in logs
    assert "are missing, part 0/2" in logs
    assert f"units of this run's data are in {work}/features " in logs
    check_student(work, "distilled", [1, 2])


def test_a_producer_that_its_time_limit_ends_is_queued_again(tmp_path: Path) -> None:
    """What was prepared is there; the time of the first start is over before the teacher is loaded."""
    job, work = slurm(tmp_path / "bin") | {"TEACHER": "store", "STEP": "teach"}, tmp_path / "work"
    (work / "data").mkdir(parents=True)
    (work / "data/instructions_train.prepared.json").write_text(json.dumps({"documents": 9}))
    models = {name: str(tmp_path) for name in ("TEACHER_HF", "STUDENT_HF")}
    models |= {"REHEARSE": "0", "DATA": "train.jsonl", "SLURM_JOB_END_TIME": str(int(time.time()))}
    ended = run("qwen3-235b-slurm", work, **job, **models)
    assert ended.returncode == 75, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert "the job's time is over; the next start goes on where it was" in ended.stdout
    assert (tmp_path / "bin/scontrol.log").read_text() == "requeue 4711\n"
    models |= {"STEP": "prepare", "DATA": str(tmp_path / "train.jsonl"), "WORK": str(tmp_path / "other")}
    for name in ("config.json", "train.jsonl"):
        (tmp_path / name).touch()
    never = run("qwen3-235b-slurm", work, **(job | models))
    assert never.returncode == 75
    assert "not one step of preparing was done in this job's time: give it a longer --time" in never.stderr
    assert (tmp_path / "bin/scontrol.log").read_text() == "requeue 4711\n"


def test_jobs_of_other_settings_and_arrays_that_begin_with_1_are_refused(tmp_path: Path) -> None:
    job = slurm(tmp_path / "bin") | {"TEACHER": "store", "STEP": "teach", "REHEARSE": "0"}
    work, models = tmp_path / "work", {"TEACHER_HF": "T", "STUDENT_HF": "S", "DATA": "d.jsonl"}
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "8", "SLURM_ARRAY_TASK_MIN": "1"}
    refused = run("qwen3-235b-slurm", work, **job, **models, **array)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == (
        "error: the array begins with 1, and parts with 0: --array=0-7; for a part of an array give PARTS\n"
    )
    run("qwen3-235b-slurm", work, **job, **models)  # nothing is prepared
    assert (work / "settings").read_text().startswith("TEACHER_HF=T\nSTUDENT_HF=S\nDATA=d.jsonl\n")
    for name, value in (("DATA", "e.jsonl"), ("TEACHER_HF", "other"), ("SEQ_LENGTH", "9"), ("TEMPLATE", "")):
        refused = run("qwen3-235b-slurm", work, **job, **(models | {name: value}))
        assert refused.returncode == 2
        assert refused.stderr.endswith(f", and now it is {name}={value}: take another WORK\n")
        assert refused.stderr.startswith(f"error: WORK={work} was begun with {name}=")


def logs_of(work: Path) -> str:
    """Return the logs of both nodes, because torchrun chooses the node of rank 0."""
    return "".join((work / f"logs/4711-node{node}.log").read_text() for node in range(2))


def published(name: str, width: int, ffn: int, heads: int, layers: int, **more: object) -> dict[str, object]:
    """Make a config.json from that of a smaller model of its kind."""
    shape = {"hidden_size": width, "intermediate_size": ffn, "num_attention_heads": heads}
    return {**PUBLISHED[name], **shape, "num_hidden_layers": layers, "max_window_layers": layers, **more}


SMALL, EXPERTS = "Qwen3-1.7B", "Qwen3-30B-A3B"
QWEN3_32B = published(SMALL, 5120, 25600, 64, 64, tie_word_embeddings=False)
QWEN3_235B = published(EXPERTS, 4096, 12288, 64, 94, moe_intermediate_size=1536)
QWEN3_2B = published(SMALL, 2048, 6144, 16, 28, tie_word_embeddings=True)
QWEN3_8B = published(SMALL, 4096, 12288, 32, 36)


@pytest.mark.parametrize(
    ("example", "teacher", "student", "flags", "ranks"),
    [
        ("qwen3-32b", QWEN3_32B, QWEN3_2B, "", "8 rank(s) = tensor 8 x"),
        ("qwen3-235b-slurm", QWEN3_235B, QWEN3_8B, "", "64 rank(s) = tensor 4 x context 1 x pipeline 4 x data 4"),
        ("qwen3-235b-slurm", QWEN3_235B, QWEN3_8B, "--teacher-fp8-format e4m3", "64 rank(s)"),
    ],
)  # fmt: skip
def test_a_plan_is_what_its_readme_says(
    example: str, teacher: dict, student: dict, flags: str, ranks: str, tmp_path: Path
) -> None:
    """The models are not here; two config.json are enough."""
    knobs = {"REHEARSE": "0", "PLAN": "1", "SET_UP": "0", "FDD_REHEARSE": "1", "EXTRA_TRAIN_FLAGS": flags}
    for name, config in (("TEACHER_HF", teacher), ("STUDENT_HF", student)):
        knobs[name] = str(tmp_path / name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    out = finished(example, tmp_path / "work", **knobs)
    table = out.split("estimated memory per rank, MiB:\n")[1].split("    (not included")[0]
    readme = (EXAMPLES / example / "README.md").read_text()
    if flags:
        table = "".join(line for line in table.splitlines(True) if "teacher weights" in line or "sum" in line)
        assert flags in readme
    assert table.strip() in readme
    assert ranks in out


def test_outside_of_a_job_one_is_told_to_submit(tmp_path: Path) -> None:
    done = run("qwen3-235b-slurm", tmp_path, REHEARSE="0", SET_UP="0")
    assert done.returncode == 2
    assert "sbatch" in done.stderr
    missing = run("qwen3-32b", tmp_path, REHEARSE="0", SET_UP="0", STUDENT_HF="")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: set TEACHER_HF")


def test_what_is_not_there_is_said_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    models = {"TEACHER_HF": str(tmp_path), "STUDENT_HF": str(tmp_path), "REHEARSE": "0", "SET_UP": "0"}
    there = str(tmp_path / "config.json")
    for knobs, message in (
        ({"DATA": there}, "set EVAL_DATA"),
        ({"DATA": "nowhere.jsonl", "EVALUATE": "0"}, "DATA=nowhere.jsonl: there is no nowhere.jsonl"),
        ({"DATA": there, "EVAL_DATA": "dolly=nowhere"}, "EVAL_DATA=dolly=nowhere: there is no nowhere"),
        ({"DATA": there, "EVALUATE": "0", "STUDENT_HF": "/nowhere"}, "there is no /nowhere/config.json"),
        ({"PLAN": "1", "TEACHER_HF": "/nowhere"}, "there is no /nowhere/config.json"),
    ):
        done = run("qwen3-32b", tmp_path / "work", **{**models, **knobs})
        assert done.returncode == 2
        assert message in done.stderr
    assert not (tmp_path / "work").exists()


def test_data_are_cut_again_for_another_length(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    script = """
        set -euo pipefail
        source examples/instructions.sh
        WORK=$1/work TEACHER_HF=$1 STUDENT_HF=$1 DATA=$1/config.json EVALUATE=0
        python() { mkdir -p "$WORK/teacher" "$WORK/student"; }
        for SEQ_LENGTH in 64 64 128; do recipe= && bring_in; done
    """
    command = ["bash", "-c", script, "bash", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.endswith(")") for line in done.stdout.splitlines() if line.startswith("== data")] == [
        False,
        True,
        False,
    ]


def test_a_training_with_other_settings_is_put_aside(tmp_path: Path) -> None:
    script = """
        set -euo pipefail
        source examples/steps.sh
        make() { mkdir -p "$1" && echo "$2" >>"$1/log" && [[ $2 != fails ]]; }
        RESUMABLE=$1 step training "$2" make "$2" "$3"
    """
    said = ""
    for resumable in ("0", "1"):
        for settings in ("fails", "fails", "one", "one", "two"):
            command = ["bash", "-c", script, "bash", resumable, str(tmp_path / resumable), settings]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
            failed = settings == "fails"
            assert done.returncode == failed, done.stderr
            how_on = "stopped in the step 'training' with status 1; the same command goes on there\n"
            assert done.stderr == (how_on if failed else "")
            said += done.stdout
    assert said.count("of other settings") == 2
    # An interrupted command continues if it is the same command.
    assert sorted(path.read_text() for path in tmp_path.glob("1*/log")) == [
        "fails\nfails\n",
        "one\n",
        "two\n",
    ]
    assert [path.read_text() for path in tmp_path.glob("0*/log")] == ["two\n"]
    assert (tmp_path / "1/log").read_text() == "two\n"
