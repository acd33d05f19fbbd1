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

command=(
    # torchrun --nproc-per-node 1 would set these, but needs a process beside every run; port 0 means any free port.
    env MASTER_ADDR=localhost MASTER_PORT=0 OMP_NUM_THREADS=1
    python -m megatron_fdd.distill "${student_flags[@]}"
    --teacher-load "$WORK/teacher" --fdd-layer-pairs "$pairs" "${method_flags[@]}"
    --train-data-path "$WORK/data/train" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$TEACHER"
    --seq-length "$SEQ_LENGTH" --micro-batch-size "$BATCH" --global-batch-size "$BATCH" --seed "$seed"
    --train-iters "$TRAIN_ITERS" --eval-interval "$TRAIN_ITERS" --eval-iters 0
    --lr "$rate" --min-lr 0 --lr-decay-style cosine --lr-warmup-iters "$WARMUP_ITERS"
    --weight-decay 0 --adam-beta2 0.95 --clip-grad 1.0 --hidden-dropout 0 --attention-dropout 0
    --save "$run" --save-interval "$TRAIN_ITERS" --no-save-optim --fdd-metrics-file "$run/metrics.jsonl"
)
started=$SECONDS
printf '%q ' "${command[@]}" >"$run/log.txt"
if ! "${command[@]}" >>"$run/log.txt" 2>&1; then
    grep -h 'megatron_fdd: error' "$run/log.txt" >&2 || tail -n 20 "$run/log.txt" >&2
    echo "study: $name failed: $run/log.txt" >&2
    exit 255 # with this status xargs starts no other run
fi
echo "$name: $((SECONDS - started)) s"
