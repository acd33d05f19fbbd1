#!/usr/bin/env bash
# Everything that only a GPU can tell, what is most worth knowing first, for minutes on a machine that is not ours: one
# GPU, no network. Useful wherever it is cut off: each ending, and each row of a table, is on the disk at once.
#
#   PART=1 bash tests/gpu/run.sh            at most 540 s: losses A/B, their tests, small runs, whole steps, FP8
#   PART=2 bash tests/gpu/run.sh            at most 180 s: goes on where the first was cut off
#   DEVICE=cpu bash tests/gpu/run.sh        all of it here at toy sizes, so that nothing breaks for the first time there
#   BUDGET_S=1800 bash tests/gpu/run.sh     the whole may take longer
#   WHEELS=folder                           install these wheels first, into .gpu/site (no index, no dependencies)
#   OUT=folder                              results.jsonl, results.md and log.txt (default: runs/gpu)
#   STATE=folder                            has a copy of them (default: runs/gpu); where OUT is empty PART=2 goes on from there
#   FRESH=1                                 forget what earlier calls have done
#   WORKERS=8                               pytest processes at a time, where pytest-xdist is installed
#
# Uses the python3 on PATH, with torch, pytest and the package's requirements (WHEELS may bring some); on a CPU, where it
# has no torch, the environment of tools/env.sh. What it does and in
# which order: tests/gpu/run.py. Tables for docs/performance.md: python3 -m benchmarks.tables runs/gpu/results.jsonl.
# The parts have been run on a CPU alone so far; on a GPU, none in this form.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export DEVICE=${DEVICE:-cuda} PART=${PART:-1} WHEELS=${WHEELS:-} OUT=${OUT:-runs/gpu} STATE=${STATE:-runs/gpu}
export BUDGET_S=${BUDGET_S:-$([[ $PART == 2 ]] && echo 180 || echo 540)} FRESH=${FRESH:-0} WORKERS=${WORKERS:-8}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
source tests/gpu/python.sh
exec python3 -m tests.gpu.run
