"""Fused numeric operations on vocabulary-parallel heads: plain torch and torch.distributed, no Megatron."""
