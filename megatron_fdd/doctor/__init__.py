"""`fdd doctor`: is this machine, and the Megatron on it, fit for a run?

`run(gpu=False)` prints one line for each thing it looks at. It starts no process and needs no GPU.
"""

from megatron_fdd.doctor.report import run

__all__ = ["run"]
