"""Values of the wrong kind in config.json, its index, a tokenizer's files and a checkpoint's arguments."""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_fdd.host.model_fields import ARCHITECTURE
from tests.convert import toy_gpt2, toys

WHOLE, NUMBER = "a whole number from ", "a number "
NO_COUNT: tuple[Any, ...] = ("12", 4.0, [4], True, 0, -48, 10**8, None, math.nan, {})
NO_SIZE: tuple[Any, ...] = ("1e-5", -1, 0, math.nan, math.inf, None, [1.0], True)

# A family's toy, a field, the values that it must refuse, and what the message says is allowed.
FIELDS: tuple[tuple[str, str, tuple[Any, ...], str], ...] = (
    ("plain", "num_hidden_layers", NO_COUNT, WHOLE + "1 to 10,000"),
    ("gpt2", "n_layer", NO_COUNT, WHOLE + "1 to 10,000"),
    ("plain", "hidden_size", (*NO_COUNT, 10**7), WHOLE + "1 to 1,000,000"),
    ("plain", "intermediate_size", NO_COUNT, WHOLE),
    ("plain", "num_attention_heads", NO_COUNT, WHOLE),
    ("gpt2", "n_head", NO_COUNT, WHOLE),
    ("plain", "num_key_value_heads", ("6", 6.0, 0, -6, [6], True), WHOLE),
    ("plain", "head_dim", ("10", 0, -10, 10.0), WHOLE),
    ("plain", "vocab_size", (*NO_COUNT[:-4], 10**9), WHOLE),
    ("plain", "max_position_embeddings", ("128", 0, -5, 128.0, None, 10**10), WHOLE),
    ("plain", "rms_norm_eps", NO_SIZE, NUMBER + "above 0"),
    ("gpt2", "layer_norm_epsilon", NO_SIZE, NUMBER + "above 0"),
    ("plain", "rope_theta", (*NO_SIZE, 10**16, 10**400), NUMBER + "from 1 to"),
    ("gemma3_text", "rope_local_base_freq", NO_SIZE, NUMBER),
    ("gemma3_text", "query_pre_attn_scalar", NO_SIZE, NUMBER),
    ("gemma2", "attn_logit_softcapping", ("50", 0, -50.0, [50.0], True), NUMBER + "above 0"),
    ("gemma2", "final_logit_softcapping", ("30", 0, -30.0, [30.0], True), NUMBER + "above 0"),
    ("gemma3_text", "sliding_window_pattern", (0, -1, "3", 2.5), WHOLE),
    ("plain", "rope_scaling", ("llama3", [1], 8, True), "an object"),
    ("gemma3_text", "rope_parameters", ("default", 5), "an object"),
    ("plain", "tie_word_embeddings", ("false", 0, None, []), "true or false"),
    ("gpt2", "tie_word_embeddings", ("true", 1), "true or false"),
    ("plain", "attention_bias", ("false", 1), "true or false"),
    ("qwen3_moe", "norm_topk_prob", ("false", 1), "true or false"),
    ("plain", "attention_dropout", ("0.1", -0.1, 1.5, math.nan, None), NUMBER + "from 0 to 1"),
    ("gpt2", "resid_pdrop", ("0.1", 2), NUMBER),
    ("plain", "initializer_range", ("0.02", -1, math.inf), NUMBER),
    ("mistral_window", "sliding_window", (-1, 16.5, "7", [7]), WHOLE),
    ("mistral_window", "sliding_window", (0,), "at least 1, or null"),
    ("qwen2_window", "max_window_layers", (-1, "2", 1.5), WHOLE),
    ("qwen2_window", "use_sliding_window", ("false", 1), "true or false"),
    ("qwen3_types", "layer_types", ("full_attention", [1, 2, 3], [["full_attention"]] * 3), "a list, each a text"),
    ("mixtral", "num_local_experts", ("4", 4.0, 0, -4, [4], 10**6), WHOLE),
    ("mixtral", "num_experts_per_tok", ("2", 0, -1, None, [2]), WHOLE),
    ("qwen3_moe", "moe_intermediate_size", ("24", 0, None), WHOLE),
    ("qwen3_moe", "decoder_sparse_step", (0, -1, "1", 1.0), WHOLE),
    ("qwen3_moe", "mlp_only_layers", (1, "1", ["1"], [-1], {}), "a list, each a whole number"),
    ("gpt2", "activation_function", (["gelu"], 5, {}), "a text"),
    ("gpt2", "n_inner", (0, "64", 1.5), WHOLE),
    ("plain", "torch_dtype", (["float32"], 32, "float99", "torch.float32"), "one of float32, bfloat16,"),
    ("plain", "eos_token_id", ("2", -2, 1.5, [0, "2"], {}, True), WHOLE + "-1 to"),
    ("gpt2", "bos_token_id", ("x", 10**9), WHOLE + "-1 to"),
)  # fmt: skip
# Fields that fit by themselves, and not together; what the message says.
TOGETHER: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("mixtral", {"num_experts_per_tok": 10**5}, r'"num_experts_per_tok": 100000, which must be at most .* 4$'),
    ("mixtral", {"num_local_experts": 10**5, "num_hidden_layers": 11}, "1,000,000 in all 11 layers"),
    ("plain", {"num_attention_heads": 7, "head_dim": None}, "must divide hidden_size"),
    ("plain", {"num_attention_heads": 10**4, "head_dim": None}, "must divide hidden_size"),
    ("plain", {"rope_scaling": {**toys.LLAMA3_SCALING, "factor": "8"}}, '"factor": .8., .*number from 1'),
    ("plain", {"rope_scaling": {**toys.LLAMA3_SCALING, "factor": 0}}, '"factor": 0, .*number from 1'),
    ("plain", {"rope_scaling": {**toys.LLAMA3_SCALING, "factor": math.inf}}, '"factor": inf'),
    ("plain", {"rope_scaling": {"rope_type": ["llama3"]}}, '"rope_type": ..llama3.., which must be a text'),
    ("plain", {"rope_scaling": {"rope_theta": None}}, '"rope_theta": None'),
    ("gemma3_text", {"rope_parameters": {"full_attention": 5}}, '"full_attention" must be an object'),
    ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_theta": "x"}}}, '"rope_theta": .x.'),
    ("qwen2_window", {"max_window_layers": None}, '"max_window_layers": None'),
    ("plain", {"model_type": ["llama"]}, r'"model_type": \[.llama.\]\. The model types that can'),
    ("plain", {"model_type": 5}, '"model_type": 5. The model types that can'),
    ("plain", {"hidden_act": ["silu"]}, '"hidden_act": .* a text'),
)  # fmt: skip


def config_of(variant: str) -> dict[str, Any]:
    """Return a config.json in which nothing is wrong."""
    return dict(toy_gpt2.SHAPE) if variant == "gpt2" else toys.llama_config(variant)


# Arguments of a checkpoint that are of the wrong kind, and what the message says is allowed.
ARGUMENTS: tuple[tuple[str, Any, str], ...] = (
    *(("num_layers", value, "a whole number from 1 to 10,000") for value in ("4", 0, 10**6, 4.0, None, True)),
    *(("num_attention_heads", value, "a whole number") for value in (0, -1, "8", [8], 10**5000)),
    *(("hidden_size", value, "a whole number") for value in (0, "48", None, 10**9)),
    ("ffn_hidden_size", "64", "a whole number"),
    ("kv_channels", 0, "a whole number"),
    ("num_query_groups", 0, "a whole number"),
    ("group_query_attention", "no", "true or false"),
    ("vocab_size", -5, "a whole number"),
    ("padded_vocab_size", "128", "a whole number"),
    ("make_vocab_size_divisible_by", 0, "a whole number"),
    ("max_position_embeddings", "64", "a whole number"),
    *(("rotary_base", value, "a number from 1") for value in ("10000", 0, math.nan, -1)),
    ("rotary_percent", 0, "a number above 0"),
    ("rope_scaling_factor", "8", "a number"),
    *(("layernorm_epsilon", value, "a number above 0") for value in (0, -1, math.nan, "1e-5")),
    ("swiglu", "yes", "true or false"),
    ("untie_embeddings_and_output_weights", 1, "true or false"),
    *(("normalization", value, "one of LayerNorm, RMSNorm") for value in (["RMSNorm"], "rms", "")),
    *(("position_embedding_type", value, "one of learned_absolute, rope") for value in ("x", None, 5)),
    ("softmax_type", "hard", "one of vanilla"),
    ("rope_type", "x", "one of rope, yarn, or null"),
    ("moe_router_score_function", "x", "one of softmax"),
    *(("window_size", value, "two whole numbers") for value in (5, (3,), ("3", 0), (-9, 0), "30")),
    *(("window_attn_skip_freq", value, "a whole number") for value in (0, "2", [2, 2], {})),
    ("window_attn_skip_freq", [1, 0, 1], "as long as the model has layers"),
    *(("num_experts", value, "a whole number") for value in (0, "8", [8], 10**9)),
    *(("moe_layer_freq", value, "a whole number") for value in (0, "1", [[1]], None)),
    ("moe_router_topk", 0, "a whole number"),
    ("tokenizer_model", 5, "a text"),
    ("load", ["x"], "a text"),
    ("attention_dropout", "0.1", "a number"),
    ("fdd_layer_spec", ["gemma3_text"], "a text"),
    ("fdd_layer_options", [1], "an object"),
    ("fdd_layer_options", {1: 2}, "an object"),
)  # fmt: skip


ALL_ARGUMENTS = (*ARCHITECTURE, *(name for name, _, _ in ARGUMENTS), "add_bias_linear", "init_method_std")


def stored_args(**changes: Any) -> Namespace:
    """Return arguments such as a checkpoint stores."""
    values = {"num_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 1}
    return Namespace(**{**values, "num_experts": None, "moe_router_topk": 2, **changes})


def with_odd_name() -> Namespace:
    """Return arguments of which one has a number in place of a name, which a pickle can store."""
    args = stored_args()
    vars(args).update({5: 6})  # type: ignore[dict-item]
    return args


def write_index(folder: Path, weight_map: Any) -> Path:
    """Write an index of shards with this map."""
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    return path


# What an index names as the file of a tensor, and what the message says.
SHARDS: tuple[tuple[Any, str], ...] = (
    (7, "names 7 for a, which is no name of a file"),
    (None, "names None for a"),
    (["x"], "names .* for a"),
    ("", "names '' for a"),
    ("a\0b", "no name of a file"),
    ("../model.safetensors", "'../model.safetensors' for a, which lies outside of the folder"),
    ("parts/../../x.safetensors", "outside of the folder"),
    ("/etc/passwd", "'/etc/passwd' for a, which lies outside of the folder"),
)


def _text(name: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(content)


def _words(folder: Path) -> None:
    (folder / "vocab.json").write_text('{"a": 0}')


def _tokenizer_config(content: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        _words(folder)
        (folder / "tokenizer_config.json").write_text(content)

    return write


# Files of a tokenizer that are JSON of another type, and what the message says.
TOKENIZERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "model is a list": (_text("tokenizer.json", '{"model": []}'), r"tokenizer\.json has no model\.vocab"),
    "model is a text": (_text("tokenizer.json", '{"model": "BPE"}'), "has no model.vocab"),
    "vocabulary is a number": (_text("tokenizer.json", '{"model": {"vocab": 5}}'), "cannot be read as a tokenizer"),
    "a list": (_text("tokenizer.json", "[]"), "must hold a JSON object"),
    "deep": (_text("tokenizer.json", '{"a":' * 10**5), "nested too deeply"),
    "5000 digits": (_text("tokenizer.json", '{"a": ' + "1" * 5000 + "}"), "thousands of digits"),
    "ids as texts": (_text("vocab.json", '{"a": "0"}'), r"vocab\.json has the id '0' for 'a'"),
    "added tokens in a list": (_tokenizer_config('{"added_tokens_decoder": [1]}'), "added_tokens_decoder: "),
    "added token without text": (_tokenizer_config('{"added_tokens_decoder": {"5": {}}}'), "added_tokens_decoder"),
    "id of an added token": (
        _tokenizer_config('{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        "added_tokens_decoder",
    ),
}  # fmt: skip


def link_to_cache(folder: Path, cache: Path) -> None:
    """Move a folder's files to a cache and link to them, as a hub's cache does."""
    cache.mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(cache / f"blob{number}")
        os.symlink(cache / f"blob{number}", path)
