"""Full validation: every sample once, on any number of ranks, with any batch, as often as it is repeated."""

from __future__ import annotations

import contextlib
import itertools
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.training.datasets import data_samplers
from megatron.training.training import cyclic_iter

from megatron_fdd.data import full_validation
from megatron_fdd.data.full_validation import FilledDataset, check_full_validation, installed, with_filler
from megatron_fdd.data.megatron_tokenizer import load_tokenizer
from megatron_fdd.data.provider import build_datasets
from megatron_fdd.data.tokenizer import TokenizerSettings
from tests.data.conftest import megatron_args


def samples(count: int) -> list[dict[str, torch.Tensor]]:
    ones = torch.ones(2)
    return [
        {"tokens": torch.tensor([index, index]), "loss_mask": ones, "token_mask": ones}
        for index in range(count)
    ]


def loaders(monkeypatch: pytest.MonkeyPatch, total: int, ranks: int, rows: int, step: int) -> Iterator[Any]:
    """Yield Megatron's own loader of each rank."""
    args = Namespace(
        eval_micro_batch_size=rows,
        eval_global_batch_size=step,
        micro_batch_size=7,
        global_batch_size=7,
        full_validation=True,
        dataloader_type="single",
        seq_length=2,
        hybrid_context_parallel=False,
        num_workers=0,
    )
    for module in (data_samplers, full_validation):
        monkeypatch.setattr(module, "get_args", lambda: args)
    monkeypatch.setattr(data_samplers.mpu, "get_data_parallel_world_size", lambda: ranks)
    with installed():
        for rank in range(ranks):
            monkeypatch.setattr(data_samplers.mpu, "get_data_parallel_rank", lambda rank=rank: rank)
            yield data_samplers.build_pretraining_data_loader(FilledDataset(samples(total)), 0)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
@pytest.mark.parametrize(
    ("total", "ranks", "rows", "step"),
    [(5, 1, 2, 8), (5, 2, 2, 4), (5, 2, 2, 8), (1, 2, 2, 4), (8, 2, 2, 4), (9, 3, 1, 3), (17, 2, 1, 8)],
)
def test_every_sample_counts_once_and_again(
    total: int, ranks: int, rows: int, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = [Counter[int](), Counter[int]()]
    for loader in loaders(monkeypatch, total, ranks, rows, step):
        assert len(loader) == -(-total // step)
        iterator = cyclic_iter(loader)
        for found in counted:  # two validations of as many steps as Megatron runs
            for batch in itertools.islice(iterator, len(loader) * step // (rows * ranks)):
                assert batch["tokens"].shape == (rows, 2)
                assert torch.equal(batch["loss_mask"], batch["token_mask"])
                found.update(batch["tokens"][batch["loss_mask"] > 0].tolist())
    assert counted == [dict.fromkeys(range(total), 2)] * 2  # a sample has two tokens


BOTH = ("--full-validation", "--multiple-validation-sets")


@pytest.mark.parametrize(
    ("flags", "stages", "message"),
    [
        (BOTH[:1], None, "--full-validation and --multiple-validation-sets: .*give both"),
        (BOTH[1:], None, "--full-validation and --multiple-validation-sets: .*give both"),
        (BOTH, 2, "--full-validation with virtual stages: .*use one of the two"),
        ((*BOTH, "--mock-data"), None, "--full-validation with test data: .*leave out --mock-data"),
    ],
)
def test_what_megatron_cannot_do_is_refused(flags: tuple[str, ...], stages: int | None, message: str) -> None:
    for mine, refused in ((BOTH, False), ((), False), (flags, True)):
        args = megatron_args(*mine)
        args.virtual_pipeline_model_parallel_size = stages if refused else None
        with pytest.raises(ValueError, match=message) if refused else contextlib.nullcontext():
            check_full_validation(args)


def test_a_set_without_a_sample_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fewer tokens than one sample of --seq-length 2; .*lower"):
        next(loaders(monkeypatch, 0, 1, 2, 4))


def test_only_validation_sets_are_filled() -> None:
    def provide(num_samples: list[int], vp_stage: int | None = None) -> list[Any]:
        return [
            samples(num_samples[0]),
            [samples(num_samples[1]), samples(1)],
            samples(1) if vp_stage else None,
        ]

    train, valid, test = with_filler(provide)([4, 3, 0])
    assert (len(train), [len(each) for each in valid], test) == (4, [3, 1], None)
    assert isinstance(train, list)
    with pytest.raises(ValueError, match="with test data"):
        with_filler(provide)([4, 3, 0], vp_stage=1)


@pytest.mark.filterwarnings("ignore:.*torch.distributed")
def test_filler_looks_like_a_sample(sets: Path, hf: TokenizerSettings, tmp_path: Path) -> None:
    """Also in a blend, whose samples say from which set they are."""
    paths = [str(sets / "text"), str(sets / "text")]
    args = megatron_args("--data-path", *paths, "--split", "80,20,0", "--full-validation")
    args.data_cache_path = str(tmp_path)
    _, valid, _ = build_datasets(args, [8, None, 0], load_tokenizer(hf))
    assert isinstance(valid, BlendedDataset)
    filled = FilledDataset(valid)
    batch = torch.utils.data.default_collate([filled[0], filled[len(valid)], filled[len(valid) + 99]])
    assert batch["loss_mask"].sum(1).tolist() == [24, 0, 0]
    assert batch["token_mask"].sum(1).tolist() == [24, 0, 0]
