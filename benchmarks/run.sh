#!/usr/bin/env bash
# Every benchmark, one after the other; tables to the screen, figures to benchmarks/results.jsonl.
#
#   bash benchmarks/run.sh                on one CPU thread; leave the machine alone meanwhile
#   SETUP=0 bash benchmarks/run.sh        with the Python and the packages that are there: no environment is made
#   SMOKE=1 bash benchmarks/run.sh        that everything runs; the figures mean nothing and are not recorded
#
# On a GPU: bash tests/gpu/run.sh, which has its tests, too.
#
# The approximations have commands of their own, with models and text to name: benchmarks/skipping.py, tap_dtype.py and
# benchmarks/approximations.py. Liger-Kernel and ModelOpt are compared with where they are installed (pip install liger-kernel nvidia-modelopt).
# An exit status of 1 means that a bar was missed, or that repeats differed too much for a ratio.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

SMOKE=${SMOKE:-}
SETUP=${SETUP:-1}
if [[ $SETUP == 1 ]]; then
    source tools/env.sh || exit 1
fi
export OMP_NUM_THREADS=1

failed=()
run() {
    printf '\n== %s\n' "$*"
    "$@" || failed+=("$*")
}

run python3 -m benchmarks.linear_kl ${SMOKE:+--smoke}
run python3 -m benchmarks.modelopt ${SMOKE:+--smoke}
run python3 -m benchmarks.step --turns --repeats 15 --cross-entropy ${SMOKE:+--smoke}
# Last, for it is long and the least new.
[[ -n $SMOKE ]] || run python3 -m benchmarks.linear_kl --sweep --no-plain

if ((${#failed[@]})); then
    printf '\nmissed or unsteady: %s\n' "${failed[@]}"
    exit 1
fi
