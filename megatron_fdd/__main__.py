"""`python -m megatron_fdd` is `fdd`, also under torchrun."""

from megatron_fdd.cli import run

run()
