# shellcheck shell=bash
# Sourced by run.sh and multi.sh from the checkout's root: a python3 that has torch, or an error.
if [[ -z $WHEELS ]] && ! python3 -c 'import importlib.util as util; raise SystemExit(not util.find_spec("torch"))'; then
    if [[ $DEVICE != cpu ]]; then
        echo "error: the python3 on PATH ($(command -v python3)) has no torch; put one that has it first on PATH," \
            "or name a folder with wheels of what is missing (WHEELS=folder)" >&2
        exit 1
    fi
    source tools/env.sh
fi
