"""config.json of published models, as far as it shapes the network: for random weights.

The rotary factors of LongRoPE are left at one: with random weights they would mean nothing, and
they change neither the work nor the memory.
"""

from typing import Any

from models.families import FAMILIES

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [128_001, 128_008, 128_009],
}
_SMOLLM2 = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "max_position_embeddings": 8192,
    "rope_theta": 100_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}
_QWEN25 = {
    "model_type": "qwen2",
    "vocab_size": 152_064,
    "max_position_embeddings": 131_072,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 151_643,
}
_SMALL_QWEN25 = {
    **_QWEN25,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 151_643,
}
_PHI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "max_position_embeddings": 131_072,
    "original_max_position_embeddings": 4096,
    "sliding_window": 262_144,
    "rms_norm_eps": 1e-5,
}
_GEMMA3 = {"model_type": "gemma3_text", "sliding_window": 1024, "eos_token_id": [1, 106]}


def _sizes(
    width: int, inner: int, layers: int, heads: int, kv_heads: int | None = None
) -> dict[str, Any]:
    sizes = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return sizes if kv_heads is None else sizes | {"num_key_value_heads": kv_heads}


def _llama3_scaling(factor: float) -> dict[str, Any]:
    return {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    }


def _longrope(pairs: int) -> dict[str, Any]:
    ones = [1.0] * pairs
    return {"rope_scaling": {"rope_type": "longrope", "short_factor": ones, "long_factor": ones}}


CONFIGS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _SMOLLM2 | _sizes(576, 1536, 30, 9, 3),
    "smollm2-360m": _SMOLLM2 | _sizes(960, 2560, 32, 15, 5),
    "smollm2-1.7b": _SMOLLM2 | {"rope_theta": 130_000.0} | _sizes(2048, 8192, 24, 32, 32),
    "llama-3.2-1b": _LLAMA3
    | _sizes(2048, 8192, 16, 32)
    | _llama3_scaling(32.0)
    | {"head_dim": 64, "tie_word_embeddings": True},
    "llama-3.2-3b": _LLAMA3
    | _sizes(3072, 8192, 28, 24)
    | _llama3_scaling(32.0)
    | {"head_dim": 128, "tie_word_embeddings": True},
    "llama-3.1-8b": _LLAMA3 | _sizes(4096, 14_336, 32, 32) | _llama3_scaling(8.0),
    "llama-3.1-70b": _LLAMA3 | _sizes(8192, 28_672, 80, 64) | _llama3_scaling(8.0),
    "qwen2.5-0.5b": _SMALL_QWEN25 | _sizes(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": _SMALL_QWEN25
    | _sizes(1536, 8960, 28, 12, 2)
    | {"max_position_embeddings": 131_072},
    "qwen2.5-3b": _SMALL_QWEN25 | _sizes(2048, 11_008, 36, 16, 2),
    "qwen2.5-7b": _QWEN25 | _sizes(3584, 18_944, 28, 28, 4),
    "qwen2.5-14b": _QWEN25 | _sizes(5120, 13_824, 48, 40, 8) | {"rms_norm_eps": 1e-5},
    "qwen2.5-32b": _QWEN25 | _sizes(5120, 27_648, 64, 40, 8) | {"rms_norm_eps": 1e-5},
    "qwen2.5-72b": _QWEN25 | _sizes(8192, 29_568, 80, 64, 8) | {"rms_norm_eps": 1e-5},
    "qwen2.5-math-7b": _QWEN25
    | _sizes(3584, 18_944, 28, 28, 4)
    | {"max_position_embeddings": 4096, "rope_theta": 10_000.0},
    "qwen3-0.6b": _QWEN3 | _sizes(1024, 3072, 28, 16) | {"tie_word_embeddings": True},
    "qwen3-1.7b": _QWEN3 | _sizes(2048, 6144, 28, 16) | {"tie_word_embeddings": True},
    "qwen3-4b": _QWEN3 | _sizes(2560, 9728, 36, 32) | {"tie_word_embeddings": True},
    "qwen3-8b": _QWEN3 | _sizes(4096, 12_288, 36, 32),
    "qwen3-14b": _QWEN3 | _sizes(5120, 17_408, 40, 40),
    "qwen3-32b": _QWEN3 | _sizes(5120, 25_600, 64, 64),
    "phi-3.5-mini": _PHI
    | _longrope(48)
    | {
        "vocab_size": 32_064,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "eos_token_id": [32_007, 32_001, 32_000],
    },
    "phi-4-mini": _PHI
    | _longrope(48)
    | {
        "vocab_size": 200_064,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "eos_token_id": [200_020, 199_999],
    },
    "gemma-3-270m": _GEMMA3
    | _sizes(640, 2048, 18, 4, 1)
    | {"vocab_size": 262_144, "sliding_window": 512, "max_position_embeddings": 32_768},
    "gemma-3-1b": _GEMMA3
    | _sizes(1152, 6912, 26, 4, 1)
    | {"vocab_size": 262_144, "sliding_window": 512, "max_position_embeddings": 32_768},
    "gemma-3-4b": _GEMMA3
    | _sizes(2560, 10_240, 34, 8, 4)
    | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
}
assert all(values["model_type"] in FAMILIES for values in CONFIGS.values())


def eos_ids(values: dict[str, Any]) -> tuple[int, ...]:
    """End-of-sequence ids of one of ``CONFIGS``."""
    found = values["eos_token_id"]
    return tuple(found) if isinstance(found, list) else (found,)
