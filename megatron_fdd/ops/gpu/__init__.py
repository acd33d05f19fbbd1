"""The GPU path of the fused losses, in Triton."""
