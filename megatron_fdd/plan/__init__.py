"""The plan of a run, and all checks before it starts."""
