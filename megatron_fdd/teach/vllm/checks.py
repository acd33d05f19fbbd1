"""What a file of vLLM's connector must be before it is a unit of a store; each fault has its name.

S tokens of a unit, L stored blocks, T the teacher's width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fdd.data.store.coverage import Ids

# Saving moved to a request's end after 0.22.0 (vllm#43805): before it, chunked prefill and the prefix cache gave
# states of other tokens, or too few. The sources of 0.33.0 were read for this engine.
FIRST_SOUND, LAST_READ = (0, 23, 0), (0, 33, 0)
# By how much less alike blocks may be that are nearer in depth. With SmolLM2-135M they were by 0.007 at most, and by
# 0.08 at least in 153 of 154 wrong orders. So many tokens tell how alike blocks are.
_SLACK = 0.05
_ALIKE_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Expected:
    """What every file of a server must have.

    Attributes:
        source: what gave it, for messages: the flag and the address.
        dtype: in which the states are stored, and computed.
    """

    source: str
    blocks: Sequence[int]
    width: int
    dtype: torch.dtype

    def states(self, tensors: Mapping[str, Tensor], ids: Ids) -> Tensor:
        """Return the hidden states [S, L, T] of a unit.

        Raises:
            ValueError: they are of other tokens, too few, of other layers, of another precision, or no numbers.
        """
        self._check_names(tensors)
        self.check_ids(tensors["token_ids"].flatten().tolist(), ids)
        states = tensors["hidden_states"]
        self._check_shape(tuple(states.shape), len(ids))
        if states.dtype != self.dtype:
            raise self._refusal(
                f"its hidden states are in {_name(states.dtype)}, and --dtype is {_name(self.dtype)}"
            )
        self._check_values(states)
        return states

    def check_ids(self, found: Sequence[int], ids: Ids) -> None:
        """Refuse other tokens than those that were sent; a second start token has its own words."""
        wanted = ids.tolist()
        if list(found) == wanted:
            return
        if list(found[1:]) == wanted:
            what = f"the token {found[0]} was put in front of a unit, a doubled start token"
        else:
            at = next(
                (n for n, (one, other) in enumerate(zip(found, wanted, strict=False)) if one != other), None
            )
            what = f"{len(found)} tokens for {len(wanted)}" if at is None else f"another token at place {at}"
        raise self._refusal(
            f"it read other tokens than it was sent ({what}): nothing between it and this command may tokenise, cut "
            "or add"
        )

    def _check_names(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse a file of another connector."""
        names = sorted(tensors)
        packed = [name for name in names if "scale" in name] or [
            name for name in names if tensors[name].element_size() == 1
        ]
        if packed:
            raise self._refusal(
                f"its files have {packed[0]}: hidden states in 8 bits with one scale over all layers, as of "
                "hs-connectors, which are not read"
            )
        if names != ["hidden_states", "token_ids"]:
            raise self._refusal(
                f"its files have the tensors {', '.join(names) or 'none'} in the place of hidden_states and token_ids: "
                "a connector or version that is not known"
            )

    def _check_shape(self, shape: tuple[int, ...], length: int) -> None:
        """Refuse states of other tokens, layers or width."""
        wanted = (length, len(self.blocks), self.width)
        if shape == wanted:
            return
        if len(shape) != 3:
            what = "a connector or version that is not known"
        elif shape[0] != length:
            what = "states of other tokens, or too few: the prefix cache does it (vllm#44485), or another version"
        elif shape[1] != len(self.blocks):
            what = f"it was started for other layers than the blocks {', '.join(map(str, self.blocks))}"
        else:
            what = "it serves another model than --teacher"
        raise self._refusal(
            f"hidden states of the shape {list(shape)}, and [tokens, layers, width] must be {list(wanted)}: {what}"
        )

    def _check_values(self, states_SLT: Tensor) -> None:
        """Refuse states that are no numbers, all zeros, or there twice."""
        largest_SL = states_SLT.abs().amax(-1)
        if not bool(largest_SL.isfinite().all()):
            raise ValueError(
                f"{self.source}: a hidden state of block {self._first(~largest_SL.isfinite())} is not finite; look at "
                "the server's precision and quantisation, and restart it"
            )
        if bool((largest_SL == 0).any()):
            raise ValueError(
                f"{self.source}: a hidden state of block {self._first(largest_SL == 0)} is all zeros, as hybrid models "
                "had them in vLLM before vllm#46301; install a newer vLLM, or choose another engine"
            )
        for number in range(len(self.blocks) - 1):
            if torch.equal(states_SLT[:, number], states_SLT[:, number + 1]):
                raise ValueError(
                    f"{self.source}: the blocks {self.blocks[number]} and {self.blocks[number + 1]} have the same "
                    "states: a layer is missing, as the last one of DeepSeek was before vllm#48124; install a newer "
                    "vLLM, or choose another engine"
                )

    def _refusal(self, what: str) -> ValueError:
        return restart(self.source, what)

    def _first(self, wrong_SL: Tensor) -> int:
        return self.blocks[int(wrong_SL.any(0).int().argmax())]

    def check_order(self, states_SLT: Tensor) -> None:
        """Refuse blocks in another order than that of depth: each is more like its neighbours than like those beyond.

        Raises:
            ValueError: names three blocks.
        """
        if len(states_SLT) < _ALIKE_TOKENS:
            return
        # A few channels of a hidden state are huge, and the same in all tokens.
        centred_SLT = states_SLT.float() - states_SLT.float().mean(0)
        scaled_SLT = centred_SLT / centred_SLT.std(0).clamp(min=1e-6)
        unit_SLT = torch.nn.functional.normalize(scaled_SLT, dim=-1)
        alike_LL = torch.einsum("slt,smt->slm", unit_SLT, unit_SLT).median(0).values
        count = len(self.blocks)
        for low in range(count):
            for high in range(low + 2, count):
                for middle in range(low + 1, high):
                    nearer = min(float(alike_LL[low, middle]), float(alike_LL[middle, high]))
                    if nearer < float(alike_LL[low, high]) - _SLACK:
                        raise self._refusal(
                            f"what came for block {self.blocks[middle]} lies not between the blocks "
                            f"{self.blocks[low]} and {self.blocks[high]}, which are more alike: the layers are in "
                            f"another order than {', '.join(map(str, self.blocks))}, or others"
                        )


def restart(source: str, what: str) -> ValueError:
    """Make the error of a server that must be started in another way."""
    return ValueError(f"{source}: {what}; start the server again with the command that --dry-run prints")


def check_version(version: str, source: str) -> bool:
    """Refuse versions of vLLM with known faults; return whether it is newer than the sources that were read.

    Raises:
        ValueError: names the version and its fault.
    """
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", version)
    if found is None:
        raise ValueError(
            f"{source}: its version is {version!r}, which is none of vLLM; give a server of vLLM "
            f"{_dotted(FIRST_SOUND)} or later"
        )
    numbers = tuple(int(part or 0) for part in found.groups())
    if numbers < FIRST_SOUND:
        raise ValueError(
            f"{source}: vLLM {version} gives hidden states of other tokens, or too few, under chunked prefill and "
            f"with its prefix cache (vllm#43805, vllm#44485), or none at all; install {_dotted(FIRST_SOUND)} or later"
        )
    return numbers > LAST_READ


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(map(str, numbers))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
