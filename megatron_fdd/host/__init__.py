"""The host of a run: Megatron's checkpoints, groups and patches, the console, the disk, and rehearsals."""
