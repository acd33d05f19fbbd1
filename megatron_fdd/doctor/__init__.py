"""`fdd doctor`: whether this machine, and the Megatron on it, are fit for a run.

`run(gpu=False)` prints one line for each thing it checks, starts no process and needs no GPU; `run(gpu=True)` also
uses the GPUs, which has never been tried on one.
"""

from megatron_fdd.doctor.report import run

__all__ = ["run"]
