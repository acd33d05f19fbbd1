"""Flags with which Megatron crashes, hangs or trains nothing, and the line that each ends in.

They are added to a command line that trains.
"""

from __future__ import annotations

# The flags that are refused by a bound, a schedule or a row of `REFUSALS`, before anything of Megatron runs.
FLAGS = {
    # A process that a signal ends, or a division by zero.
    "--seq-length 0": "--seq-length 0: must be at least 1",
    "--seq-length -1": "--seq-length -1: must be at least 1",
    "--micro-batch-size 0": "--micro-batch-size 0: must be at least 1",
    "--global-batch-size 0": "--global-batch-size 0: must be at least 1",
    "--eval-micro-batch-size 0": "--eval-micro-batch-size 0: must be at least 1",
    "--tensor-model-parallel-size 0": "--tensor-model-parallel-size 0: must be at least 1",
    "--num-layers-per-virtual-pipeline-stage 0": "--num-layers-per-virtual-pipeline-stage 0: must be at least 1",
    "--make-vocab-size-divisible-by 0": "--make-vocab-size-divisible-by 0: must be at least 1",
    "--num-attention-heads 0": "--num-attention-heads 0: must be at least 1",
    "--num-query-groups -4": "--num-query-groups -4: must be at least 1",
    "--hidden-size -48": "--hidden-size -48: must be at least 1",
    "--rotary-base 0": "--rotary-base 0: must be at least 1",
    "--log-interval 0": "--log-interval 0: must be at least 1",
    "--eval-interval 0": "--eval-interval 0: must be at least 1",
    "--tensorboard-log-interval 0": "--tensorboard-log-interval 0: must be at least 1",
    "--microbatch-group-size-per-virtual-pipeline-stage 0": (
        "--microbatch-group-size-per-virtual-pipeline-stage 0: must be at least 1"
    ),
    # An assertion without a text.
    "--train-iters 0": "--train-iters 0: must be at least 1",
    "--train-iters -1": "--train-iters -1: must be at least 1",
    "--lr-decay-iters 0": "--lr-decay-iters 0: must be at least 1",
    "--lr-warmup-iters 50": "--lr-warmup-iters 50: must be below --train-iters 10",
    "--lr-warmup-iters -1": "--lr-warmup-iters -1: must be at least 0",
    "--min-lr 1": "--min-lr 1.0: must be at most --lr 0.001",
    "--decoupled-lr 0.1 --decoupled-min-lr 1": "--decoupled-min-lr 1.0: must be at most --decoupled-lr 0.1",
    "--save-interval 0": "--save-interval 0: must be at least 1",
    "--weight-decay nan": "--weight-decay nan: must be a finite number",
    "--weight-decay -1": "--weight-decay -1.0: must be at least 0",
    # Taken by Megatron without a word.
    "--lr inf": "--lr inf: must be a finite number",
    "--adam-eps nan": "--adam-eps nan: must be a finite number",
    "--adam-eps 0": "--adam-eps 0.0: must be above 0",
    "--adam-eps 1": "--adam-eps 1.0: must be below 1",
    "--weight-decay 1e4": "--weight-decay 10000.0: must be at most 1000",
    "--adam-beta1 2": "--adam-beta1 2.0: must be below 1",
    "--clip-grad nan": "--clip-grad nan: must be a finite number",
    "--clip-grad -1": "--clip-grad -1.0: must be at least 0",
    "--eval-iters -1": "--eval-iters -1: must be at least 0",
    "--exit-duration-in-mins -1": "--exit-duration-in-mins -1: must be at least 0",
    "--exit-interval -2": "--exit-interval -2: must be at least 0",
    # Ignored, or misunderstood, by Megatron without a word.
    "--train-samples 10": "--train-samples with --train-iters: Megatron counts a training in one of the two",
    "--rampup-batch-size 8 8 100": "--rampup-batch-size: this Megatron ignores it",
    "--step-batch-size-schedule 0:8": "--step-batch-size-schedule with --train-iters: Megatron counts",
    "--non-persistent-ckpt-type local": "--non-persistent-ckpt-type local, in_memory: nothing here reads",
    # Memory that fills up.
    "--num-layers 100000000": "--num-layers 100000000: must be at most 10000",
    "--num-workers 1000": "--num-workers 1000: must be at most 128",
    "--train-iters 10000000000000": "--train-iters 10000000000000: must be at most 10000000",
    "--exit-interval 9999999999": "--exit-interval 9999999999: must be at most 4294967296",
    "--seed 0": "--seed 0: must be at least 1",
    "--seed 4294967296": "--seed 4294967296: must be at most 2147483647",
    # Shares of the data.
    "--split a,b,c": "--split a,b,c: must be up to three numbers, of which one is above 0",
    "--split 0,0,0": "--split 0,0,0: must be up to three numbers",
    "--split 1e400,1,1": "--split 1e400,1,1: must be up to three numbers",
    "--split 9e1,10": "--split 9e1,10: must be up to three numbers",  # to Megatron: 9, 1, 10
    "--split 9_0,10": "--split 9_0,10: must be up to three numbers",
    "--split 1,2,3,4": "--split 1,2,3,4: must be up to three numbers",
    "--split=-1,1,1": "--split -1,1,1: must be up to three numbers",
    "--data-path": "--data-path: names no data; give a prefix",
    "--data-path nan a 1 b": "--data-path nan: a weight must be a finite number above 0",
    "--train-data-path 1 a 0 b": "--train-data-path 0: a weight must be a finite number above 0",
    # Megatron does something else, or fails much later.
    "--dataloader-type external": "--dataloader-type external: takes the datasets for loaders",
    "--ckpt-convert-format torch_dist": "--ckpt-convert-format: Megatron writes the checkpoint again and ends",
    "--ddp-average-in-collective": "--ddp-average-in-collective: gradients get their one divisor",
    # Several at once.
    "--log-interval 0 --lr nan": "--lr nan: must be a finite number; --log-interval 0: must be at least 1",
}

# The flags that the parser refuses.
UNREADABLE = {
    "--rampup-batch-size a b c": "argument --rampup-batch-size: invalid int value: 'a'",
    "--rampup-batch-size 1 2": "argument --rampup-batch-size: expected 3 arguments",
    "--train-iters 1e3": "argument --train-iters: invalid int value: '1e3'",
    "--train-iters ²": "argument --train-iters: invalid int value: '²'",
    "--lr 1,0": "argument --lr: invalid float value: '1,0'",
    "--exit-signal SIGNOTHING": "argument --exit-signal: 'SIGNOTHING': must be one of ",
    "--save=": "argument --save: its value is empty",
    "--cuda-graph-modules words": "argument --cuda-graph-modules: 'words': there is no such name",
    "--yaml-cfg F": "argument --yaml-cfg: would replace all other flags",
    "--moe-layer-freq [1]*9**9**9": "argument --moe-layer-freq: '[1]*9**9**9': more layers than any model has",
    "--no-rope-freq ([0]*99999+[1])*999": "argument --no-rope-freq: '([0]*99999+[1])*999': more layers than",
    "--window-attn-skip-freq [1]*9999999999": "argument --window-attn-skip-freq: '[1]*9999999999': more layers",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
}

# What a launcher sets.
ENVIRONMENTS = {
    "WORLD_SIZE=0": "WORLD_SIZE=0: must be a whole number of at least 1",
    "WORLD_SIZE=abc": "WORLD_SIZE=abc: must be a whole number of at least 1",
    "WORLD_SIZE=": "WORLD_SIZE=: must be a whole number of at least 1",
    f"WORLD_SIZE={'9' * 5000}": "WORLD_SIZE=999",
    "RANK=²": "RANK=²: must be a whole number of at least 0",
    "RANK=-1": "RANK=-1: must be a whole number of at least 0",
    "RANK=../1": "RANK=../1: must be a whole number of at least 0",
    "RANK=2 WORLD_SIZE=2": "RANK=2: must be below WORLD_SIZE=2",
    "LOCAL_RANK=x": "LOCAL_RANK=x: must be a whole number of at least 0",
}
