"""Tiny models of every family as GGUF, as llama.cpp's converter would write them.

Tensor names come from the gguf package's own map, not from ours.
"""

import math
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests import tiny_checkpoints

# transformers' model_type -> the package's architecture
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
}
BLOCK = 32  # of the quantised types


def write_gguf_of(
    path: Path,
    reference: Any,
    vocabulary: tuple[str, ...],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Writes a model of transformers; matrices whose rows allow it are stored as ``kind``."""
    config = reference.config
    architecture = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    head_size = getattr(config, "head_dim", None)
    head_size = head_size or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(int(head_size * rope.get("partial_rotary_factor", 1.0)))
    _add_scaling(writer, rope, head_size, config)
    window = getattr(config, "sliding_window", None)
    if window is not None and config.model_type in ("phi3", "gemma3_text"):
        writer.add_sliding_window(window)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    _add_tokenizer(writer, vocabulary)

    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in reference.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        values = tensor.numpy().astype(np.float32)
        if config.model_type == "gemma3_text" and name.endswith("norm.weight"):
            values = values + 1.0
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            values = tiny_checkpoints.interleave_rows(values, head_size)
        stored = kind if values.ndim == 2 and values.shape[1] % BLOCK == 0 else None
        stored = stored or gguf.GGMLQuantizationType.F32
        writer.add_tensor(
            names.get_name(name, try_suffixes=(".weight", ".bias")),
            gguf.quants.quantize(values, stored),
            raw_dtype=stored,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_scaling(
    writer: gguf.GGUFWriter, rope: dict[str, Any], head_size: int, config: Any
) -> None:
    kind = rope["rope_type"]
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif kind == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_divisors(rope, head_size))
    elif kind == "longrope":
        original = config.original_max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        factor = config.max_position_embeddings / original
        writer.add_rope_scaling_attn_factors(math.sqrt(1 + math.log(factor) / math.log(original)))
        for name in ("long", "short"):
            values = np.array(rope[f"{name}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{name}.weight", values)


def _llama3_divisors(rope: dict[str, Any], head_size: int) -> np.ndarray:
    """One frequency at a time, as the converter's ``generate_extra_tensors`` does."""
    divisors = []
    old = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    for index in range(0, head_size, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (index / head_size)
        if wavelength < old / high:
            divisors.append(1.0)
        elif wavelength > old / low:
            divisors.append(rope["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, np.float32)


def _add_tokenizer(writer: gguf.GGUFWriter, vocabulary: tuple[str, ...]) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    first, second, *_ = vocabulary
    writer.add_token_list([*vocabulary[:-1], first + second])  # the writer drops an empty list
    writer.add_token_merges([f"{first} {second}"])
    writer.add_token_types([1] * len(vocabulary))
    writer.add_eos_token_id(2)
