"""The state in which every rank is born; the fork server imports this before anything else."""

from megatron_fdd.host import rehearsal

rehearsal.start()
