"""Feature Dynamics Distillation inside Megatron-Core: a student follows its teacher's predictions through the depth.

The command `fdd` has every step; `python -m megatron_fdd.distill` trains. `megatron_fdd.convert` goes from Hugging
Face to Megatron and back, `megatron_fdd.data` prepares text and instructions, `megatron_fdd.evaluate` compares what
came out. Importing this package alone imports nothing else.
"""

__version__ = "0.1.0"
