# shellcheck shell=bash
# shellcheck disable=SC2154  # layout, schedule and distillation are the recipe's
# Sourced by the recipes that distil on instructions: the course that they share, from Hugging Face folders to a
# report. A recipe sets what it is about, and calls, in this order,
#   rehearse (only with REHEARSE=1), plan (only with PLAN=1), bring_in, train NAME ..., take_out NAME, compare.
# A teacher that runs first is called with `teach`, before `train`.
#
# Two models go in, TEACHER_HF and STUDENT_HF, and instructions: DATA to train on (5 % of it for validation), and
# EVAL_DATA to ask for answers. `layout`, `schedule` and `distillation` are arrays of flags.

source examples/steps.sh

REHEARSE=${REHEARSE:-0}                  # 1: toy models with random weights, on a CPU
PLAN=${PLAN:-0}                          # 1: print plan and memory of the layout, from config.json alone
EVALUATE=${EVALUATE:-1}                  # 0: stop at the exported student
TEMPLATE=${TEMPLATE-alpaca}              # how records become prompts; empty where they are prompts already, or chats
EVAL_FLAGS=${EVAL_FLAGS:-}               # more for tools/evaluate.py
EXTRA_TRAIN_FLAGS=${EXTRA_TRAIN_FLAGS:-} # more for training, after all others
STOP_FLAGS=${STOP_FLAGS:-}               # when to stop early, such as --exit-duration-in-mins 220; the same command goes on
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # Megatron wants it for tensor parallelism

need() { # NAME...: variables without a default
    local name
    for name in "$@"; do
        [[ -n ${!name:-} ]] || { echo "error: set $name (see examples/README.md)" >&2 && exit 2; }
    done
}

# present NAME FILE: what is missed only after hours of other steps.
present() {
    [[ -e $2 ]] || { echo "error: $1=${!1}: there is no $2 (paths are relative to $PWD)" >&2 && exit 2; }
}

# rehearse TEACHER_FAMILY LAYERS STUDENT_FAMILY LAYERS [FLAG]: toy models and records take the place of all that is
# not given.
rehearse() {
    local toys=$WORK/toys
    if [[ ! -f $toys/done ]]; then
        python examples/toy.py model --family "$1" --num-layers "$2" --hf-out "$toys/teacher-hf"
        python examples/toy.py model --family "$3" --num-layers "$4" "${@:5}" --hf-out "$toys/student-hf"
        python examples/toy.py records --output-dir "$toys/data"
        touch "$toys/done"
    fi
    TEACHER_HF=${TEACHER_HF:-$toys/teacher-hf} STUDENT_HF=${STUDENT_HF:-$toys/student-hf}
    DATA=${DATA:-$toys/data/train.jsonl} EVAL_DATA=${EVAL_DATA:-$toys/data/test.jsonl}
    EVAL_FLAGS=${EVAL_FLAGS:---seeds 10 --max-new-tokens 4}
    export FDD_REHEARSE=1
}

# plan RANKS: what every rank would do and hold. Needs a config.json in TEACHER_HF and STUDENT_HF, and no launch.
plan() {
    need TEACHER_HF STUDENT_HF
    present TEACHER_HF "$TEACHER_HF/config.json"
    present STUDENT_HF "$STUDENT_HF/config.json"
    local ranks=$1 model vocabulary
    for model in teacher student; do
        local folder=${model^^}_HF
        step "plan of the $model" "$WORK/plan/$model" \
            python tools/hf_to_mcore.py --config-only --hf-model "${!folder}" --save "$WORK/plan/$model"
    done
    vocabulary=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["vocab_size"])' \
        "$STUDENT_HF/config.json")
    # shellcheck disable=SC2086  # words on purpose
    show fdd plan --world-size "$ranks" -- \
        --pretrained-checkpoint "$WORK/plan/student" --use-checkpoint-args --teacher-load "$WORK/plan/teacher" \
        --mock-data --tokenizer-type NullTokenizer --vocab-size "$vocabulary" \
        "${layout[@]}" "${schedule[@]}" "${distillation[@]}" \
        --train-iters 1 --save-interval 1 --eval-interval 1 --eval-iters 0 $EXTRA_TRAIN_FLAGS
    exit
}

# same_settings NAME...: refuse a WORK that was begun with other values of these variables. Jobs that each do a part of
# the work see no commands of the others.
same_settings() {
    local name now=() begun
    for name in "$@"; do now+=("$name=${!name:-}"); done
    mkdir -p "$WORK"
    if [[ ! -e $WORK/settings ]]; then
        printf '%s\n' "${now[@]}" >"$WORK/settings.$$"
        ln "$WORK/settings.$$" "$WORK/settings" 2>/dev/null || cp -n "$WORK/settings.$$" "$WORK/settings"
        rm "$WORK/settings.$$"
    fi
    mapfile -t begun <"$WORK/settings"
    for name in "${!now[@]}"; do
        [[ ${now[name]} == "${begun[name]:-}" ]] ||
            { echo "error: WORK=$WORK was begun with ${begun[name]:-other settings}, and now it is ${now[name]}: take another WORK" >&2 && exit 2; }
    done
}

prepare_data() { # OUTPUT FILE TEMPLATE LENGTH
    mkdir -p "$1"
    python tools/prepare_data.py --input "$2" --output-prefix "$1/instructions" --format instruction \
        ${3:+--template "$3"} --split 95,5 --seq-length "$4" --skip-refused --workers "${DATA_WORKERS:-1}" \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$STUDENT_HF"
}

# convert_teacher ARGUMENTS...: tools/hf_to_mcore.py; a recipe with many nodes shares the work among them.
convert_teacher() {
    python tools/hf_to_mcore.py "$@"
}

# Both models to Megatron, and the instructions to tokens.
bring_in() {
    need TEACHER_HF STUDENT_HF DATA
    present TEACHER_HF "$TEACHER_HF/config.json"
    present STUDENT_HF "$STUDENT_HF/config.json"
    present DATA "$DATA"
    if [[ $EVALUATE != 0 ]]; then
        need EVAL_DATA
        present EVAL_DATA "${EVAL_DATA#*=}" # may be NAME=FILE
    fi
    mkdir -p "$WORK"
    step "teacher, Megatron" "$WORK/teacher" convert_teacher --hf-model "$TEACHER_HF" --save "$WORK/teacher"
    step "student, Megatron" "$WORK/student" \
        python tools/hf_to_mcore.py --hf-model "$STUDENT_HF" --save "$WORK/student"
    step "data" "$WORK/data" prepare_data "$WORK/data" "$DATA" "$TEMPLATE" "$SEQ_LENGTH"
}

# iterations EPOCHS: steps of GLOBAL_BATCH records that go through the training set so often.
iterations() {
    python -c 'import json, math, sys
documents = json.load(open(sys.argv[1]))["documents"]
print(math.ceil(float(sys.argv[2]) * documents / int(sys.argv[3])))' \
        "$WORK/data/instructions_train.prepared.json" "$1" "$GLOBAL_BATCH"
}

# data_flags ITERATIONS: what is read, and how much of it; in the array of that name. Steps behind it are done again
# when the data were prepared again.
data_flags() {
    recipe+="$(cksum <"$WORK/data/instructions_train.prepared.json");"
    data_flags=(
        --train-data-path "$WORK/data/instructions_train" --valid-data-path "$WORK/data/instructions_valid"
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$STUDENT_HF"
        --train-iters "$1" --eval-interval "$SAVE_INTERVAL" --eval-iters "$EVAL_ITERS"
    )
}

# teach PART ITERATIONS FLAGS...: part I/N of the teacher's features to WORK/features, for a training of so many steps.
# FLAGS are those of the teacher's own layout. An interrupted part goes on with what is missing.
teach() {
    local part=$1
    data_flags "$2"
    RESUMABLE=1 step "teacher's features, part $part" "$WORK/taught/${part/\// of }" run_teacher "$part" \
        "${data_flags[@]}" "${schedule[@]}" "${distillation[@]}" "${@:3}"
}

run_teacher() { # PART FLAGS...
    launch -m megatron_fdd.teach --engine megatron --teacher "$WORK/teacher" --store "$WORK/features" \
        --part "$1" --log-folder "$WORK/logs/teach-${1/\//of}" "${@:2}"
    mkdir -p "$WORK/taught/${1/\// of }"
}

# train NAME START ITERATIONS FLAGS...: from the weights of the checkpoint START to WORK/NAME. An interrupted run goes
# on from its own last checkpoint.
train() {
    local output=$WORK/$1 start=$2 iterations=$3
    data_flags "$iterations"
    # shellcheck disable=SC2206  # words on purpose
    local flags=(
        --load "$output" --save "$output" --pretrained-checkpoint "$start" --use-checkpoint-args
        "${data_flags[@]}" --save-interval "$SAVE_INTERVAL" --ckpt-format torch_dist --log-interval 1
        --fdd-metrics-file "$output/metrics.jsonl"
        "${layout[@]}" "${schedule[@]}" "${@:4}" $EXTRA_TRAIN_FLAGS
    )
    RESUMABLE=1 step "$1" "$output" run_to_the_end "$output" "$iterations" "${flags[@]}"
}

run_to_the_end() { # OUTPUT ITERATIONS FLAGS...
    local reached
    mkdir -p "$1"
    # shellcheck disable=SC2086  # words on purpose
    launch -m megatron_fdd.distill "${@:3}" $STOP_FLAGS
    reached=$(<"$1/latest_checkpointed_iteration.txt")
    if ((reached < $2)); then
        echo "stopped at step $reached of $2; the same command goes on from there"
        return "$UNFINISHED"
    fi
}

take_out() { # NAME
    step "$1, Hugging Face" "$WORK/$1-hf" python tools/mcore_to_hf.py --load "$WORK/$1" --hf-out "$WORK/$1-hf"
}

# compare NAME...: answers of the student as it came and of what the runs made of it, and one page about the runs.
compare() {
    local name models=(--hf-model "start=$STUDENT_HF") runs=()
    echo "student: $WORK/$1-hf"
    if [[ $EVALUATE == 0 ]]; then
        return
    fi
    for name in "$@"; do
        models+=(--hf-model "$name=$WORK/$name-hf")
        runs+=("$name=$WORK/$name" "$name=$WORK/evaluation/$name")
    done
    # shellcheck disable=SC2086  # words on purpose
    RESUMABLE=1 step "answers" "$WORK/evaluation" python tools/evaluate.py \
        "${models[@]}" --data "$EVAL_DATA" ${TEMPLATE:+--template "$TEMPLATE"} $EVAL_FLAGS --out "$WORK/evaluation"
    step "report" "$WORK/report" python tools/report.py "${runs[@]}" --out "$WORK/report"
    echo "answers: $WORK/evaluation   report: $WORK/report/report.html"
}
