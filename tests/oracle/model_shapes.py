"""Sizes of published models."""

from __future__ import annotations

from megatron_fdd.plan.model_shape import ModelShape

GPT2 = ModelShape(768, 3072, 12, 12, 64, 50257, gated=False, seq_length=0)
GPT2_XL = ModelShape(1600, 6400, 25, 25, 64, 50257, gated=False, seq_length=0)
SMOLLM2 = ModelShape(576, 1536, 9, 3, 64, 49152, gated=True, seq_length=0)
QWEN3_2B = ModelShape(2048, 6144, 16, 8, 128, 151936, gated=True, seq_length=0)
QWEN3_32B = ModelShape(5120, 25600, 64, 8, 128, 151936, gated=True, seq_length=0)
TINY_LLAMA = ModelShape(2048, 5632, 32, 4, 64, 32000, gated=True, seq_length=0)
LLAMA2_13B = ModelShape(5120, 13824, 40, 40, 128, 32000, gated=True, seq_length=0)
LLAMA3_8B = ModelShape(4096, 14336, 32, 8, 128, 128256, gated=True, seq_length=0)
LLAMA3_70B = ModelShape(8192, 28672, 64, 8, 128, 128256, gated=True, seq_length=0)
