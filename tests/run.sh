#!/usr/bin/env bash
# All checks: lint, format, types, tests.
#
#   bash tests/run.sh fast         after each edit: whatever needs one process and about a second
#   bash tests/run.sh              what proves the product right: the oracle at every layout, counts, the real entry point
#   bash tests/run.sh all          with recipes, the quickstart, the study, benchmarks, models at size, kills
#
# Further arguments go to pytest: `bash tests/run.sh fast -k tokenizer -x`. Which test is in which tier:
# tests/harness/tiers.py. Each tier ends with its 25 slowest tests and its seconds, and says so where it took a third
# longer than its budget on two cores; it does not fail for that.
#
#   ONLY=tests        the named sections alone (lint, format, types, tests; several with spaces)
#   WORKERS=1         pytest processes (default: one a core, at most 4); each may run up to 12 ranks
#   COVERAGE=1        then a table of lines and branches of megatron_fdd, ranks and programs counted (takes longer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

declare -A budget_s=([fast]=90 [default]=600 [all]=1500)
tier=default
if [[ ${1:-} =~ ^[a-z]+$ && -z ${budget_s[$1]:-} && ! -e $1 ]]; then
    echo "error: no tier is called '$1' (fast, all, or nothing for the default one)" >&2
    exit 2
fi
if [[ -n ${1:-} && -n ${budget_s[$1]:-} ]]; then
    tier=$1
    shift
fi
source tools/env.sh
started=$SECONDS

ONLY=${ONLY:-lint format types tests}
cores=$(getconf _NPROCESSORS_ONLN)
WORKERS=${WORKERS:-$((cores < 4 ? cores : 4))}
# Several ranks share the cores: one thread each, or they wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

failed=()
# section NAME COMMAND...: run it now.
section() {
    local name=$1 begun=$SECONDS
    shift
    [[ " $ONLY " == *" $name "* ]] || return 0
    printf '\n== %s: %s\n' "$name" "${shown:-$*}"
    "$@" || failed+=("$name")
    printf -- '-- %s: %d s\n' "$name" $((SECONDS - begun))
}

# Types take half a minute when nothing is cached: beside the tests, and told after them.
types_log=$(mktemp)
trap 'rm -f "$types_log"' EXIT
types=
if [[ " $ONLY " == *" types "* ]]; then
    mypy megatron_fdd >"$types_log" 2>&1 &
    types=$!
fi
report_types() {
    local status=0
    wait "$types" || status=$?
    cat "$types_log"
    return "$status"
}

pytest=(python -m pytest)
if [[ ${COVERAGE:-} == 1 ]]; then
    export COVERAGE_PROCESS_START=$PWD/pyproject.toml COVERAGE_FILE=$PWD/.coverage/data
    rm -rf .coverage && mkdir .coverage
    pytest=(coverage run -m pytest)
fi

section lint ruff check .
section format ruff format --check .
section tests "${pytest[@]}" --tier "$tier" --durations 25 \
    -n "$WORKERS" --dist loadfile --no-loadscope-reorder "$@"
shown='mypy megatron_fdd (begun first)' section types report_types

if [[ ${COVERAGE:-} == 1 ]]; then
    coverage combine --quiet
    coverage report --precision 1
fi

took=$((SECONDS - started))
printf '\ntier %s: %d s (budget %d s)\n' "$tier" "$took" "${budget_s[$tier]}"
if ((took * 3 > budget_s[$tier] * 4)); then
    printf 'SLOW: tier %s took a third longer than its budget; the slowest tests are listed above\n' "$tier"
fi
if ((${#failed[@]})); then
    printf '\nFAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nall passed\n'
