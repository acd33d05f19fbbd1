"""Families with their own layers: taps, the lens and every gradient agree with transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_fdd.convert.families import family_of
from megatron_fdd.convert.hf_folder import HfFolder
from megatron_fdd.data.batch import Batch
from megatron_fdd.host.topology import Topology
from megatron_fdd.step.lens import read_lens
from megatron_fdd.step.taps import forward_with_taps, stop_before_head
from tests.convert import mcore, toys
from tests.harness.ranks import Layout, distributed, run_on_ranks
from tests.oracle.models import full_gradients

pytestmark = pytest.mark.tier("default")
VARIANTS = (
    *("olmo2", "gemma3_text", "deepseek_v3_yarn", "deepseek_v3_dense"),
    *("granite", "glm4", "exaone4", "olmo3", "hunyuan_v1_dense", "cohere2", "ministral3", "gemma2"),
)
VOCABULARY = toys.SHAPE["vocab_size"]
# A fraction of the largest gradient of a parameter; a gradient is a sum over all tokens.
GRADIENT_TOLERANCE = 1e-5


def _reference(source: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    model.get_input_embeddings().padding_idx = None  # the padding row would get no gradient
    return model


def _scale(model: torch.nn.Module) -> float:
    """Return the factor of logits, of Granite and of Cohere."""
    return getattr(model.config, "logit_scale", 1 / getattr(model.config, "logits_scaling", 1.0))


def _batch(tokens_BS: torch.Tensor, packed: PackedSeqParams | None = None) -> Batch:
    length = tokens_BS.shape[1]
    places_BS = torch.arange(length)[None].expand_as(tokens_BS)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    every_BS = torch.ones_like(tokens_BS)
    return Batch(tokens_BS, tokens_BS, places_BS, every_BS, every_BS, None if packed else mask, packed)


@pytest.mark.parametrize("variant", VARIANTS)
@distributed(tp=1)
def test_taps_and_lens(tmp_path: Path, variant: str) -> None:
    """The lens of an inner layer is the model's own final norm and head, including 1 + weight and tied embeddings."""
    mcore.make_checkpoint(tmp_path, variant)
    model, _ = mcore.from_own_args(tmp_path / "mcore")
    reference = _reference(tmp_path / "source")
    with torch.no_grad():
        hidden_SBH, taps = forward_with_taps(model.eval(), _batch(toys.TOKENS), [0, 1], stop_before_head)
        *inner, last_BSH = reference(toys.TOKENS, output_hidden_states=True).hidden_states
        scale = _scale(reference)
        assert (hidden_SBH.transpose(0, 1) - last_BSH * scale).abs().max() < toys.LOGIT_TOLERANCE
        lens = read_lens(model, with_norm=True, detached=True)
        for tap_SBH, expected_BSH in zip(taps, inner[1:], strict=True):
            assert expected_BSH.std() > 0.3
            assert (tap_SBH.transpose(0, 1) - expected_BSH).abs().max() < toys.LOGIT_TOLERANCE
            logits = (lens.features(tap_SBH) @ lens.head_WH.T).unflatten(0, tap_SBH.shape[:2]).transpose(0, 1)
            wanted = reference.lm_head(reference.model.norm(expected_BSH)) * scale
            assert (logits[..., :VOCABULARY] - wanted).abs().max() < toys.LOGIT_TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
@distributed(tp=1)
def test_packed_documents(tmp_path: Path, variant: str) -> None:
    """Two documents in one row give the same result as each document alone."""
    mcore.make_checkpoint(tmp_path, variant)
    model, _ = mcore.from_own_args(tmp_path / "mcore")
    documents = toys.TOKENS[:, :20]
    places = torch.tensor([0, 20, 40], dtype=torch.int32)
    packed = PackedSeqParams("thd", places, places, max_seqlen_q=20, max_seqlen_kv=20)
    with torch.no_grad():
        batch = _batch(documents.reshape(1, -1), packed)
        hidden_SBH, _ = forward_with_taps(model.eval(), batch, [], stop_before_head)
        reference = _reference(tmp_path / "source")
        scale = _scale(reference)
        wanted = reference.model(documents).last_hidden_state * scale
    assert (hidden_SBH.view_as(wanted) - wanted).abs().max() < toys.LOGIT_TOLERANCE


def _gradients(folder: Path, sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """Return, on one rank, the gradients of a sum of all logits times fixed random numbers.

    Their keys are Megatron's names for whole parameters.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads

    model, _ = mcore.from_own_args(folder / "mcore", sequence_parallel=sequence_parallel)
    ddp = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
    )
    batch = _batch(toys.TOKENS)
    logits = ddp(batch.tokens_BS, batch.position_ids_BS, batch.attention_mask, runtime_gather_output=True)
    (logits[..., :VOCABULARY] * _factors()).sum().backward()
    finalize_model_grads([ddp], None)
    topology = Topology.from_megatron(sequence_parallel=sequence_parallel)
    names = dict.fromkeys(dict(model.named_parameters()), torch.empty(0))
    return full_gradients([ddp], topology, VOCABULARY, names)


def _factors() -> torch.Tensor:
    return torch.randn((*toys.TOKENS.shape, VOCABULARY), generator=torch.Generator().manual_seed(4))


def _expected_gradients(source: Path) -> dict[str, torch.Tensor]:
    """Return transformers' gradients under Megatron's names. It saves them as weights, under the names of files."""
    model = _reference(source)
    (model(toys.TOKENS).logits * _factors()).sum().backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    folder = source.with_name("gradients")
    model.save_pretrained(folder)
    family = family_of(toys.read_json(source / "config.json"))
    stored = HfFolder(folder).apart(family.stacked)
    rows = [row for row in family.rows(toys.read_json(source / "config.json")) if row.dtype is None]
    return {row.mcore: row.transform.join(list(map(stored.read, row.sources))).double() for row in rows}


@pytest.fixture(scope="module", params=VARIANTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    run_on_ranks(mcore.make_checkpoint, Layout(tp=1), {"folder": folder, "variant": request.param})
    return folder


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_gradients(saved: Path, tp: int, sequence_parallel: bool) -> None:
    config = toys.read_json(saved / "source" / "config.json")
    has_experts = config.get("first_k_dense_replace", 3) < config["num_hidden_layers"]
    if has_experts and tp > 1 and not sequence_parallel:
        pytest.skip(
            "Megatron trains experts on several tensor-parallel ranks with sequence parallelism alone"
        )
    arguments = {"folder": saved, "sequence_parallel": sequence_parallel}
    found, *others = run_on_ranks(_gradients, Layout(tp=tp), arguments)
    _check_gradients(found, saved)


def _check_gradients(found: dict[str, torch.Tensor], folder: Path) -> None:
    expected = _expected_gradients(folder / "source")
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert wanted.any(), name
        assert (found[name] - wanted).abs().max() < GRADIENT_TOLERANCE * wanted.abs().max(), name


# One variant for each thing that Megatron's own layers do differently.
STOCK = ("llama_yarn", "smollm3", "phi3", "ernie4_5", "qwen2_moe", "glm4_moe", "gpt_oss")


@pytest.mark.tier("all")
@pytest.mark.parametrize("variant", STOCK)
def test_gradients_of_stock_layers(variant: str, tmp_path: Path) -> None:
    made = {"folder": tmp_path, "variant": variant, "torch_dtype": "float32"}
    run_on_ranks(mcore.make_checkpoint, Layout(tp=1), made)
    arguments = {"folder": tmp_path, "sequence_parallel": False}
    (found,) = run_on_ranks(_gradients, Layout(tp=1), arguments)
    _check_gradients(found, tmp_path)
