"""A small valid model of every family in both formats, as dictionaries that a test can spoil."""

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from models import checkpoint, huggingface_config
from models.families import FAMILIES, GGUF_FAMILIES
from tests import tiny_checkpoints
from tests.tiny_checkpoints import MERGES, SPECIAL_TOKENS, VOCABULARY

_SIZES = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-4,
    "eos_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [2.0, 3.0]}
_GEMMA3_TEXT = {
    **_SIZES,
    "num_hidden_layers": 7,  # the pattern repeats after six
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "final_logit_softcapping": 30.0,
    "sliding_window": 16,
    "sliding_window_pattern": 6,
    "rope_local_base_freq": 100.0,
}
# model_type -> config.json, with every key that its reader knows
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": _SIZES | {"model_type": "llama", "head_dim": 8, "rope_scaling": _LLAMA3},
    "mistral": _SIZES | {"model_type": "mistral", "head_dim": 8, "sliding_window": 16},
    "qwen2": _SIZES
    | {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        "rope_scaling": _YARN,
    },
    "qwen3": _SIZES | {"model_type": "qwen3", "head_dim": 8, "use_sliding_window": False},
    "phi3": _SIZES
    | {
        "model_type": "phi3",
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32,
        "sliding_window": 64,
        "rope_scaling": _LONGROPE,
    },
    "gemma3_text": _GEMMA3_TEXT
    | {
        "model_type": "gemma3_text",
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "gemma3": {"model_type": "gemma3", "text_config": _GEMMA3_TEXT, "eos_token_id": 0},
}


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes the text model; it can be changed in place."""
    return config.get("text_config", config)


def weights(family: str, names: dict[str, str], config=None) -> dict[str, np.ndarray]:
    """Weights under the names of a format, by the reader's own tables: not to test these."""
    config = config or huggingface_config.parse_config(CONFIGS[family], "config.json")
    pieces = [piece for _, pieces in checkpoint.leaves(config, names) for piece in pieces]
    return {piece.name: np.full(piece.shape, 0.5, np.float32) for piece in pieces}


def write_huggingface(folder: Path, family: str) -> Path:
    """Writes a model folder."""
    names = FAMILIES[family].huggingface_names
    return tiny_checkpoints.write_huggingface(folder, CONFIGS[family], weights(family, names))


def gguf_parts(architecture: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors of a GGUF file."""
    family = GGUF_FAMILIES[architecture]
    values = settings(copy.deepcopy(CONFIGS[family]))
    of_architecture = {
        "block_count": values["num_hidden_layers"],
        "context_length": values["max_position_embeddings"],
        "embedding_length": values["hidden_size"],
        "feed_forward_length": values["intermediate_size"],
        "attention.head_count": values["num_attention_heads"],
        "attention.head_count_kv": values["num_key_value_heads"],
        "attention.key_length": 8,
        "attention.value_length": 8,
        "attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
        "rope.freq_base": values["rope_theta"],
        "rope.dimension_count": 8,
        "vocab_size": values["vocab_size"],
    }
    if architecture == "gemma3":
        of_architecture["attention.sliding_window"] = 16
    kinds = [3] * len(SPECIAL_TOKENS) + [1] * (len(VOCABULARY) - len(SPECIAL_TOKENS))
    metadata = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in of_architecture.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(VOCABULARY),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ bos_token }}",
    }
    return metadata, weights(family, FAMILIES[family].gguf_names)


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    """Writes a GGUF file; a value's Python type decides how it is stored, an array of any dtype."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"])
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for key, value in metadata.items():
        if key == "general.architecture":
            continue
        if isinstance(value, list):
            writer.add_array(key, value)
        elif type(value) is int and value < 0:
            writer.add_int32(key, value)
        else:
            adders.get(type(value), writer.add_string)(key, value)
    for name, values in tensors.items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
