"""Whether a server's own log-probabilities are those of a lens over the hidden states that it gave.

S tokens, P places of them, L blocks, T the teacher's width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fdd.data.store.coverage import Ids
from megatron_fdd.data.store.lens import LARGEST_ERROR, StoredLens
from megatron_fdd.losses.lens import FinalNorm
from megatron_fdd.ops.head_extras import HeadExtras
from megatron_fdd.teach.vllm.checks import restart

# The mean may be so much of what the largest may be. With SmolLM2-135M in bfloat16 the mean was 8e-4 at most, and at
# least 4e-3 behind a doubled start token whose own state was left out; the largest was 4e-3, and at least 2.6e-2.
_MEAN = 0.1
# States of another place are named where half of the log-probabilities come so much nearer with them.
_NEARER = 0.5


@dataclass(frozen=True, slots=True)
class Told:
    """What a server says of some places of a unit.

    Attributes:
        places: at each, the log-probability of the next token was told; not the last place.
        logprobs_P: of these tokens.
    """

    ids: Ids
    places: Sequence[int]
    logprobs_P: Tensor


def told(ids: Ids, logprobs: Sequence[float], most: int) -> Told:
    """Choose places over a whole unit, its end among them.

    Args:
        logprobs: of all tokens but the first.
        most: places.
    """
    last = len(ids) - 2
    count = min(most, last + 1)
    places = [last - (number * (last + 1)) // count for number in range(count)][::-1]
    return Told(ids, places, torch.tensor([logprobs[place] for place in places]))


def agree(lens: StoredLens, states_SLT: Tensor, said: Told, blocks: Sequence[int], source: str) -> float:
    """Compare a server's log-probabilities with those of norm and head over its states of the last block.

    Returns:
        The largest difference, as a part of the largest logit.

    Raises:
        ValueError: they are others; says which states would fit, if some do.
    """
    apart_P = _apart(lens, states_SLT[said.places, -1], said)
    error, mean = float(apart_P.max()), float(apart_P.mean())
    most = LARGEST_ERROR[states_SLT.dtype]
    if error <= most and mean <= _MEAN * most:
        return error
    others = {
        what: float(_apart(lens, at_PT, said, normed=normed).median())
        for what, at_PT, normed in _others(states_SLT, said.places, blocks)
    }
    found = min(others, key=others.__getitem__)
    if not others[found] <= _NEARER * float(apart_P.median()):
        found = "nothing near them fits better: another model than --teacher, another start token, or other layers"
    raise restart(
        source,
        "the server's log-probabilities are not those of the teacher's norm and head over the states of block "
        f"{blocks[-1]} (they differ by {error:.1e} of the largest logit, on average by {mean:.1e}): {found}",
    )


def _apart(lens: StoredLens, states_PT: Tensor, said: Told, *, normed: bool = False) -> Tensor:
    """Return how far each log-probability is from the lens's, as a part of the largest logit: [P]."""
    stored = lens.norm
    norm = FinalNorm(stored.weight_T, stored.bias_T, stored.epsilon, stored.kind)
    features_PT = states_PT if normed else norm(states_PT)
    logits_PV = torch.nn.functional.linear(features_PT.to(lens.head_VT.dtype), lens.head_VT).float()
    HeadExtras(lens.extras.bias_V, lens.extras.cap).apply(logits_PV, slice(None))
    next_P = torch.tensor([int(said.ids[place + 1]) for place in said.places])
    ours_P = logits_PV.gather(1, next_P[:, None])[:, 0] - logits_PV.logsumexp(-1)
    return (ours_P - said.logprobs_P).abs() / logits_PV.abs().max().clamp(min=1e-30)


def _others(
    states_SLT: Tensor, places: Sequence[int], blocks: Sequence[int]
) -> list[tuple[str, Tensor, bool]]:
    """Return what a server may have given in the place of the right states."""
    last = len(states_SLT) - 1
    later, earlier = [min(place + 1, last) for place in places], [max(place - 1, 0) for place in places]
    found = [
        ("the last state has been through the final norm already", states_SLT[places, -1], True),
        ("the states lie one token late, as with a doubled start token", states_SLT[later, -1], False),
        ("the states lie one token early", states_SLT[earlier, -1], False),
    ]
    for number, block in enumerate(blocks[:-1]):
        what = f"what came for block {block} fits: the layers are in another order"
        found.append((what, states_SLT[places, number], False))
    return found
