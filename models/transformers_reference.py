"""The same weights in transformers, to compare with; needs the extra ``parity``."""

from typing import Any

import numpy as np

from models.config import TransformerConfig


def to_transformers(config: TransformerConfig, params: dict[str, Any]) -> Any:
    """Returns a ``LlamaForCausalLM`` in evaluation mode with the weights ``params``, in float32."""
    import torch
    import transformers

    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocabulary_size,
            hidden_size=config.embedding_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_size,
            intermediate_size=config.feed_forward_size,
            max_position_embeddings=config.context_length,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            rms_norm_eps=config.norm_epsilon,
            tie_word_embeddings=config.tied_head,
        )
    ).eval()
    state = {
        name: torch.tensor(np.asarray(values, np.float32))
        for name, values in _their_names(config, params).items()
    }
    theirs.load_state_dict(state, strict=True)
    return theirs


def _their_names(config: TransformerConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The tree under Hugging Face's names, the fused matrices taken apart."""
    query_rows = config.num_heads * config.head_size
    key_rows = config.num_kv_heads * config.head_size
    state = {
        "model.embed_tokens.weight": params["embedding"],
        "lm_head.weight": params["embedding" if config.tied_head else "head"],
        "model.norm.weight": params["final_norm"],
    }
    for layer in range(config.num_layers):
        leaves, prefix = params[f"layer_{layer}"], f"model.layers.{layer}"
        queries, keys, values = np.split(
            np.asarray(leaves["query_key_value"]).T, [query_rows, query_rows + key_rows]
        )
        gate, up = np.split(np.asarray(leaves["gate_up"]).T, 2)
        state |= {
            f"{prefix}.input_layernorm.weight": leaves["attention_norm"],
            f"{prefix}.self_attn.q_proj.weight": queries,
            f"{prefix}.self_attn.k_proj.weight": keys,
            f"{prefix}.self_attn.v_proj.weight": values,
            f"{prefix}.self_attn.o_proj.weight": leaves["attention_output"].T,
            f"{prefix}.post_attention_layernorm.weight": leaves["feed_forward_norm"],
            f"{prefix}.mlp.gate_proj.weight": gate,
            f"{prefix}.mlp.up_proj.weight": up,
            f"{prefix}.mlp.down_proj.weight": leaves["down"].T,
        }
    return state
