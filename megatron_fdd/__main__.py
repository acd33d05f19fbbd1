"""`python -m megatron_fdd` is `fdd`, also under torchrun."""

from megatron_fdd.cli import main

main(prog_name="fdd")
