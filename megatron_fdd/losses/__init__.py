"""The loss: its terms, the layers that they look at, and how both models are read. No Megatron."""
