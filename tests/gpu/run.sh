#!/usr/bin/env bash
# Everything that only a GPU can tell, what is most worth knowing first, for minutes on a machine that is not ours: one
# GPU, no network. Useful wherever it is cut off: each ending, and each row of a table, is on the disk at once.
#
#   PART=1 bash tests/gpu/run.sh            at most 540 s: losses A/B, their tests, small runs, whole steps, FP8
#   PART=2 bash tests/gpu/run.sh            at most 180 s: goes on where the first was cut off
#   DEVICE=cpu bash tests/gpu/run.sh        all of it here at toy sizes, so that nothing breaks for the first time there
#   BUDGET_S=1800 bash tests/gpu/run.sh     the whole may take longer
#   WHEELS=folder                           install these wheels first, into .gpu/site (no index, no dependencies)
#   OUT=folder                              results.jsonl, results.md and log.txt (default: runs/gpu, on a CPU runs/gpu-cpu)
#   STATE=folder                            has a copy of the first two (same default); where OUT is empty PART=2 goes on from there
#   FRESH=1                                 forget what earlier calls have done; results of another commit, of changed files or
#                                           of another device are never gone on from: they get another name
#   RETRY=1                                 after a mend: what failed or hung is run again, what has passed counts, whatever was changed
#   WORKERS=8                               pytest processes at a time, where pytest-xdist is installed
#
# Ctrl-C, or an ssh that drops, leaves all that is known; the same command goes on. Uses the python3 on PATH, with torch,
# pytest and the package's requirements (WHEELS may bring some); on a CPU, where it has no torch, the environment of
# tools/env.sh. What it does and in which order: tests/gpu/run.py. Tables for docs/performance.md:
# python3 -m benchmarks.tables runs/gpu/results.jsonl.
# The parts have been run on a CPU alone so far; on a GPU, none in this form.
set -euo pipefail
if (($#)); then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [[ $1 == --help || $1 == -h ]] && exit 0
    echo "error: $1: settings are variables, before the command, as above" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export DEVICE=${DEVICE:-cuda} PART=${PART:-1} WHEELS=${WHEELS:-} FRESH=${FRESH:-0} RETRY=${RETRY:-0} WORKERS=${WORKERS:-8}
folder=runs/gpu$([[ $DEVICE != cpu ]] || echo -cpu)
export OUT=${OUT:-$folder} STATE=${STATE:-$folder}
export BUDGET_S=${BUDGET_S:-$([[ $PART == 2 ]] && echo 180 || echo 540)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
source tests/gpu/python.sh
exec python3 -m tests.gpu.run
