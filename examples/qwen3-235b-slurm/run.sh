#!/usr/bin/env bash
#SBATCH --job-name=fdd-qwen3-235b
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Qwen3-235B-A22B teaches Qwen3-8B on 8 nodes of 8 GPUs: tensor parallel 4, 4 pipeline stages, the teacher's experts
# spread over the 8 GPUs of a node. Submit from the checkout; it and WORK lie where all nodes see them:
#
#   TEACHER_HF=Qwen3-235B-A22B STUDENT_HF=Qwen3-8B DATA=train.jsonl EVAL_DATA=test.jsonl \
#       sbatch examples/qwen3-235b-slurm/run.sh
#   PLAN=1 TEACHER_HF=... STUDENT_HF=... bash examples/qwen3-235b-slurm/run.sh   # here, from the two config.json
#   REHEARSE=1 bash examples/qwen3-235b-slurm/run.sh      # toy size, random weights, 4 processes on a CPU
#
# With TEACHER=store the teacher runs first and alone, in a layout of its own, and stores its features; the student then
# trains without it, on fewer GPUs if you like. Three jobs; the second is an array, whose tasks share the work:
#
#   export TEACHER=store TEACHER_HF=... STUDENT_HF=... DATA=... EVAL_DATA=...
#   ready=$(STEP=prepare sbatch --parsable examples/qwen3-235b-slurm/run.sh)
#   taught=$(STEP=teach sbatch --parsable --dependency=afterok:$ready --array=0-7 --nodes=2 examples/qwen3-235b-slurm/run.sh)
#   STEP=train sbatch --dependency=afterok:$taught --nodes=2 examples/qwen3-235b-slurm/run.sh
#
# A job that its time limit would end stops before and queues itself again; a training saves first. Slurm queues any of
# them again when a node fails.
# Either way finished steps are passed over and the training goes on from its last checkpoint.
set -euo pipefail
# Slurm runs a copy of this script from a folder of its own.
cd "${SLURM_SUBMIT_DIR:-$(dirname "${BASH_SOURCE[0]}")/../..}"
[[ ${SET_UP:-1} == 0 ]] || source tools/env.sh # SET_UP=0: the Python on PATH has the package, as in a container
source examples/instructions.sh

if [[ $REHEARSE == 1 ]]; then
    # work, nodes, GPUs a node, TP, PP, layers of the stages, experts over, precision, batch, length, epochs
    default=(runs/rehearsal 2 2 1 2 "" 2 "" 4 96 0.15)
    teacher_default=(2 1 2 2)
else
    default=(runs 8 8 4 4 'Etttttttttt|tttttttttt|tttttttt|ttttttttL' 8 --bf16 256 4096 1)
    teacher_default=(4 2 8 1)
fi
TEACHER=${TEACHER:-live} # store: it runs first and alone
STEP=${STEP:-all}        # with TEACHER=store: prepare, teach or train; all of them in one job
case $TEACHER-$STEP in
live-all | store-prepare | store-teach | store-train | store-all) ;;
*) echo "error: TEACHER=$TEACHER STEP=$STEP: live, or store with prepare, teach, train or all" >&2 && exit 2 ;;
esac
# The teacher's own layout, where it runs alone.
TEACHER_TENSOR_PARALLEL=${TEACHER_TENSOR_PARALLEL:-${teacher_default[0]}}
TEACHER_PIPELINE_PARALLEL=${TEACHER_PIPELINE_PARALLEL:-${teacher_default[1]}}
TEACHER_EXPERT_PARALLEL=${TEACHER_EXPERT_PARALLEL:-${teacher_default[2]}}
[[ -n ${PARTS:-} || ${SLURM_ARRAY_TASK_MIN:-0} == 0 ]] ||
    { echo "error: the array begins with $SLURM_ARRAY_TASK_MIN, and parts with 0: --array=0-7; for a part of an array give PARTS" >&2 && exit 2; }
# Producers that share the work. To repeat one task of an array: PARTS=8 STEP=teach sbatch --array=3 ...
PARTS=${PARTS:-${SLURM_ARRAY_TASK_COUNT:-${teacher_default[3]}}}
((${SLURM_ARRAY_TASK_ID:-0} < PARTS)) ||
    { echo "error: task $SLURM_ARRAY_TASK_ID of PARTS=$PARTS: number an array from 0, and give PARTS for a part of it" >&2 && exit 2; }
WORK=${WORK:-${default[0]}/qwen3-235b-to-8b}
NODES=${SLURM_NNODES:-${NODES:-${default[1]}}}
GPUS_PER_NODE=${GPUS_PER_NODE:-${default[2]}}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-${default[3]}}
PIPELINE_PARALLEL=${PIPELINE_PARALLEL:-${default[4]}}
PIPELINE_LAYOUT=${PIPELINE_LAYOUT-${default[5]}}   # the student's layers; the plan suggests one
EXPERT_PARALLEL=${EXPERT_PARALLEL:-${default[6]}}  # of the teacher
PRECISION_FLAGS=${PRECISION_FLAGS-${default[7]}}
MICRO_BATCH=${MICRO_BATCH:-1}                      # records at a time
GLOBAL_BATCH=${GLOBAL_BATCH:-${default[8]}}        # records per step
SEQ_LENGTH=${SEQ_LENGTH:-${default[9]}}            # longer records are cut
EPOCHS=${EPOCHS:-${default[10]}}
LEARNING_RATE=${LEARNING_RATE:-1e-5}
SAVE_INTERVAL=${SAVE_INTERVAL:-50}
EVAL_ITERS=${EVAL_ITERS:-2}
RESERVE_MINUTES=${RESERVE_MINUTES:-15}             # before the job's end, for the last step and saving
RANKS=$((NODES * GPUS_PER_NODE))
# Seconds after which what may be stopped at any moment is stopped: two minutes before the job's end.
LIMIT_S=
if [[ $TEACHER == store && $STEP != train && -n ${SLURM_JOB_END_TIME:-} ]]; then
    LIMIT_S=$((SLURM_JOB_END_TIME - $(date +%s) - 120))
    ((LIMIT_S > 0)) || LIMIT_S=1
fi

# shellcheck disable=SC2206  # words on purpose
layout=(
    --tensor-model-parallel-size "$TENSOR_PARALLEL" --pipeline-model-parallel-size "$PIPELINE_PARALLEL"
    --expert-tensor-parallel-size 1
    --use-distributed-optimizer --recompute-granularity selective $PRECISION_FLAGS
)
((TENSOR_PARALLEL == 1)) || layout+=(--sequence-parallel)
[[ $TEACHER == store ]] || layout+=(--teacher-expert-model-parallel-size "$EXPERT_PARALLEL")
# shellcheck disable=SC2206  # words on purpose
teacher_layout=(
    --tensor-model-parallel-size "$TEACHER_TENSOR_PARALLEL" --pipeline-model-parallel-size "$TEACHER_PIPELINE_PARALLEL"
    --expert-model-parallel-size "$TEACHER_EXPERT_PARALLEL" --expert-tensor-parallel-size 1 $PRECISION_FLAGS
)
((TEACHER_TENSOR_PARALLEL == 1)) || teacher_layout+=(--sequence-parallel)
[[ -z $PIPELINE_LAYOUT ]] || layout+=(--pipeline-model-parallel-layout "$PIPELINE_LAYOUT")
schedule=(
    --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --lr "$LEARNING_RATE" --lr-decay-style constant --weight-decay 0.01 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0
)
distillation=(--fdd-layers 4 --fdd-alpha 1 --fdd-beta 1 --fdd-kd-weight 1)

if [[ -n ${SLURM_JOB_ID:-} ]]; then
    read -r head_node < <(scontrol show hostnames "$SLURM_JOB_NODELIST") ||
        { echo "error: scontrol does not name the nodes of $SLURM_JOB_NODELIST" >&2 && exit 2; }
    mkdir -p "$WORK/logs"
    # One torchrun a node; they meet at the first. A log for each node: WORK/logs/JOB-node0.log, ...
    launch() {
        local words=(
            srun --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE"
            --kill-on-bad-exit=1 --open-mode=append --output="$WORK/logs/%j-node%n.log"
            torchrun --nnodes "$NODES" --nproc-per-node "$GPUS_PER_NODE" --rdzv-backend c10d
            --rdzv-endpoint "$head_node:$((20000 + SLURM_JOB_ID % 20000))" --rdzv-id "$SLURM_JOB_ID-$SECONDS" "$@"
        )
        printf '%q ' "${words[@]}"
        echo
        limited "${words[@]}"
    }
    python() {
        limited python "$@"
    }
    # limited COMMAND...: until LIMIT_S.
    limited() {
        local status=0
        if [[ -z $LIMIT_S ]]; then
            command "$@"
            return
        fi
        timeout --kill-after=60 $((LIMIT_S > SECONDS ? LIMIT_S - SECONDS : 1)) "$@" || status=$?
        if ((status != 0 && SECONDS >= LIMIT_S)); then
            echo "the job's time is over; the next start goes on where it was"
            status=$UNFINISHED
        fi
        return "$status"
    }
    queue_again() {
        local status=$?
        tell_end "$status"
        ((status == UNFINISHED)) || return 0
        if [[ -n $preparing && $steps_done == 0 ]]; then
            echo "error: not one step of preparing was done in this job's time: give it a longer --time" >&2
        else
            scontrol requeue "$SLURM_JOB_ID"
        fi
    }
    preparing=
    trap queue_again EXIT
elif [[ $REHEARSE$PLAN == 00 ]]; then
    echo "error: not in a Slurm job; submit this script with sbatch (or set PLAN=1, or REHEARSE=1)" >&2
    exit 2
fi
convert_teacher() { # all processes share the work
    launch tools/hf_to_mcore.py "$@"
}

[[ $REHEARSE == 0 ]] || rehearse qwen3_moe 10 qwen3 6
[[ $PLAN-$TEACHER != 1-store ]] ||
    { echo "error: PLAN=1 plans a teacher in memory: leave TEACHER out (fdd plan with --fdd-teacher-store plans the other)" >&2 && exit 2; }
[[ $PLAN == 0 ]] || plan "$RANKS"
[[ $TEACHER == live ]] || same_settings TEACHER_HF STUDENT_HF DATA TEMPLATE SEQ_LENGTH
if [[ $STEP == all || $STEP == prepare ]]; then
    preparing=1
    bring_in
    preparing=
    [[ $STEP == all ]] || exit 0
fi
if [[ $TEACHER == store && $STEP != train ]]; then
    for ((part = 0; part < PARTS; part++)); do
        [[ ${SLURM_ARRAY_TASK_ID:-$part} != "$part" ]] ||
            teach "$part/$PARTS" "$(iterations "$EPOCHS")" "${teacher_layout[@]}"
    done
    [[ $STEP == all ]] || exit 0
fi
LIMIT_S= # training looks at the clock itself
if [[ -n ${SLURM_JOB_END_TIME:-} ]]; then
    minutes=$(((SLURM_JOB_END_TIME - $(date +%s)) / 60 - RESERVE_MINUTES))
    # Megatron takes 0 minutes for no limit.
    STOP_FLAGS=${STOP_FLAGS:---exit-duration-in-mins $((minutes > 0 ? minutes : 1))}
fi
teacher=(--teacher-load "$WORK/teacher")
[[ $TEACHER == live ]] || teacher=(--fdd-teacher-store "$WORK/features")
train distilled "$WORK/student" "$(iterations "$EPOCHS")" "${teacher[@]}" "${distillation[@]}"
take_out distilled
compare distilled
