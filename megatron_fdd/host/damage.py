"""The errors that reading or writing a checkpoint raises, and their cause in one line."""

from __future__ import annotations

import pickle

from torch.distributed.checkpoint import CheckpointException

from megatron_fdd.host.unpickling import forbidden_class, why_forbidden

# What reading a damaged checkpoint raises: anything from pickle, or torch's own class, which is not an Exception.
DAMAGE = (Exception, CheckpointException)
# Longer messages are cut: Megatron lists every tensor of a model whose names it does not find.
_LONGEST_CAUSE = 300


def cause_of(error: BaseException) -> str:
    """Return in one line what went wrong on the first rank that failed, without the tracebacks that torch adds.

    Raises:
        KeyboardInterrupt: nothing went wrong, that rank was interrupted.
    """
    if isinstance(error, CheckpointException):
        if not error.failures:  # Megatron's writer reports the failure on rank 0 only
            return "rank 0 knows why"
        error = next(iter(error.failures.values()))[0]
    if isinstance(error, KeyboardInterrupt):  # torch collects it like an error
        raise error
    if isinstance(error, pickle.UnpicklingError):  # torch's message is about safety
        name = forbidden_class(error)
        return "its bytes hold no saved tensors" if name is None else f"it {why_forbidden(name)}"
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    line = text.splitlines()[0]
    return line if len(line) <= _LONGEST_CAUSE else line[:_LONGEST_CAUSE] + " ..."
