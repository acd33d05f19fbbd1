#!/usr/bin/env bash
# All checks: lint, format, types, tests. Arguments go to pytest: `bash tests/run.sh -k tokenizer -x`.
#   ONLY=tests        the named sections alone (lint, format, types, tests; several with spaces)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/env.sh

ONLY=${ONLY:-lint format types tests}
# Several ranks share the cores: one thread each, or they wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

failed=()
section() {
    local name=$1 started=$SECONDS
    shift
    [[ " $ONLY " == *" $name "* ]] || return 0
    printf '\n== %s: %s\n' "$name" "$*"
    "$@" || failed+=("$name")
    printf -- '-- %s: %d s\n' "$name" $((SECONDS - started))
}

section lint ruff check .
section format ruff format --check .
section types mypy megatron_fdd
section tests python -m pytest "$@"

if ((${#failed[@]})); then
    printf '\nFAILED: %s\n' "${failed[*]}"
    exit 1
fi
printf '\nall passed\n'
