"""The imports that a process of the step benchmark has done before its work comes; nothing here touches a GPU."""

import megatron_fdd.host.rehearsal as rehearsal

if rehearsal.is_wanted():
    rehearsal.start()

import megatron.training.training  # noqa: E402, F401

import megatron_fdd.distill  # noqa: E402, F401
