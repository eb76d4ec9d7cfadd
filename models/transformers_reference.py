"""The same weights in transformers, to compare with; needs the extra ``parity``."""

from typing import Any

import numpy as np

from models import checkpoint
from models.config import TransformerConfig
from models.families import FAMILIES


def can_compare(config: TransformerConfig) -> bool:
    """Whether ``to_transformers`` can build this network."""
    plain = config.rotary.scaling is None and config.rotary.size is None
    slides = any(config.sliding_layers)
    return plain and (not slides or config.sliding_rotary is not None)


def to_transformers(config: TransformerConfig, params: dict[str, Any]) -> Any:
    """Returns the causal language model of transformers with the weights ``params``.

    Only sizes are passed on: the traits of the family are transformers' own.

    Args:
      config: a network that ``can_compare``.
      params: its weights, not quantised.

    Returns:
      A model in evaluation mode, float32.

    Raises:
      ValueError: the network has a trait that sizes do not imply.
    """
    import torch
    import transformers

    if not can_compare(config):
        raise ValueError(f"{config} has traits that its sizes do not imply; expected none")
    settings: dict[str, Any] = {
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.embedding_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.feed_forward_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied_head,
    }
    rotary = {"rope_type": "default", "rope_theta": config.rotary.theta}
    if config.sliding_rotary is not None:
        sliding = {"rope_type": "default", "rope_theta": config.sliding_rotary.theta}
        rotary = {"full_attention": rotary, "sliding_attention": sliding}
        settings["sliding_window"] = config.sliding_window
    settings["rope_parameters"] = rotary
    their_config = transformers.AutoConfig.for_model(config.family, **settings)
    theirs = transformers.AutoModelForCausalLM.from_config(their_config).eval()
    theirs.load_state_dict(
        {name: torch.tensor(values) for name, values in _their_names(config, params).items()},
        strict=True,
    )
    return theirs


def _their_names(config: TransformerConfig, params: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tree under Hugging Face's names, the fused matrices taken apart."""
    family = FAMILIES[config.family]
    # GGUF files hold Gemma's norms with the offset added.
    norm_shift = config.norm_offset - family.traits.get("norm_offset", 0.0)
    state: dict[str, np.ndarray] = {}
    for path, pieces in checkpoint.leaves(config, family.huggingface_names):
        leaf = params
        for key in path:
            leaf = leaf[key]
        by_output = np.asarray(leaf, np.float32)
        by_output = by_output.T if checkpoint.is_projection(path, pieces[0].shape) else by_output
        if path[-1].endswith("norm"):
            by_output = by_output + norm_shift
        ends = np.cumsum([piece.shape[0] for piece in pieces])[:-1]
        parts = np.split(by_output, ends)
        state |= {piece.name: part for piece, part in zip(pieces, parts, strict=True)}
    if config.tied_head:
        state[family.huggingface_names["head"]] = state[family.huggingface_names["embedding"]]
    return state
