"""Judging exported (Hugging Face) students: perplexity, distance to the teacher, samples, loss curves."""
