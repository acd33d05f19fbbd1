"""The engine `transformers`: parts found without names, states by hooks, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.tiny_teachers import WIDTH, tiny_model
from megatron_fdd.data.store.identity import TapForm
from megatron_fdd.step.teacher.tap_format import TapFormat
from megatron_fdd.teach.hf_parts import find_parts
from megatron_fdd.teach.transformers import TransformersEngine
from tests.teach.engines import (
    BLOCKS,
    LENGTHS,
    SAME_ROWS,
    SAME_SUMS,
    engine_of,
    logits_of,
    plain_states,
    units,
    unpacked,
)

# Two roundings of float64 to float32.
ROUNDING = 2.0**-23
# Each stands for a kind: of norm, constant, layer, or mixture of experts.
KINDS: dict[str, tuple[str, bool, float]] = {
    "llama": ("rms", False, 1.0),
    "gpt2": ("layer", True, 1.0),
    "cohere": ("layer", False, 0.25),
    "granite": ("rms", False, 0.125),
    "gemma": ("rms", False, 1.0),
    "olmo": ("layer", False, 1.0),
    "falcon_h1": ("rms", False, 0.2),
    "mamba": ("rms", False, 1.0),
    "deepseek_v3": ("rms", False, 1.0),
    "gpt_oss": ("rms", False, 1.0),
    "gemma2": ("rms", False, 1.0),
    "phi": ("layer", True, 1.0),
}
# Some logits have a soft cap; the head has a bias.
EXTRAS = {"gemma2": (30.0, False), "phi": (None, True)}


@pytest.mark.parametrize("model_type", KINDS)
def test_states_and_lens_are_the_models(model_type: str) -> None:
    model = tiny_model(model_type)
    parts = find_parts(model)
    kind, has_bias, constant = KINDS[model_type]
    assert (parts.norm.kind, parts.norm.bias_T is not None) == (kind, has_bias)
    assert parts.constant == pytest.approx(constant, rel=1e-6)
    engine, texts, tolerance = (
        engine_of(model, parts),
        units(),
        SAME_SUMS if "mamba" in model_type else SAME_ROWS,
    )
    lens = engine.lens(texts[:2])
    assert lens.error <= 1e-5
    assert (lens.extras.cap, lens.extras.bias_V is not None) == EXTRAS.get(model_type, (None, False))
    for ids, found in zip(texts, engine.states(texts), strict=True):
        wanted, logits = plain_states(model, ids)
        states = unpacked(found)
        assert states.shape == (len(BLOCKS), len(ids), WIDTH)
        for row, block in enumerate(BLOCKS):
            largest = float(wanted[block - 1].abs().max())
            torch.testing.assert_close(states[row], wanted[block - 1], atol=tolerance * largest, rtol=0)
        scale = float(logits.abs().max())
        torch.testing.assert_close(logits_of(lens, states[-1]), logits, atol=2e-5 * scale, rtol=0)


# Windows and chunks of these are 6 to 32 tokens long.
ISOLATED: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_oss": {"sliding_window": 6},
    "deepseek_v3": {},
    "mamba": {},
    "mamba2": {},
    "zamba2": {},
    "qwen3_next": {},
}


@pytest.mark.parametrize("model_type", ISOLATED)
def test_states_depend_on_the_unit_alone(model_type: str) -> None:
    """Mostly in float64, where the order of sums does not count, and what leaks from one unit to another does."""
    model = tiny_model(model_type, **ISOLATED[model_type])
    parts = find_parts(model)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")
    engine, texts = engine_of(model.double(), parts), units((3, 61, 12, 61))
    together = engine.states(texts)
    for ids, found in zip(texts, together, strict=True):
        [alone] = engine.states([ids])
        largest = float(unpacked(alone).abs().max())
        torch.testing.assert_close(unpacked(found), unpacked(alone), atol=ROUNDING * largest, rtol=0)
    assert not np.array_equal(together[1], together[3])


def test_rows_keep_to_one_side_of_the_length_at_which_all_positions_change() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "rope_theta": 1e4}
    rope |= {"factor": 2.0, "original_max_position_embeddings": 64}
    model, texts = tiny_model("llama", rope_parameters=rope), units((4, 80, 64, 65))
    parts = find_parts(model)
    heedless = engine_of(model, parts)
    bounded = TransformersEngine(heedless.identity, model, parts, (64,))
    apart = [unpacked(heedless.states([ids])[0]) for ids in texts]
    for found, wanted in zip(bounded.states(texts), apart, strict=True):
        torch.testing.assert_close(unpacked(found), wanted, atol=SAME_ROWS, rtol=0)
    assert float((unpacked(heedless.states(texts)[0]) - apart[0]).abs().max()) > 1e-3


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_states_are_packed(form: TapForm) -> None:
    model = tiny_model("llama")
    parts, texts = find_parts(model), units()
    plain, packed = engine_of(model, parts), engine_of(model, parts, form)
    for whole, found in zip(plain.states(texts), packed.states(texts), strict=True):
        assert torch.equal(torch.from_numpy(found), TapFormat(torch.float32, form).pack(unpacked(whole)))


def test_a_layer_too_early_is_noticed() -> None:
    model = tiny_model("llama")
    parts = find_parts(model)
    shifted = replace(parts, layers=[parts.layers[0], *parts.layers[:-1]])
    with pytest.raises(
        ValueError, match=r"logits are not those of model\.norm and lm_head .*something else lies"
    ):
        engine_of(model, shifted).lens(units())


def test_hidden_states_in_float32_before_a_head_in_bfloat16() -> None:
    """Some types add up in float32, and round what their final norm is given."""
    model = tiny_model("zaya").bfloat16()
    assert engine_of(model, find_parts(model), dtype="bfloat16").lens(units()).error < 1e-2


def test_a_row_that_a_model_cannot_take_is_one_line() -> None:
    """Not every config says under the usual name how long a row may be."""
    model = tiny_model("mpt", max_seq_len=64)
    engine = engine_of(model, find_parts(model))
    engine.states(units((64,)))
    with pytest.raises(
        ValueError, match=r"MptForCausalLM does not run on rows of 65 tokens \(RuntimeError: The "
    ):
        engine.states(units((65,)))


def test_states_that_are_not_finite_are_refused() -> None:
    model = tiny_model("llama")
    engine = engine_of(model, find_parts(model))
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = torch.inf
    texts = [ids[ids != 7] for ids in units()]
    engine.states(texts)
    with pytest.raises(ValueError, match="a hidden state is not finite"):
        engine.states([*texts, np.array([3, 7], np.int32)])


def test_padding_may_be_anything() -> None:
    model = tiny_model("llama")
    engine, texts = engine_of(model, find_parts(model)), units()
    before = engine.states(texts)

    def spoil(_module: nn.Module, _given: object, output: Tensor) -> Tensor:
        output[1, LENGTHS[1] :] = torch.nan
        return output

    model.model.layers[-1].register_forward_hook(spoil)
    assert all(np.array_equal(one, other) for one, other in zip(before, engine.states(texts), strict=True))


def _late(states: np.ndarray) -> np.ndarray:
    """Return each token's states in the place of the next one, as with a doubled start token."""
    return np.concatenate([states[:, :1], states[:, :-1]], axis=1)


WRONG: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "early": (lambda states: np.concatenate([states[:, 1:], states[:, -1:]], axis=1), BLOCKS[0]),
    "late": (_late, BLOCKS[0]),
    "zeros": (np.zeros_like, BLOCKS[0]),
    "another text": (lambda states: states[:, ::-1], BLOCKS[0]),
    "another order": (lambda states: states[[1, 0, 2]], BLOCKS[0]),
    "inner blocks alone": (lambda states: states[[0, 0, 2]], BLOCKS[1]),
    "the last block alone": (lambda states: states[[0, 1, 1]], BLOCKS[2]),
}


@pytest.mark.parametrize("form", ["float32", "fp8", "int8"])
@pytest.mark.parametrize("name", WRONG)
def test_states_of_another_place_are_refused(
    name: str, form: TapForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    engine, (damage, block) = engine_of(model, find_parts(model), form), WRONG[name]
    engine.lens(units()[:1])
    states = engine.states
    monkeypatch.setattr(
        engine, "states", lambda texts: [np.ascontiguousarray(damage(each)) for each in states(texts)]
    )
    with pytest.raises(ValueError, match=f"the states of block {block} are not what the model hands on"):
        engine.lens(units()[:1])


REFUSED = {
    "deepseek_v4": r"gives \[1, 32, 4, 64\] where .* is \[1, 32, 64\]; several residual streams",
    "bert": r"runs cls.predictions.transform.dense \(Linear\), .*, and a lens is one norm and a linear head",
    "modernbert-decoder": r"runs model.final_norm \(LayerNorm\), lm_head.dense \(Linear\), lm_head.act \(GELU",
    "openai-gpt": "between its last layer and its head runs no norm",
    "xlm": "first tokens change by .* when the row goes on: it is no causal model",
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_models_are_refused_by_name(model_type: str) -> None:
    model = tiny_model(model_type)
    with pytest.raises(ValueError, match=REFUSED[model_type]):
        engine_of(model, find_parts(model))


class Squashed(nn.Module):
    """A norm that no lens knows."""

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.tanh(hidden)


def test_a_norm_of_another_kind_is_refused() -> None:
    model = tiny_model("llama")
    model.model.norm = Squashed()
    with pytest.raises(ValueError, match=r"model\.norm \(Squashed\), is neither an RMSNorm nor a LayerNorm"):
        find_parts(model)


def test_what_no_module_does_is_noticed() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda _module, _given, logits: logits + 0.05 * logits**2)
    with pytest.raises(ValueError, match="logits are not those of"):
        find_parts(model)


def test_epsilon_is_measured() -> None:
    """Some norms have theirs in the code; others have several attributes."""
    model = tiny_model("llama", rms_norm_eps=3e-4)
    model.model.norm.other = 1e-3
    assert find_parts(model).norm.epsilon == 3e-4
