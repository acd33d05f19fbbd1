"""Rehearsals: Megatron on CPUs, to try a recipe, test a layout or convert a checkpoint without a GPU.

A rehearsal takes the same code path as a run on GPUs; only devices, fused kernels and the communication backend
have stand-ins. Call `start()` before Megatron does any work, and `add_flags()` before it reads its flags.
"""

from megatron_fdd.host.rehearsal.flags import add_flags
from megatron_fdd.host.rehearsal.switch import is_wanted, start

__all__ = ["add_flags", "is_wanted", "start"]
