"""From raw files to prepared sets, and from prepared sets to the batches of a training run.

Preparing, in reading order:

- files to records: `streams`, `readers`, `documents` (which format a file has), `records`;
- published layouts: `conversations`, `messages`, `instructions`; `refusals` (why a record is not used);
- the learned parts of a conversation: `chat_template`, `answers`, `chat`, `vanished`; `render_limits`,
  `render_process` (where templates run, and what ends them);
- texts to ids and masks: `tokenizer`, `megatron_tokenizer`, `sample_tokens`, `encode`; `workers` (the processes in
  which all of these run; only `megatron_tokenizer` imports torch and Megatron);
- writing and showing the result: `parts`, `prepared`, `index_file`, `dealing`, `tally`, `summary`, `show`; `prepare`
  runs all steps.

Training: `checks`, `token_ids` and `pairing` (what is refused before it starts), `sources` (which sets a run reads),
`datasets` and `packing` (Megatron datasets), `batch` (one micro-batch: checked on the host, then on the device),
`provider` (what `pretrain` calls).
"""

import megatron_fdd.host.quiet  # noqa: F401  # before Megatron is imported
