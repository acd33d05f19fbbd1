# shellcheck shell=bash
# Sourced: `source tools/env.sh` makes .venv in the checkout with megatron_fdd[dev] installed at the versions of
# constraints.txt, and puts it first on PATH. A second time it only checks a stamp; a set-up that was
# interrupted has none and is done again.
#
# PYTHON=path chooses the interpreter; VENV=path another place for the environment.

fdd_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# megatron-core 0.19.2 has wheels for 3.12 and 3.13 and no source package. Asking for ensurepip finds the
# Pythons of distributions that leave it out; running the candidate finds pyenv's shims that lead nowhere.
fdd_python_fits() {
    "$1" -c 'import sys, venv, ensurepip
raise SystemExit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

fdd_find_python() {
    local versions=${PYENV_ROOT:-$HOME/.pyenv}/versions candidate
    local candidates=("${PYTHON:-}")
    if [[ -z ${PYTHON:-} ]]; then
        candidates=(
            python3.12 "$versions"/3.12*/bin/python3
            python3.13 "$versions"/3.13*/bin/python3
            python3 python
        )
    fi
    for candidate in "${candidates[@]}"; do
        if fdd_python_fits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "error: no Python 3.12 or 3.13 with venv found (tried: ${candidates[*]##*/}); install one," \
        "for example 'apt install python3.12 python3.12-venv' or 'pyenv install 3.12'," \
        "or set PYTHON=/path/to/it" >&2
    return 1
}

fdd_set_up() {
    local venv=$1 stamp want python started=$SECONDS
    stamp=$venv/.megatron_fdd
    want="$fdd_root $(cat "$fdd_root/pyproject.toml" "$fdd_root/setup.py" "$fdd_root/constraints.txt" | cksum)"
    if [[ -f $stamp && $(<"$stamp") == "$want" ]] && fdd_python_fits "$venv/bin/python"; then
        return
    fi
    rm -f "$stamp"
    if ! fdd_python_fits "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(fdd_find_python) || return
        echo "set-up: $venv from $python"
        "$python" -m venv --clear "$venv" || return
    fi
    echo "set-up: installing megatron_fdd (a minute or two the first time)"
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint "$fdd_root/constraints.txt" --editable "${fdd_root}[dev]" || return
    # TransformerEngine's Python without its kernels and out of the way, for tests/transformer_engine on CPUs.
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
        --constraint "$fdd_root/constraints.txt" --target "$venv/transformer-engine" transformer-engine || return
    echo "$want" >"$stamp"
    echo "set-up: $((SECONDS - started)) s"
}

fdd_set_up "${VENV:-$fdd_root/.venv}" || return 1
export VIRTUAL_ENV=${VENV:-$fdd_root/.venv}
export PATH=$VIRTUAL_ENV/bin:$PATH
