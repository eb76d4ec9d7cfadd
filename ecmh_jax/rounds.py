"""Samplers as loops over rounds, so that a host may look, report and stop in between.

A sampler is four functions. Run in one scan they are a single traceable program (``run``); called
one round at a time (``group_sampling``) they give the same results.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ecmh_jax.base import Config, LanguageModel, Params, Result, Tuning

Carry = Any  # pytree of arrays: what the next round needs
Record = Any  # pytree of arrays: what a round leaves for ``Info``


class Batch(NamedTuple):
    """The results to be drawn, B of them.

    Attributes:
      prompts: [B, P] int32, padded on the right.
      prompt_lengths: [B] int32, 1..P.
      prompt_ids: [B] int32 and
      chain_ids: [B] int32: identity of each result, which determines its draws.
      tuning: per-result numbers, [B].
      budget: [B] int32, decoded tokens that each result may spend, for ``best_of_n``; None for no
        limit.
    """

    prompts: jax.Array
    prompt_lengths: jax.Array
    prompt_ids: jax.Array
    chain_ids: jax.Array
    tuning: Tuning
    budget: jax.Array | None = None


class Rounds(NamedTuple):
    """A sampler's functions; the weights are an argument of each, and all are traceable.

    Attributes:
      num_rounds: how many rounds there are, >= 1.
      begin: ``(rng_key, params, batch) -> carry``, before the first round.
      advance: ``(rng_key, params, batch, carry, index) -> (carry, record)``: round ``index``, an
        int32 in 0..num_rounds-1.
      finish: ``(rng_key, batch, carry, records) -> Result``, where the leaves of ``records`` are
        those of the rounds, stacked along a new first axis.
      decoded: ``carry -> int32``, tokens drawn from fresh logits so far; any shape, to be summed.
    """

    num_rounds: int
    begin: Callable[[jax.Array, Params, Batch], Carry]
    advance: Callable[[jax.Array, Params, Batch, Carry, jax.Array], tuple[Carry, Record]]
    finish: Callable[[jax.Array, Batch, Carry, Record], Result]
    decoded: Callable[[Carry], jax.Array]


Build = Callable[[LanguageModel, Config, Any], Rounds]


def run(
    build: Build,
    rng_key: jax.Array,
    model: LanguageModel,
    params: Params,
    batch: Batch,
    config: Config,
    options: Any,
) -> Result:
    """Runs all rounds of a sampler as one scan.

    Args:
      build: the sampler's ``build(model, config, options)``.
      rng_key: scalar typed key, the run's seed.
      model: the language model.
      params: its weights.
      batch: the results to be drawn.
      config: the run.
      options: the sampler's own settings.
    """
    rounds = build(model, config, options)

    def advance(carry, index):
        return rounds.advance(rng_key, params, batch, carry, index)

    carry = rounds.begin(rng_key, params, batch)
    carry, records = jax.lax.scan(advance, carry, jnp.arange(rounds.num_rounds))
    return rounds.finish(rng_key, batch, carry, records)


def repeat(tree: Any, count: int) -> Any:
    """Repeats every row [B] of a tree side by side, for the rows of each result: [B * count]."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, count, axis=0), tree)
