#!/usr/bin/env bash
# Does it help? Students of one teacher are trained with and without the terms of feature dynamics distillation, on the
# same text, in the same order, from the same start, for the same number of tokens, with several seeds. They are
# compared with logit distillation for each seed. docs/study.md has the results of the defaults and explains them.
#
#   bash examples/study/run.sh TEACHER TEXT
#
#   TEACHER   a small Llama as a Hugging Face folder (docs/study.md: stories260K of karpathy/tinyllamas, 5 layers)
#   TEXT      stories, a line <|endoftext|> between them (docs/study.md: the first 2 MiB of TinyStories' training split)
#
# 1. Each student is trained with each of METHODS at each of its RATES, with SCAN_SEED. A method gets the rate at which
#    it did best on validation stories. examples/study/one_run.sh has the flags in which methods differ.
# 2. Each of METHODS is trained at its rate with each of SEEDS.
# 3. The students are scored on test stories, which nothing was chosen on: WORK/results.json, WORK/tables.md.
#
# Every capital name below can be set in the environment. An interrupted study continues with the run that it was
# at; more SEEDS or METHODS can be added later in the same WORK. The defaults make 91 runs, two at a time with one
# thread each; on quiet cores most took about 20 s.
# PUBLISH=1 also replaces the results of this folder and of docs/study.md.
set -euo pipefail
if [[ $# != 2 || $1 == -* ]]; then
    sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi
[[ -f $1/config.json ]] || { echo "study: error: $1 has no config.json; give a Hugging Face folder" >&2 && exit 1; }
[[ -f $2 ]] || { echo "study: error: $2 is no file; give a text of stories" >&2 && exit 1; }
TEACHER=$(realpath "$1") TEXT=$(realpath "$2")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
SETUP=${SETUP:-1} # 0: use the present Python and packages
[[ $SETUP == 0 ]] || source tools/env.sh

WORK=${WORK:-runs/study}
JOBS=${JOBS:-2} # runs at a time
STUDENTS=${STUDENTS:-shallow thin}
METHODS=${METHODS:-ce kd kd-trajectory kd-delta fdd fdd-centred fdd-no-norm} # or any of those in one_run.sh
SEEDS=${SEEDS:-1 2 3}
THIN_RATES=${THIN_RATES:-3e-3 1e-2 3e-2 6e-2}
SHALLOW_RATES=${SHALLOW_RATES:-1e-3 3e-3 1e-2}
SCAN_SEED=${SCAN_SEED:-100}
# The budget of a run: TRAIN_ITERS x BATCH x SEQ_LENGTH tokens.
TRAIN_ITERS=${TRAIN_ITERS:-200}
WARMUP_ITERS=${WARMUP_ITERS:-10}
BATCH=${BATCH:-4} # sequences a step
SEQ_LENGTH=${SEQ_LENGTH:-128}
# The student from scratch.
THIN_LAYERS=${THIN_LAYERS:-5}
THIN_WIDTH=${THIN_WIDTH:-32}
THIN_HEADS=${THIN_HEADS:-2}
THIN_INIT_STD=${THIN_INIT_STD:-0.1} # GPT-2's 0.02 for a width of 32: it shrinks with the root of the width
THIN_PAIRS=${THIN_PAIRS:-1:1,2:2,3:3,4:4} # blocks student:teacher, 1-based; what --fdd-layers 4 chooses for 5 layers
# The student made of layers of the teacher (0-based); its blocks are paired with the blocks that they came from.
SHALLOW_LAYERS=${SHALLOW_LAYERS:-0,2,4}
SHALLOW_PAIRS=${SHALLOW_PAIRS:-1:1,2:3}
# This teacher's tokenizer puts <s> before a story, as in its training; 1 for one that needs an end token instead.
APPEND_EOD=${APPEND_EOD:-0}
PUBLISH=${PUBLISH:-0}
export WORK TEACHER TRAIN_ITERS WARMUP_ITERS BATCH SEQ_LENGTH
export THIN_LAYERS THIN_WIDTH THIN_HEADS THIN_INIT_STD THIN_PAIRS SHALLOW_PAIRS

mkdir -p "$WORK"
settings=$(printf '"%s": %s, ' train_iters "$TRAIN_ITERS" warmup_iters "$WARMUP_ITERS" batch "$BATCH" \
    seq_length "$SEQ_LENGTH" append_eod "$APPEND_EOD" thin_layers "$THIN_LAYERS" thin_width "$THIN_WIDTH" \
    thin_heads "$THIN_HEADS" thin_init_std "$THIN_INIT_STD" thin_pairs "\"$THIN_PAIRS\"" \
    shallow_layers "\"$SHALLOW_LAYERS\"" shallow_pairs "\"$SHALLOW_PAIRS\"" scan_seed "$SCAN_SEED" \
    inputs "\"$(cat "$TEACHER/config.json" "$TEXT" | cksum)\"")
settings="{${settings%, }}"
if [[ -f $WORK/settings.json && $(<"$WORK/settings.json") != "$settings" ]]; then
    echo "study: error: $WORK holds runs of other settings ($WORK/settings.json): give another WORK or remove it" >&2
    exit 1
fi
echo "$settings" >"$WORK/settings.json"

# once OUTPUT COMMAND...: COMMAND makes OUTPUT as a whole or not at all; it does not run if OUTPUT exists.
once() {
    local output=$1
    shift
    [[ -e $output ]] || "$@"
}
eod=()
[[ $APPEND_EOD == 0 ]] || eod=(--append-eod)
once "$WORK/text/test.jsonl" python examples/study/split.py --text "$TEXT" --output-dir "$WORK/text"
once "$WORK/teacher" python tools/hf_to_mcore.py --hf-model "$TEACHER" --save "$WORK/teacher"
mkdir -p "$WORK/data"
once "$WORK/data/train.idx" python tools/prepare_data.py --input "$WORK/text/train.jsonl" \
    --output-prefix "$WORK/data/train" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TEACHER" "${eod[@]}"
once "$WORK/shallow-hf" python tools/init_student.py --hf-model "$TEACHER" --layers "$SHALLOW_LAYERS" \
    --no-score --hf-out "$WORK/shallow-hf"
once "$WORK/shallow" python tools/hf_to_mcore.py --hf-model "$WORK/shallow-hf" --save "$WORK/shallow"

train_all() { # LABEL; reads lines STUDENT METHOD RATE SEED
    local runs
    runs=$(cat)
    xargs -P "$JOBS" -L 1 bash examples/study/one_run.sh <<<"$runs" |
        python -m tqdm --desc "$1" --unit run --total "$(wc -l <<<"$runs")"
}
score() {
    python examples/study/score.py --work "$WORK" --teacher "$TEACHER"
}

for student in $STUDENTS; do
    rates=${student^^}_RATES
    for rate in ${!rates}; do
        # shellcheck disable=SC2086  # words on purpose
        printf "$student %s $rate $SCAN_SEED\n" $METHODS
    done
done | train_all "learning rates"
score

for seed in $SEEDS; do
    for student in $STUDENTS; do
        for method in $METHODS; do
            rate=$(python examples/study/table.py --work "$WORK" --rate "$student" "$method")
            echo "$student $method $rate $seed"
        done
    done
done | train_all "seeds"
score
publish=()
[[ $PUBLISH == 0 ]] || publish=(--publish)
python examples/study/table.py --work "$WORK" "${publish[@]}"
