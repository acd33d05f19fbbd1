#!/usr/bin/env bash
# One training of the study. run.sh sets every capital name used here, and starts this script for each table cell.
#
#   one_run.sh STUDENT METHOD LEARNING_RATE SEED
#
# STUDENT is thin (from scratch, as deep as the teacher and half as wide) or shallow (some of the teacher's layers).
# METHOD is one of the cases below; two runs of a student differ only in these flags. The seed determines the order of
# the text and, for the thin student, its weights, so that runs of one seed see the same text in the same order.
set -euo pipefail
student=$1 method=$2 rate=$3 seed=$4
name=$student-$method-$rate-$seed
run=$WORK/runs/$name

if [[ -f $run/latest_checkpointed_iteration.txt ]]; then
    echo "$name: done before"
    exit
fi
rm -rf "$run"
mkdir -p "$run"

form= # of the store that stands for the live teacher, for methods with one
# Weights: final logits (kd), cross-entropy (ce), trajectory (alpha), delta (beta). The defaults are 1, 0, 1, 1.
case $method in
    ce) method_flags=(--fdd-ce-weight 1 --fdd-kd-weight 0 --fdd-alpha 0 --fdd-beta 0) ;;
    kd) method_flags=(--fdd-alpha 0 --fdd-beta 0) ;;
    kd-ce) method_flags=(--fdd-ce-weight 1 --fdd-alpha 0 --fdd-beta 0) ;;
    kd-trajectory) method_flags=(--fdd-beta 0) ;;
    kd-delta) method_flags=(--fdd-alpha 0) ;;
    fdd) method_flags=() ;;
    fdd-centred) method_flags=(--fdd-delta centred) ;;
    fdd-no-norm) method_flags=(--fdd-lens-norm none) ;;
    fdd-live-head) method_flags=(--fdd-lens-head live) ;;
    fdd-fp8-taps) method_flags=(--fdd-tap-dtype fp8) ;;
    fdd-fading) method_flags=(--fdd-decay-iters "$TRAIN_ITERS") ;;
    fdd-store-float32 | fdd-store-bf16 | fdd-store-fp8 | fdd-store-int8) method_flags=() form=${method##*-} ;;
    *) echo "study: METHODS: $method is none of those in examples/study/one_run.sh" >&2 && exit 255 ;;
esac

case $student in
    thin)
        student_flags=(
            --num-layers "$THIN_LAYERS" --hidden-size "$THIN_WIDTH" --ffn-hidden-size $((THIN_WIDTH * 11 / 4))
            --num-attention-heads "$THIN_HEADS" --max-position-embeddings 512 --position-embedding-type rope
            --normalization RMSNorm --swiglu --disable-bias-linear --init-method-std "$THIN_INIT_STD"
        )
        pairs=$THIN_PAIRS
        ;;
    shallow) student_flags=(--pretrained-checkpoint "$WORK/shallow" --use-checkpoint-args) pairs=$SHALLOW_PAIRS ;;
    *) echo "study: STUDENTS: $student is neither thin nor shallow" >&2 && exit 255 ;;
esac

# torchrun --nproc-per-node 1 would set these, but needs a process beside every run; port 0 means any free port.
export MASTER_ADDR=localhost MASTER_PORT=0 OMP_NUM_THREADS=1
data=(
    --fdd-layer-pairs "$pairs" --train-data-path "$WORK/data/train" --seed "$seed" --seq-length "$SEQ_LENGTH"
    --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TEACHER" --global-batch-size "$BATCH"
    --train-iters "$TRAIN_ITERS" --eval-interval "$TRAIN_ITERS" --eval-iters 0
)
teacher=(--teacher-load "$WORK/teacher")
started=$SECONDS
: >"$run/log.txt"

# step COMMAND...: run it into the log; a failure ends the study.
step() {
    printf '%q ' "$@" >>"$run/log.txt"
    "$@" >>"$run/log.txt" 2>&1 && return
    grep -h 'megatron_fdd: error' "$run/log.txt" >&2 || tail -n 20 "$run/log.txt" >&2
    echo "study: $name failed: $run/log.txt" >&2
    exit 255 # with this status xargs starts no other run
}

if [[ -n $form ]]; then
    teacher=(--fdd-teacher-store "$run/store")
    precision=(--form "$form")
    [[ $form != bf16 ]] || precision=(--bf16) # the teacher computes in bf16 too
    step python -m megatron_fdd.teach --engine megatron --teacher "$WORK/teacher" --store "$run/store" \
        "${precision[@]}" "${data[@]}"
fi
step python -m megatron_fdd.distill "${student_flags[@]}" "${teacher[@]}" "${method_flags[@]}" "${data[@]}" \
    --micro-batch-size "$BATCH" \
    --lr "$rate" --min-lr 0 --lr-decay-style cosine --lr-warmup-iters "$WARMUP_ITERS" \
    --weight-decay 0 --adam-beta2 0.95 --clip-grad 1.0 --hidden-dropout 0 --attention-dropout 0 \
    --save "$run" --save-interval "$TRAIN_ITERS" --no-save-optim --fdd-metrics-file "$run/metrics.jsonl"
rm -rf "$run/store"
echo "$name: $((SECONDS - started)) s"
