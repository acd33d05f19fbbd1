"""Raw files to prepared sets, and prepared sets to the batches of a training.

Preparing, in reading order:
- files to records: `streams`, `readers`, `documents` (which format a file has), `records`;
- published layouts: `conversations`, `messages`, `instructions`; `refusals` (why a record is not used);
- what of a conversation is learned: `chat_template`, `answers`, `chat`, `vanished`;
- to ids and masks: `tokenizer`, `megatron_tokenizer`, `sample_tokens`, `encode`; `workers` (the processes in which
  these run; all so far but `megatron_tokenizer` without torch and Megatron);
- to disk, and for people: `parts`, `prepared`, `tally`, `summary`, `show`; `prepare` is all of it.

Training: `checks` and `pairing` (what is refused before it starts), `sources` (which sets a run reads), `datasets` and
`packing` (Megatron datasets), `batch` (one micro-batch on the device), `provider` (what `pretrain` calls).
"""

import megatron_fdd.host.quiet  # noqa: F401  # before Megatron is imported
