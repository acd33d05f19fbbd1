#!/usr/bin/env bash
# A student learns from its teacher on its own answers: round by round it is exported, answers prompts, the teacher
# reads the answers and stores its features, and the training goes on for some steps on them.
#
#   TEACHER_HF=SmolLM2-1.7B-Instruct STUDENT_HF=SmolLM2-360M-Instruct PROMPTS=chats.jsonl bash examples/on-policy/run.sh
#   REHEARSE=1 bash examples/on-policy/run.sh       # toy size, random weights, on a CPU
#
# PROMPTS: JSON lines, chats or instructions; their answers are the given text, and may be missing with OWN_FRACTION=1.
# Killed at any point, the same command goes on and does nothing twice. More ROUNDS can be added afterwards.
# shellcheck disable=SC2329  # the steps call the functions by name
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
[[ ${SET_UP:-1} == 0 ]] || source tools/env.sh # SET_UP=0: the Python on PATH has the package, as in a container
[[ ${REHEARSE:-0} == 0 ]] || TEMPLATE=${TEMPLATE:-alpaca} # the toys have no chat template
TEMPLATE=${TEMPLATE:-chat}                         # how prompts are asked: chat, alpaca or none
source examples/instructions.sh

if [[ $REHEARSE == 1 ]]; then
    # work, processes, precision, rounds, steps, micro-batch, batch, length, new tokens, held out
    default=(runs/rehearsal 1 "" 2 2 2 4 104 8 4)
else
    default=(runs 8 --bf16 3 100 1 128 2048 1024 128)
fi
WORK=${WORK:-${default[0]}/on-policy}
RANKS=${RANKS:-${default[1]}}                      # GPUs of the training
PRECISION_FLAGS=${PRECISION_FLAGS-${default[2]}}
ROUNDS=${ROUNDS:-${default[3]}}
STEPS=${STEPS:-${default[4]}}                      # of the optimizer, in a round
MICRO_BATCH=${MICRO_BATCH:-${default[5]}}          # records at a time
GLOBAL_BATCH=${GLOBAL_BATCH:-${default[6]}}        # records per step
SEQ_LENGTH=${SEQ_LENGTH:-${default[7]}}            # tokens of a prompt and its answer
MAX_NEW_TOKENS=${MAX_NEW_TOKENS:-${default[8]}}    # of an answer; a prompt that leaves no room for them is left out
HELD_OUT=${HELD_OUT:-${default[9]}}                # prompts that are only measured on
OWN_FRACTION=${OWN_FRACTION:-1}                    # of the records; the others have the given answer
TEMPERATURE=${TEMPERATURE:-1}                      # of the student's answers
SEED=${SEED:-1}                                    # draws prompts and answers
LEARNING_RATE=${LEARNING_RATE:-1e-5}
# Over all rounds. A decay needs its length: "--lr-decay-style cosine --lr-decay-iters 300".
SCHEDULE_FLAGS=${SCHEDULE_FLAGS:---lr-decay-style constant}
SAVE_INTERVAL=${SAVE_INTERVAL:-$STEPS}
LAYER_FLAGS=${LAYER_FLAGS:---fdd-layers 4}         # which blocks are compared
CHAT_KWARGS=${CHAT_KWARGS:-}                       # switches of the chat template: {"enable_thinking":false}
GENERATE=${GENERATE:-transformers}                 # or vllm, which never ran
GENERATE_FLAGS=${GENERATE_FLAGS:-}                 # more for tools/evaluate.py or examples/on-policy/vllm_answers.py
# How the teacher is run, and on how many processes: "--engine megatron --teacher DIR --tensor-model-parallel-size 8".
TEACH_FLAGS=${TEACH_FLAGS:-}
TEACH_RANKS=${TEACH_RANKS:-1}
STORE=${STORE:-$WORK/features}                     # of the teacher's features, of all rounds
MEASURE=${MEASURE:-1}                              # 0: no table, for a teacher that transformers cannot hold here

layout=(--use-distributed-optimizer)
# shellcheck disable=SC2206  # words on purpose
layout+=($PRECISION_FLAGS)
# shellcheck disable=SC2206  # words on purpose
schedule=(
    --seq-length "$SEQ_LENGTH" --micro-batch-size "$MICRO_BATCH" --global-batch-size "$GLOBAL_BATCH"
    --lr "$LEARNING_RATE" $SCHEDULE_FLAGS --override-opt_param-scheduler --weight-decay 0.01 --clip-grad 1.0
    --attention-dropout 0 --hidden-dropout 0
)
# shellcheck disable=SC2206  # words on purpose
distillation=($LAYER_FLAGS --fdd-alpha 1 --fdd-beta 1 --fdd-kd-weight 1)

[[ $REHEARSE == 0 ]] || rehearse llama 8 llama 5
PROMPTS=${PROMPTS:-${DATA:-}}
need TEACHER_HF STUDENT_HF PROMPTS
present TEACHER_HF "$TEACHER_HF/config.json"
present STUDENT_HF "$STUDENT_HF/config.json"
present PROMPTS "$PROMPTS"
case $GENERATE-$TEMPLATE in
transformers-chat | transformers-alpaca | transformers-none | vllm-chat | vllm-alpaca | vllm-none) ;;
*) echo "error: GENERATE=$GENERATE TEMPLATE=$TEMPLATE: transformers or vllm; chat, alpaca or none" >&2 && exit 2 ;;
esac
((SEED > 0)) || { echo "error: SEED=$SEED: at least 1" >&2 && exit 2; }
[[ -n $TEACH_FLAGS ]] || TEACH_FLAGS="--engine transformers --teacher $TEACHER_HF"
# shellcheck disable=SC2034  # read by name below
PROMPTS_SUM=$(cksum <"$PROMPTS")
# What the text of the rounds depends on cannot change in a WORK; all other settings count from where it goes on.
same_settings TEACHER_HF STUDENT_HF PROMPTS PROMPTS_SUM TEMPLATE CHAT_KWARGS STEPS GLOBAL_BATCH SEQ_LENGTH \
    MAX_NEW_TOKENS HELD_OUT OWN_FRACTION TEMPERATURE SEED
chat=()
[[ -z $CHAT_KWARGS ]] || chat=(--chat-template-kwargs "$CHAT_KWARGS")
# Files of this recipe are chats, or prompts that Alpaca's text is around already.
asked=(--template none)
[[ $TEMPLATE != chat ]] || asked=(--template chat "${chat[@]}")
recipe_dir=examples/on-policy

# once NAME OUTPUT COMMAND...: a step that is known by its name and number alone.
once() {
    recipe=
    step "$@"
}

hf_of() { # STUDENT: its Hugging Face folder; student N has N rounds behind it
    (($1 == 0)) && echo "$STUDENT_HF" || echo "$WORK/student-$1/hf"
}

read_prompts() {
    python $recipe_dir/prompts.py --input "$PROMPTS" --hf-model "$STUDENT_HF" --template "$TEMPLATE" "${chat[@]}" \
        --seq-length "$SEQ_LENGTH" --max-new-tokens "$MAX_NEW_TOKENS" --held-out "$HELD_OUT" \
        --own-fraction "$OWN_FRACTION" --seed "$SEED" --out "$WORK/prompts"
}

to_megatron() {
    python tools/hf_to_mcore.py --hf-model "$STUDENT_HF" --save "$WORK/student"
}

answer() { # STUDENT PROMPTS SEED OUT: answers to a file of prompts, in OUT/own/answers/prompts.seedSEED.jsonl
    local engine=tools/evaluate.py
    [[ $GENERATE == transformers ]] || engine=$recipe_dir/vllm_answers.py
    # shellcheck disable=SC2086  # words on purpose
    python "$engine" --hf-model "own=$(hf_of "$1")" --data "prompts=$2" --seeds "$3" --out "$4" "${asked[@]}" \
        --temperature "$TEMPERATURE" --max-prompt-tokens "$SEQ_LENGTH" --max-new-tokens "$MAX_NEW_TOKENS" \
        $GENERATE_FLAGS
}

answer_held_out() { # STUDENT
    answer "$1" "$WORK/prompts/held-out.jsonl" "$SEED" "$WORK/student-$1/answers"
    python $recipe_dir/rounds.py mix --own "$WORK/prompts/held-out.jsonl" \
        --answers "$WORK/student-$1/answers/own/answers/prompts.seed$SEED.jsonl" --out "$WORK/student-$1/own.jsonl"
}

measure() { # STUDENT
    python $recipe_dir/measure.py --teacher "$TEACHER_HF" --model "$(hf_of "$1")" --own "$WORK/student-$1/own.jsonl" \
        --given "$WORK/prompts/held-out.jsonl" "${asked[@]}" --seq-length "$SEQ_LENGTH" --work "$WORK" --student "$1"
}

# look STUDENT: how far it is from the teacher, on its own answers to the prompts that are held out and on given ones.
look() {
    if [[ $MEASURE != 0 ]]; then
        RESUMABLE=1 once "student $1: answers to the prompts held out" "$WORK/student-$1/answers" answer_held_out "$1"
        once "student $1: KL to the teacher" "$WORK/student-$1/measured.json" measure "$1"
    fi
}

choose() { # ROUND
    python $recipe_dir/rounds.py choose --prompts "$WORK/prompts/train.jsonl" --round "$1" \
        --records $((STEPS * GLOBAL_BATCH)) --own-fraction "$OWN_FRACTION" --seed "$SEED" --out "$WORK/round-$1/prompts"
}

answer_round() { # ROUND
    local prompts=$WORK/round-$1/prompts/own.jsonl seed=$((SEED + $1)) answers=$WORK/round-$1/answers
    [[ ! -s $prompts ]] || answer $(($1 - 1)) "$prompts" "$seed" "$answers"
    python $recipe_dir/rounds.py mix --own "$prompts" --answers "$answers/own/answers/prompts.seed$seed.jsonl" \
        --given "$WORK/round-$1/prompts/given.jsonl" --out "$answers/text.jsonl"
}

prepare() { # ROUND
    mkdir -p "$WORK/round-$1/data"
    python tools/prepare_data.py --input "$WORK/round-$1/answers/text.jsonl" --output-prefix "$WORK/round-$1/data/text" \
        --format instruction "${asked[@]}" --chat-turns last --seq-length "$SEQ_LENGTH" --skip-refused \
        --workers "${DATA_WORKERS:-1}" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$STUDENT_HF"
}

data_of() { # ROUND: what is read up to its end, in the array data
    # Megatron counts the steps of all rounds. A round's set has as many records as a round reads: its steps are one
    # epoch of it, whichever epoch that is by count.
    data=(
        --train-data-path "$WORK/round-$1/data/text" --train-iters $(($1 * STEPS)) --seed "$SEED"
        --eval-interval $(($1 * STEPS)) --eval-iters 0
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$STUDENT_HF"
    )
}

teach_round() { # ROUND
    data_of "$1"
    # shellcheck disable=SC2086  # words on purpose
    RANKS=$TEACH_RANKS launch -m megatron_fdd.teach $TEACH_FLAGS --store "$STORE" \
        --log-folder "$WORK/logs/teach-$1" "${data[@]}" "${schedule[@]}" "${distillation[@]}"
    mkdir -p "$WORK/round-$1/taught"
}

reached() { # the step of the last checkpoint
    cat "$WORK/training/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0
}

train_round() { # ROUND
    local end=$(($1 * STEPS))
    (($(reached) <= end)) ||
        { echo "error: $WORK/training is at step $(reached), round $1 ends at $end: take another WORK" >&2 && exit 2; }
    if (($(reached) < end)); then
        data_of "$1"
        # shellcheck disable=SC2086  # words on purpose
        launch -m megatron_fdd.distill --load "$WORK/training" --save "$WORK/training" --save-interval "$SAVE_INTERVAL" \
            --pretrained-checkpoint "$WORK/student" --use-checkpoint-args --fdd-teacher-store "$STORE" \
            --ckpt-format torch_dist --log-interval 1 --fdd-metrics-file "$WORK/training/metrics.jsonl" \
            "${data[@]}" "${layout[@]}" "${schedule[@]}" "${distillation[@]}" $EXTRA_TRAIN_FLAGS $STOP_FLAGS
    fi
    if (($(reached) < end)); then
        echo "stopped at step $(reached) of $end; the same command goes on from there"
        return "$UNFINISHED"
    fi
    mkdir -p "$WORK/round-$1/trained"
}

export_student() { # STUDENT
    mkdir -p "$WORK/student-$1"
    python tools/mcore_to_hf.py --load "$WORK/training" --ckpt-step $(($1 * STEPS)) --hf-out "$WORK/student-$1/hf"
}

once "prompts" "$WORK/prompts" read_prompts
once "student, Megatron" "$WORK/student" to_megatron
for ((round = 1; round <= ROUNDS; round++)); do
    look $((round - 1))
    folder=$WORK/round-$round
    once "round $round: its prompts" "$folder/prompts" choose $round
    RESUMABLE=1 once "round $round: the student answers" "$folder/answers" answer_round $round
    once "round $round: answers to tokens" "$folder/data" prepare $round
    RESUMABLE=1 once "round $round: the teacher's features" "$folder/taught" teach_round $round
    RESUMABLE=1 once "round $round: training" "$folder/trained" train_round $round
    once "student $round, Hugging Face" "$WORK/student-$round/hf" export_student $round
done
look "$ROUNDS"
echo "student: $(hf_of "$ROUNDS")"
[[ $MEASURE == 0 ]] || { echo "table: $WORK/own-text.md" && cat "$WORK/own-text.md"; }
