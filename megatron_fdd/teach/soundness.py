"""Hidden states that no sound teacher gives: not finite, stale, or of another place than they are stored for.

Shape letters: S sequence, B rows, T the teacher's width; in names R stands for all dimensions before T.
"""

from __future__ import annotations

from torch import Tensor

# What two runs of the same row may differ by, as a part of a token's length: half of the tokens lie below it.
LARGEST_DIFFERENCE = 0.05


def check_states(tap_SBT: Tensor, is_token_SB: Tensor) -> None:
    """Refuse a block's output in which a real token's entry is not finite, or a row with tokens is all zeros.

    Padding may be anything.

    Raises:
        ValueError: says which of both.
    """
    largest_SB = tap_SBT.abs().amax(-1).where(is_token_SB, 0)  # NaN and infinity stay
    if not bool(largest_SB.isfinite().all()):
        raise ValueError("--teacher: a hidden state is not finite: its weights are damaged; convert it again")
    if not bool(((largest_SB.amax(0) > 0) | ~is_token_SB.any(0)).all()):
        raise ValueError(
            "--teacher: a block gives nothing but zeros for a text: its weights are damaged, or it did not run; "
            "convert it again"
        )


def difference(found_RT: Tensor, wanted_RT: Tensor) -> float:
    """Return by how much hidden states differ, as a part of a token's length; of all tokens the median."""
    wanted_RT = wanted_RT.float()
    apart_R = (found_RT.float() - wanted_RT).norm(dim=-1) / wanted_RT.norm(dim=-1).clamp(min=1e-30)
    return float(apart_R.median())


def check_place(found_RT: Tensor, wanted_RT: Tensor, block: int) -> None:
    """Refuse stored states that are not what the model hands on behind a block: shifted, stale, or another block's.

    Raises:
        ValueError: names the block, and by how much they differ.
    """
    apart = difference(found_RT, wanted_RT)
    if not apart <= LARGEST_DIFFERENCE:
        raise ValueError(
            f"--teacher: the states of block {block} are not what the model hands on behind it (half of the tokens "
            f"differ by more than {apart:.0%}): choose another teacher (docs/teacher-types.md)"
        )
