"""Producers: a teacher runs, forward only, and its features go to a store (`data/store/`)."""
