#!/usr/bin/env bash
# What only several GPUs can tell, on one machine with 2 to 8 of them: one command, which leaves one file to send.
#
#   bash tests/gpu/multi.sh                 some 15 minutes by estimate; then send runs/gpu-multi/results.tar.gz
#   DEVICE=cpu bash tests/gpu/multi.sh      the same here, on two ranks over gloo, so that nothing breaks there for the first time
#   GPUS=4                                  so many of them (default: all that torch sees); on a CPU it is not used
#   BUDGET_S=1800                           the whole ends after so long; a second call goes on where it was cut off
#   WHEELS, OUT, STATE, FRESH, RETRY        as tests/gpu/run.sh; OUT is runs/gpu-multi, on a CPU runs/gpu-multi-cpu
#
# Layouts (tensor, pipeline, virtual, context, expert and data parallel) against the float64 oracle over NCCL; trainings of 20
# steps at several layouts, with TransformerEngine and in FP8; how they end when a rank is killed or fails alone.
# Tolerances: tests/gpu/layouts.py, tests/gpu/trainings.py.
# NEVER RUN ON GPUS: written and tested on CPUs alone.
set -euo pipefail
if (($#)); then
    sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    [[ $1 == --help || $1 == -h ]] && exit 0
    echo "error: $1: settings are variables, before the command, as above" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

export DEVICE=${DEVICE:-cuda} GPUS=${GPUS:-} WHEELS=${WHEELS:-} FRESH=${FRESH:-0} RETRY=${RETRY:-0}
export BUDGET_S=${BUDGET_S:-1800} PART=1 WORKERS=1
export OUT=${OUT:-runs/gpu-multi$([[ $DEVICE != cpu ]] || echo -cpu)}
export STATE=${STATE:-$OUT}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# Megatron demands it for tensor and context parallelism before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
source tests/gpu/python.sh
exec python3 -m tests.gpu.multi
