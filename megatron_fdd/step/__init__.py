"""One training step: taps, lenses and losses around Megatron's schedule."""
