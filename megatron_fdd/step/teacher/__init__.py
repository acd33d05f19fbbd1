"""The teacher in a step: its arguments, its weights, and its taps."""
