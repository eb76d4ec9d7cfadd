"""The families of decoders, one row each: how they differ, and how their files name things.

A new family is a row here. ``traits`` are fields of ``TransformerConfig``; ``defaults`` are what
transformers takes for keys of config.json that a file leaves out, and published files do leave
them out. The tables of names start from Llama's. ``docs/models.md`` walks through one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

_HUGGINGFACE_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "query": "model.layers.{layer}.self_attn.q_proj.weight",
    "key": "model.layers.{layer}.self_attn.k_proj.weight",
    "value": "model.layers.{layer}.self_attn.v_proj.weight",
    "attention_output": "model.layers.{layer}.self_attn.o_proj.weight",
    "feed_forward_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
}
_GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "blk.{layer}.attn_norm.weight",
    "query": "blk.{layer}.attn_q.weight",
    "key": "blk.{layer}.attn_k.weight",
    "value": "blk.{layer}.attn_v.weight",
    "attention_output": "blk.{layer}.attn_output.weight",
    "feed_forward_norm": "blk.{layer}.ffn_norm.weight",
    "gate": "blk.{layer}.ffn_gate.weight",
    "up": "blk.{layer}.ffn_up.weight",
    "down": "blk.{layer}.ffn_down.weight",
}
_HUGGINGFACE_BIASES = {
    f"{role}_bias": f"model.layers.{{layer}}.self_attn.{letter}_proj.bias"
    for role, letter in (("query", "q"), ("key", "k"), ("value", "v"))
}
_GGUF_BIASES = {
    f"{role}_bias": f"blk.{{layer}}.attn_{letter}.bias"
    for role, letter in (("query", "q"), ("key", "k"), ("value", "v"))
}
_HUGGINGFACE_HEAD_NORMS = {
    f"{role}_norm": f"model.layers.{{layer}}.self_attn.{letter}_norm.weight"
    for role, letter in (("query", "q"), ("key", "k"))
}
_GGUF_HEAD_NORMS = {
    f"{role}_norm": f"blk.{{layer}}.attn_{letter}_norm.weight"
    for role, letter in (("query", "q"), ("key", "k"))
}
_LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
      huggingface_names: role -> tensor name, with ``{layer}``. A fused matrix has one role for
        its parts, such as ``query_key_value``.
      gguf_names: the same for GGUF; empty where the family is not read from GGUF.
      gguf_architecture: ``general.architecture`` of its GGUF files.
      gguf_traits: traits that differ in GGUF, whose converter may have changed the weights.
      gguf_interleaves: whether GGUF stores the rows of queries and keys in llama.cpp's own order.
      traits: fields of ``TransformerConfig`` with the family's value.
      defaults: key of config.json -> what a missing one means.
      reads: keys of config.json that not every family has and this one reads.
      window: how layers are chosen to slide where config.json does not list them: "all",
        "from max_window_layers", or "but every 6th".
      extends_by_yarn: whether runs beyond the context use YaRN, as the model's authors advise.
      text_config: whether config.json keeps the text model's settings under that key.
      renamed: prefix of stored tensors -> what it stands for in ``huggingface_names``.
      stray_tensors: prefixes of stored tensors that text generation has no use for.
    """

    huggingface_names: Mapping[str, str]
    gguf_names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    gguf_architecture: str | None = None
    gguf_traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gguf_interleaves: bool = False
    traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    reads: frozenset[str] = frozenset()
    window: str = "all"
    extends_by_yarn: bool = False
    text_config: bool = False
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stray_tensors: tuple[str, ...] = ()


def _without(names: Mapping[str, str], *roles: str) -> dict[str, str]:
    return {role: name for role, name in names.items() if role not in roles}


_LLAMA = Family(
    huggingface_names=_HUGGINGFACE_NAMES,
    gguf_names=_GGUF_NAMES,
    gguf_architecture="llama",
    gguf_interleaves=True,
    defaults=_LLAMA_DEFAULTS,
)
_MISTRAL = Family(
    huggingface_names=_HUGGINGFACE_NAMES,
    defaults=_LLAMA_DEFAULTS
    | {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
    reads=frozenset({"sliding_window"}),
)
_QWEN2 = Family(
    huggingface_names=_HUGGINGFACE_NAMES | _HUGGINGFACE_BIASES,
    gguf_names=_GGUF_NAMES | _GGUF_BIASES,
    gguf_architecture="qwen2",
    traits={"query_key_value_bias": True},
    defaults=_LLAMA_DEFAULTS
    | {
        "max_position_embeddings": 32_768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    reads=frozenset({"sliding_window", "use_sliding_window", "layer_types"}),
    window="from max_window_layers",
    extends_by_yarn=True,
)
_QWEN3 = dataclasses.replace(
    _QWEN2,
    huggingface_names=_HUGGINGFACE_NAMES | _HUGGINGFACE_HEAD_NORMS,
    gguf_names=_GGUF_NAMES | _GGUF_HEAD_NORMS,
    gguf_architecture="qwen3",
    traits={"query_key_norm": True},
    defaults={**_QWEN2.defaults, "head_dim": 128},
)
_PHI3 = Family(
    huggingface_names=_without(_HUGGINGFACE_NAMES, "query", "key", "value", "gate", "up")
    | {
        "query_key_value": "model.layers.{layer}.self_attn.qkv_proj.weight",
        "gate_up": "model.layers.{layer}.mlp.gate_up_proj.weight",
    },
    gguf_names=_without(_GGUF_NAMES, "query", "key", "value", "gate", "up")
    | {
        "query_key_value": "blk.{layer}.attn_qkv.weight",
        "gate_up": "blk.{layer}.ffn_up.weight",
    },
    gguf_architecture="phi3",
    defaults=_LLAMA_DEFAULTS
    | {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
    },
    reads=frozenset({"sliding_window", "partial_rotary_factor"}),
)
_GEMMA3_TEXT = Family(
    huggingface_names=_HUGGINGFACE_NAMES
    | _HUGGINGFACE_HEAD_NORMS
    | {
        "post_attention_norm": "model.layers.{layer}.post_attention_layernorm.weight",
        "feed_forward_norm": "model.layers.{layer}.pre_feedforward_layernorm.weight",
        "post_feed_forward_norm": "model.layers.{layer}.post_feedforward_layernorm.weight",
    },
    gguf_names=_GGUF_NAMES
    | _GGUF_HEAD_NORMS
    | {
        "post_attention_norm": "blk.{layer}.post_attention_norm.weight",
        "post_feed_forward_norm": "blk.{layer}.post_ffw_norm.weight",
    },
    gguf_architecture="gemma3",
    gguf_traits={"norm_offset": 0.0},  # the converter has added it to the weights
    traits={
        "query_key_norm": True,
        "norm_offset": 1.0,
        "post_norms": True,
        "activation": "gelu_tanh",
    },
    defaults={
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
    },
    reads=frozenset(
        {
            "sliding_window",
            "layer_types",
            "rope_local_base_freq",
            "query_pre_attn_scalar",
            "hidden_activation",
            "final_logit_softcapping",
        }
    ),
    window="but every 6th",
)
# The larger Gemma 3 read images too; their text model is the same.
_GEMMA3 = dataclasses.replace(
    _GEMMA3_TEXT,
    gguf_architecture=None,
    text_config=True,
    renamed={"language_model.": "", "model.language_model.": "model."},
    stray_tensors=(
        "vision_tower.",
        "multi_modal_projector.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
    ),
)
# model_type of config.json -> row
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "phi3": _PHI3,
    "gemma3_text": _GEMMA3_TEXT,
    "gemma3": _GEMMA3,
}
# general.architecture of GGUF -> name of the row
GGUF_FAMILIES = {
    row.gguf_architecture: name for name, row in FAMILIES.items() if row.gguf_architecture
}
