"""The implementation of the fused losses for GPUs, in Triton."""
