"""The one adapter between the Flax network and ``ecmh_jax.base.LanguageModel``."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ecmh_jax.base import LanguageModel
from models import attention, transformer
from models.config import TransformerConfig


def build_language_model(
    config: TransformerConfig,
    dtype: jnp.dtype,
    decode_attention: str | None = None,
    needed_length: int | None = None,
) -> LanguageModel:
    """Returns the network as pure functions over explicit weights and cache.

    Args:
      config: the network's shape.
      dtype: dtype of the KV cache; the weights' dtype.
      decode_attention: one of ``attention.IMPLEMENTATIONS``; None leaves the choice to
        ``attention.implementation``.
      needed_length: positions that a run needs at most; rotary positions that depend on the
        length are those of it. None for the ``context_length``.
    """
    chosen = attention.implementation(jax.devices(), dtype, config, decode_attention)
    network = transformer.Transformer(config, chosen, needed_length or config.context_length)

    def init_cache(batch_size, num_slots):
        return transformer.init_cache(config, batch_size, num_slots, dtype, chosen)

    def prefill(params, tokens, lengths, cache):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        return network.apply({"params": params}, tokens, positions, lengths, cache)

    def decode(params, tokens, positions, cache):
        lengths = jnp.ones_like(positions)
        return network.apply(
            {"params": params}, tokens[:, None], positions[:, None], lengths, cache
        )

    return LanguageModel(init_cache, prefill, decode)


def build_forward(config: TransformerConfig) -> Callable[[Any, jax.Array], jax.Array]:
    """Returns the network over whole texts at once, for training and for scoring.

    Args:
      config: the network's shape; runs are as long as its ``context_length`` at most.

    Returns:
      ``forward(params, tokens)``: [B, S] int32, S > 1, to float32 logits [B, S, V] after every
      token; differentiable.
    """
    network = transformer.Transformer(config, "xla", config.context_length)

    def forward(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        # What is written to the cache is read by nobody: the compiler leaves it out.
        batch_size, length = tokens.shape
        cache = transformer.init_cache(config, batch_size, length, jnp.dtype(jnp.float32), "xla")
        return network.apply({"params": params}, tokens, positions, None, cache)[0]

    return forward
