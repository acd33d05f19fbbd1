"""Data: plain text and instructions, from raw files to the batches of a training step.

Preparing, in reading order: `documents` (files to documents), `instructions` (published layouts, templates),
`tokenizer`, `encode` and `chat` (documents to token ids and loss masks), `workers` (the processes in which these run;
all so far without Megatron), `megatron_tokenizer`, `prepared` (the format on disk), `prepare` (all of it, progress).
Training: `sources` (which sets a run reads), `checks` (what is refused before it starts), `datasets`
(Megatron datasets), `batch` (one micro-batch on the device), `provider` (what `pretrain` calls; the door to
all these).

"""

import megatron_fdd.quiet  # noqa: F401  # before Megatron is imported
