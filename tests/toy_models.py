"""Toy autoregressive models that are small enough to enumerate, and their JAX adapter.

A model is a table of logits with one row for every prefix of completion tokens, so that every law
of the sampler can be written down exactly. NumPy only at import: the oracle reads the table without
JAX, the adapter at the end hands the same table to the sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ecmh_jax.base import LanguageModel


@dataclasses.dataclass(frozen=True, eq=False)
class ToyModel:
    """An autoregressive model given as a table.

    Attributes:
      vocabulary_size: number of token ids V.
      horizon: longest completion, in tokens, that the table can continue to.
      eos_id: the token that ends a completion.
      logits: [num_prefixes, V] float64, one row for every prefix of 0..horizon-1 tokens, in the
        order of `prefix_index`. Rows of prefixes that hold an EOS exist and are never used.
    """

    vocabulary_size: int
    horizon: int
    eos_id: int
    logits: np.ndarray


def num_prefixes(vocabulary_size: int, horizon: int) -> int:
    """Counts the prefixes of 0..horizon-1 tokens: the rows of a table of logits."""
    return sum(vocabulary_size**length for length in range(horizon))


def child_index(index: int, token: int, vocabulary_size: int) -> int:
    """Returns the row of `prefix + (token,)`, given the row of `prefix`."""
    return index * vocabulary_size + token + 1


def prefix_index(prefix: Sequence[int], vocabulary_size: int) -> int:
    """Returns the row of a prefix: 0 for the empty one, children of row i at i * V + 1 + token."""
    index = 0
    for token in prefix:
        index = child_index(index, token, vocabulary_size)
    return index


def random_toy_model(
    rng: np.random.Generator,
    vocabulary_size: int,
    horizon: int,
    eos_boost: float = 0.0,
    scale: float = 1.5,
    eos_rank: int | None = None,
) -> ToyModel:
    """Draws a model whose next-token entropy jumps up and down along its completions.

    About a third of the rows is made nearly certain and a third nearly uniform, because entropy
    cuts are told apart from uniform ones only by such jumps.

    Args:
      rng: source of randomness.
      vocabulary_size: V, at least 2.
      horizon: longest completion in tokens.
      eos_boost: nats added to the EOS logit of every row; negative makes completions long.
      scale: standard deviation of the logits, in nats.
      eos_rank: if given, EOS is among the `eos_rank` likeliest tokens of every row, so that it
        survives top-k truncation with k >= eos_rank. Rows are permuted, not changed in value.

    Returns:
      The model. Its logits are float32 numbers, so that a float32 copy loses nothing.
    """
    rows = num_prefixes(vocabulary_size, horizon)
    eos_id = int(rng.integers(vocabulary_size))
    logits = scale * rng.normal(size=(rows, vocabulary_size))
    kind = rng.integers(3, size=rows)  # 0: nearly certain, 1: nearly uniform, 2: as drawn.
    favourite = rng.integers(vocabulary_size, size=rows)
    logits[kind == 1] *= 0.2
    logits[kind == 0, favourite[kind == 0]] += 4.0
    logits[:, eos_id] += eos_boost
    if eos_rank is not None:
        every_row = np.arange(rows)
        held_by = np.argsort(-logits, axis=1, kind="stable")[:, eos_rank - 1]
        threshold = logits[every_row, held_by]
        # Swapping the two logits keeps each row's entropy, and with it the planted jumps.
        swap = logits[:, eos_id] < threshold
        logits[every_row[swap], held_by[swap]] = logits[swap, eos_id]
        logits[swap, eos_id] = threshold[swap]
    logits = logits.astype(np.float32).astype(np.float64)
    return ToyModel(vocabulary_size, horizon, eos_id, logits)


def toy_language_model(
    model: ToyModel, num_prompt_tokens: int
) -> tuple[LanguageModel, dict[str, Any]]:
    """Adapts a toy model to the sampler's interface.

    The cache holds nothing but the tokens, and the logits are looked up from its slots
    `num_prompt_tokens..position`. A cache row that is stale, or belongs to another chain, thus
    yields the logits of another prefix: tests of cache bookkeeping rely on that.

    Args:
      model: the table.
      num_prompt_tokens: length of every prompt, at least 1; its tokens do not change the logits.

    Returns:
      `(language_model, params)`; `params["logits"]` is the table, [num_prefixes, V] float32.
      The cache is [B, num_slots] int32. A completion longer than the table's prefixes is read
      as its first horizon-1 tokens.
    """
    # Imported here so that the NumPy oracle, which needs `ToyModel`, stays free of JAX.
    import chex
    import jax.numpy as jnp

    from ecmh_jax.base import LanguageModel

    def init_cache(batch_size: int, num_slots: int) -> chex.Array:
        return jnp.zeros((batch_size, num_slots), jnp.int32)

    def logits_after(params: Any, positions: chex.Array, cache: Any) -> chex.Array:
        """Looks up the logits [B, V] that follow the token in slot `positions` [B]."""
        last_slot = min(num_prompt_tokens + model.horizon - 1, cache.shape[1])
        index = jnp.zeros_like(positions)
        for slot in range(num_prompt_tokens, last_slot):
            child = index * model.vocabulary_size + cache[:, slot] + 1
            index = jnp.where(slot <= positions, child, index)
        # A padding id that is no token must not read outside of the table.
        return params["logits"][jnp.clip(index, 0, model.logits.shape[0] - 1)]

    def prefill(
        params: Any, tokens: chex.Array, lengths: chex.Array, cache: Any
    ) -> tuple[chex.Array, chex.Array]:
        cache = cache.at[:, : jnp.shape(tokens)[1]].set(tokens.astype(jnp.int32))
        return logits_after(params, lengths - 1, cache), cache

    def decode(
        params: Any, tokens: chex.Array, positions: chex.Array, cache: Any
    ) -> tuple[chex.Array, chex.Array]:
        rows = jnp.arange(cache.shape[0])
        cache = cache.at[rows, positions].set(tokens.astype(jnp.int32))
        return logits_after(params, positions, cache), cache

    params = {"logits": jnp.asarray(model.logits, jnp.float32)}
    return LanguageModel(init_cache, prefill, decode), params
