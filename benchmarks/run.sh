#!/usr/bin/env bash
# Every benchmark, one after the other; tables to the screen, figures to benchmarks/results.jsonl.
#
#   bash benchmarks/run.sh                on one CPU thread; leave the machine alone meanwhile
#   DEVICE=cuda bash benchmarks/run.sh    on one GPU, at its sizes (its tests: tests/gpu/run.sh)
#   SETUP=0 bash benchmarks/run.sh        with the Python and the packages that are there: no environment is made
#   SMOKE=1 bash benchmarks/run.sh        that everything runs; the figures mean nothing and are not recorded
#
# The approximations have commands of their own, with models and text to name: benchmarks/skipping.py, tap_dtype.py and
# benchmarks/approximations.py. Liger-Kernel and ModelOpt are compared with where they are installed (pip install liger-kernel nvidia-modelopt).
# An exit status of 1 means that a bar was missed, or that repeats differed too much for a ratio.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

DEVICE=${DEVICE:-cpu}
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

run python3 -m benchmarks.linear_kl --device "$DEVICE" ${SMOKE:+--smoke}
if [[ $DEVICE == cuda ]]; then
    run python3 -m benchmarks.step --device cuda --bf16 --profile "${OUT:-runs/gpu}/step-profile.png" ${SMOKE:+--smoke}
    if python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("transformer_engine") is None)'; then
        run python3 -m benchmarks.step --device cuda --bf16 --transformer-impl transformer_engine --fp8-format hybrid \
            --fp8-recipe tensorwise --teacher-fp8-format e4m3 ${SMOKE:+--smoke}
    fi
else
    run python3 -m benchmarks.modelopt ${SMOKE:+--smoke}
    run python3 -m benchmarks.step ${SMOKE:+--smoke}
fi
# Last, for it is long and the least new.
[[ -n $SMOKE ]] || run python3 -m benchmarks.linear_kl --device "$DEVICE" --sweep --no-plain

if ((${#failed[@]})); then
    printf '\nmissed or unsteady: %s\n' "${failed[@]}"
    exit 1
fi
