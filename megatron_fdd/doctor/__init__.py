"""`fdd doctor`: is this machine, and the Megatron on it, fit for a run?

`run(gpu=False)` prints one line for each thing it looks at, starts no process and needs no GPU; `run(gpu=True)` also
uses the GPUs, which has never been tried on one.
"""

from megatron_fdd.doctor.report import run

__all__ = ["run"]
