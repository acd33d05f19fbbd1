"""Imported by the fork server before anything else: the state in which every rank is born."""

from megatron_fdd.host import rehearsal

rehearsal.start()
