"""The rank image of `tests.harness`, with TransformerEngine's own Python over the kernels of `kernels.py`."""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import MagicMock, patch

import torch._dynamo  # noqa: F401  (looks for onnx, before there is a wrong one)

from megatron_fdd.host import rehearsal
from megatron_fdd.host.rehearsal import device
from tests.transformer_engine import PYTHON, kernels

sys.path.append(str(PYTHON))
os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it then does not look for CUDA's libraries
os.environ["NVTE_FRAMEWORK"] = "none"  # nor for its extension
sys.modules["transformer_engine_torch"] = kernels
sys.modules |= dict.fromkeys(("onnx", "onnxscript"), MagicMock())  # it imports them for exports to ONNX

import transformer_engine.common  # noqa: E402

transformer_engine.common.load_framework_extension = lambda _framework: None

from transformer_engine.pytorch import distributed as te_distributed  # noqa: E402
from transformer_engine.pytorch import quantization  # noqa: E402
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule  # noqa: E402

_prepare = TransformerEngineBaseModule.prepare_forward


def _prepare_on_cpu(*arguments: Any, **keywords: Any) -> Any:
    with patch.object(torch.Tensor, "is_cuda", True):  # the function refuses other tensors
        return _prepare(*arguments, **keywords)


TransformerEngineBaseModule.prepare_forward = _prepare_on_cpu
quantization._MXFP8_SUPPORT = (True, "")  # although the device says that it is a Hopper
_together = torch.distributed._coalescing_manager


def _together_on_cpu(group: Any = None, device: Any = None, async_ops: bool = False) -> Any:
    return _together(group, async_ops=async_ops)  # gloo coalesces collectives only without a device


torch.distributed._coalescing_manager = _together_on_cpu
te_distributed._get_cuda_rng_state = device.rng_state
te_distributed._set_cuda_rng_state = device.set_rng_state

del sys.modules["onnx"], sys.modules["onnxscript"]
rehearsal.start()

from megatron_fdd.host.rehearsal import flags  # noqa: E402
from tests.transformer_engine.attention import install_attention  # noqa: E402

install_attention()
# A rehearsal would overrule the flag that is needed here.
del flags._FORCED["--transformer-impl"]
flags._FP8, flags._FP8_PAIRS = (), {}
