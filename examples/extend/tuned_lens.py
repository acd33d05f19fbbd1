"""A plug-in: the tuned lens (Belrose et al. 2023), an affine map for each block in front of the teacher's final norm.

    fdd train ... -- --fdd-plugin examples.extend.tuned_lens --teacher-lens lens.safetensors ...

A file of zeros is the bare lens. `examples/extend/train_tuned_lens.py` makes one that is not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from megatron_fdd.losses.lens import LensKind, Norm, add_lens


def tuned_features(hidden_NT: Tensor, tensors: Mapping[str, Tensor], norm: Norm) -> Tensor:
    """norm(h + A h + b), in float32 whatever the dtype of A, b and h."""
    hidden_NT = hidden_NT.float()
    weight_TT, bias_T = tensors["weight"].float(), tensors["bias"].float()
    return norm(hidden_NT + F.linear(hidden_NT, weight_TT, bias_T))


TUNED = LensKind(tensors={"weight": "TT", "bias": "T"}, features=tuned_features)
add_lens("tuned", TUNED)
