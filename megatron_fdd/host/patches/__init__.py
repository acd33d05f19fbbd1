"""Names of Megatron that are replaced at run time: the table of them, and what takes their place."""
