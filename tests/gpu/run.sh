#!/usr/bin/env bash
# Everything that only a GPU can tell, in one call on a machine with one GPU, without a network, in eight minutes:
#
#   bash tests/gpu/run.sh
#   WHEELS=folder bash tests/gpu/run.sh     install these wheels first, into a temporary folder (no index, no dependencies)
#   BENCHMARKS=0 bash tests/gpu/run.sh      the tests alone
#   BUDGET_S=1800 bash tests/gpu/run.sh     the whole may take longer (default 470 s); what does not fit is cut off, and
#                                           the results say so
#   OUT=folder                              where results go (default: runs/gpu): results.md has device, versions, what passed,
#                                           what was skipped and why, and the benchmarks' tables; logs and pictures beside it.
#                                           It is written however the script ends
#   WORKERS=4                               pytest processes at a time, where pytest-xdist is installed
#
# Uses the python3 on PATH: with torch, pytest and the package's requirements (WHEELS may bring some).
#
# Numeric tests of the fused losses (bf16 and float32 against float64, vocabularies up to 152k), Triton's own tests on the GPU,
# small distillations through the real entry point beside their float32 CPU losses; where TransformerEngine imports, with its
# modules and in FP8 too, and checkpoints through its modules and back. Then benchmarks/run.sh at GPU size.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

WHEELS=${WHEELS:-}
BENCHMARKS=${BENCHMARKS:-1}
BUDGET_S=${BUDGET_S:-470}
OUT=${OUT:-runs/gpu}
WORKERS=${WORKERS:-4}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONUNBUFFERED=1
mkdir -p "$OUT"
rm -f "$OUT"/{versions.txt,results.md,results.jsonl,ops.log,distill.log,benchmarks.log,step-profile.png}

packages=
failed=()
recorded=$(wc -l <benchmarks/results.jsonl)

finish() {
    local log
    tail -n +$((recorded + 1)) benchmarks/results.jsonl >"$OUT/results.jsonl"
    {
        printf '# GPU results, %s\n\n```\n' "$(date -u +%Y-%m-%dT%H:%MZ)"
        cat "$OUT/versions.txt"
        printf '```\n\nafter %d s; not passed: %s\n' $SECONDS "${failed[*]:-nothing}"
        for log in ops distill; do
            [[ -f $OUT/$log.log ]] || continue
            printf '\n## %s\n\n%d tests passed\n\n```\n' "$log" "$(grep -cE ' PASSED' "$OUT/$log.log")"
            grep -E '^(FAILED|ERROR|SKIPPED)| (passed|failed|skipped)' "$OUT/$log.log"
            printf '```\n'
        done
        [[ ! -f $OUT/benchmarks.log ]] || printf '\n## benchmarks\n\n```\n%s\n```\n' "$(cat "$OUT/benchmarks.log")"
    } >"$OUT/results.md"
    [[ -z $packages ]] || rm -rf "$packages"
    printf '\nresults: %s\n' "$OUT/results.md"
}
trap finish EXIT
trap 'kill $(jobs -p) 2>/dev/null; exit 130' INT TERM

if [[ -n $WHEELS ]]; then
    packages=$(mktemp -d)
    python3 -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$packages" "$WHEELS"/*.whl || exit 1
fi
export OUT PYTHONPATH=$PWD${packages:+:$packages}${PYTHONPATH:+:$PYTHONPATH}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$OUT/versions.txt"
python3 - <<'PY' | tee -a "$OUT/versions.txt" || exit 1
import platform
import torch
from benchmarks.measure import versions
if not torch.cuda.is_available():
    raise SystemExit("error: torch sees no GPU")
print("python", platform.python_version(), "cuda", torch.version.cuda, "nccl", ".".join(map(str, torch.cuda.nccl.version())))
print(versions())
PY

# The command, for as long as is left.
in_time() {
    local left=$((BUDGET_S - SECONDS))
    ((left > 0)) || return 124
    timeout --kill-after=10 "$left" "$@"
}

# Why a section that ended with this status has not passed.
note() {
    local name=$1 status=$2
    case $status in
        0) ;;
        124 | 137) failed+=("$name (cut off: $BUDGET_S s were over)") ;;
        *) failed+=("$name") ;;
    esac
}

section() {
    local name=$1 started=$SECONDS
    shift
    printf '\n== %s: %s\n' "$name" "$*"
    in_time "$@" 2>&1 | tee "$OUT/$name.log"
    note "$name" "${PIPESTATUS[0]}"
    printf -- '-- %s: %d s\n' "$name" $((SECONDS - started))
}

parallel=()
if python3 -c 'import xdist' 2>/dev/null; then
    parallel=(-n "$WORKERS")
fi
in_time python3 -m pytest -v -rs tests/gpu/test_distill.py >"$OUT/distill.log" 2>&1 &
distill=$!
section ops python3 -m pytest -v -rs "${parallel[@]}" tests/gpu --ignore tests/gpu/test_distill.py tests/ops/test_triton.py \
    tests/ops/test_triton_compiles.py tests/convert/test_transformer_engine.py
wait "$distill"
note distill $?
printf '\n== distill\n'
cat "$OUT/distill.log"
if [[ $BENCHMARKS == 1 ]]; then
    section benchmarks env DEVICE=cuda SETUP=0 bash benchmarks/run.sh
fi

if ((${#failed[@]})); then
    printf '\nNOT PASSED: %s\n' "$(IFS=,; echo "${failed[*]}")"
    exit 1
fi
printf '\nall passed\n'
