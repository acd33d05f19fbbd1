"""A training script of one's own: its data here, in the same way its model and its loop."""

from megatron_fdd.host.start import start

if __name__ == "__main__":
    start()  # before Megatron is imported

import torch
from megatron.training import get_args, get_tokenizer, pretrain
from torch.utils.data import Dataset

from megatron_fdd.distill import Parts, run_as_script
from megatron_fdd.host.model import build_config


class Counting(Dataset):
    """Sequences of successive numbers stand for your data."""

    def __init__(self, num_samples):
        self.num_samples, self.length = num_samples, get_args().seq_length

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        ids = (index + torch.arange(self.length + 1)) % get_tokenizer().vocab_size
        masks = {name: torch.ones(self.length) for name in ("loss_mask", "token_mask")}
        return {"tokens": ids[:-1], "labels": ids[1:], "position_ids": torch.arange(self.length), **masks}


def datasets(num_samples, vp_stage=None):
    return [Counting(number) if number else None for number in num_samples]


if __name__ == "__main__":
    # `student` may be any function from arguments to Megatron's GPTModelConfig, `pretrain` that of your fork.
    run_as_script(Parts(pretrain=pretrain, datasets=datasets, student=build_config))
