"""Writes a trained model as the Hugging Face folder that ``huggingface_reader`` reads."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tokenizers

from models import checkpoint
from models.config import TransformerConfig
from models.families import FAMILIES
from models.rotary import Rotary

# All that a folder says of the network, and its rotary base.
_WRITTEN = (
    "vocabulary_size",
    "num_layers",
    "embedding_size",
    "num_heads",
    "num_kv_heads",
    "head_size",
    "feed_forward_size",
    "context_length",
    "norm_epsilon",
    "tied_head",
)


def write_llama(
    folder: str | Path,
    config: TransformerConfig,
    params: dict[str, Any],
    tokenizer: tokenizers.Tokenizer,
    eos_id: int,
) -> None:
    """Writes a plain decoder; transformers reads the folder as a ``LlamaForCausalLM``.

    Args:
      folder: made where it is missing.
      config: a network of family ``llama`` with its traits and plain rotary positions.
      params: the tree of ``models.transformer.Transformer``; float32.
      tokenizer: of ``config.vocabulary_size`` ids at most.
      eos_id: the token that ends a completion.

    Raises:
      ValueError: for a network with any other trait.
    """
    plain = TransformerConfig(
        **{name: getattr(config, name) for name in _WRITTEN},
        rotary=Rotary(theta=config.rotary.theta),
    )
    if config != plain:
        raise ValueError(f"{config} cannot be written; expected {plain}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = FAMILIES[config.family].huggingface_names
    tensors = {}
    for path, pieces in checkpoint.leaves(config, names):
        leaf: Any = params
        for key in path:
            leaf = leaf[key]
        leaf = np.asarray(leaf)
        by_output = leaf.T if checkpoint.is_projection(path, leaf.shape) else leaf
        start = 0
        for piece in pieces:
            rows = by_output[start : start + piece.shape[0]]
            tensors[piece.name] = np.ascontiguousarray(rows)
            start += piece.shape[0]
    settings = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.embedding_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rotary.theta,
        "tie_word_embeddings": config.tied_head,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": eos_id,
    }
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
