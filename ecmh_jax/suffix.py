"""Drawing the rest of a trace: the decode loop that extensions and proposals share.

Draws are coupled to the current trace: as long as the new trace agrees with it, the token at a slot
stays with probability q(token), and otherwise comes from q without that token, so that its law is
exactly q. The first divergence is therefore known from stored ``log_q`` alone, before the model
runs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ecmh_jax import acceptance, cut, random_keys, token_law
from ecmh_jax.base import Cache, Config, LanguageModel, Params, Trace, Tuning


class Plan(NamedTuple):
    """A move of each chain, fixed before its suffix is drawn. All [B].

    Attributes:
      keys: step keys.
      attempted: bool, a Metropolis-Hastings step; False for an extension or nothing at all.
      moves: bool, whether the new trace, if taken, is another one: an extension of at least a
        token, or a proposal that diverges.
      cut_slot: int32, the slot of the cut.
      divergence: int32, slot from ``first_divergence``: earlier tokens stay, this one may not be
        drawn again, later ones are free; -1 where nothing is coupled.
      horizon: int32, slots that a trace may fill at most.
      log_uniform: float32, log u of the acceptance test; -inf accepts all.
    """

    keys: jax.Array
    attempted: jax.Array
    moves: jax.Array
    cut_slot: jax.Array
    divergence: jax.Array
    horizon: jax.Array
    log_uniform: jax.Array


class Suffix(NamedTuple):
    """A suffix being drawn for each chain. All [B] unless said otherwise.

    Attributes:
      trace: the new trace so far; beyond ``trace.length`` it still holds the current trace.
      done: bool.
      hopeless: bool, rejection is certain.
      finite: bool, no logit was NaN or infinite.
      decoded: int32, tokens drawn from fresh logits.
      ratio: the running acceptance ratio.
      log_ratio: float32, its value: log A so far.
    """

    trace: Trace
    done: jax.Array
    hopeless: jax.Array
    finite: jax.Array
    decoded: jax.Array
    ratio: acceptance.RunningRatio
    log_ratio: jax.Array


def begin(
    current: Trace, start: jax.Array, draws: jax.Array, ratio: acceptance.RunningRatio
) -> Suffix:
    """Suffixes of which nothing is drawn yet.

    Args:
      current: the current traces.
      start: [B] int32, the first slot to draw.
      draws: [B] bool, False for chains that have nothing to draw and are done.
      ratio: the ratio at ``start``.
    """
    return Suffix(
        trace=current._replace(length=jnp.where(draws, start, current.length)),
        done=~draws,
        hopeless=jnp.zeros_like(draws),
        finite=jnp.ones_like(draws),
        decoded=jnp.zeros_like(start),
        ratio=ratio,
        log_ratio=jnp.zeros(start.shape, jnp.float32),
    )


def first_divergence(
    keys: jax.Array, trace: Trace, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Finds where a suffix redrawn from ``start`` first differs from the current trace.

    Args:
      keys: [B] step keys.
      trace: current traces.
      start: [B] int32, first slot to be redrawn.

    Returns:
      The slot [B] int32, ``trace.length`` where nothing differs; whether something does [B] bool.
    """
    batch_size, num_slots = trace.tokens.shape
    slots = jnp.broadcast_to(jnp.arange(num_slots), (batch_size, num_slots))
    redrawn = (slots >= start[:, None]) & (slots < trace.length[:, None])
    leaves = redrawn & (random_keys.stay_uniform(keys, slots) >= jnp.exp(trace.log_q))
    diverges = leaves.any(axis=-1)
    return jnp.where(diverges, leaves.argmax(axis=-1), trace.length), diverges


def is_eos(tokens: jax.Array, eos_ids: tuple[int, ...]) -> jax.Array:
    """Whether each token ends a completion; the shape of ``tokens``, bool."""
    return jnp.isin(tokens, jnp.asarray(eos_ids, jnp.int32))


def last_token(trace: Trace) -> jax.Array:
    """The last live token of each trace, [B] int32."""
    return jnp.take_along_axis(trace.tokens, (trace.length - 1)[:, None], axis=1)[:, 0]


def draw_one(
    model: LanguageModel,
    config: Config,
    params: Params,
    tuning: Tuning,
    current: Trace,
    prompt_length: jax.Array,
    plan: Plan,
    suffix: Suffix,
    cache: Cache,
) -> tuple[Suffix, Cache]:
    """Draws one token of every suffix that is not done: a fused decode step.

    Args:
      model: the language model.
      config: the run.
      params: the model's weights.
      tuning: per-chain numbers.
      current: the traces that the draws are coupled to.
      prompt_length: [B] int32.
      plan: the moves.
      suffix: the suffixes so far.
      cache: holds slots ``0..trace.length-2`` of ``suffix.trace``.

    Returns:
      The suffixes with a token more, and the cache that holds them.
    """
    rows = jnp.arange(current.tokens.shape[0])
    slot = suffix.trace.length
    # A row that is done decodes its last token again, which changes nothing in its cache.
    logits, cache = model.decode(params, last_token(suffix.trace), slot - 1, cache)
    slot = jnp.minimum(slot, config.num_slots - 1)

    def stored(values):
        return values[rows, slot]

    stays = slot < plan.divergence
    leaves = (slot == plan.divergence) & (slot < current.length)
    kept_token = stored(current.tokens)
    draw = token_law.draw_token(
        logits,
        random_keys.token_uniforms(plan.keys, slot),
        tuning.power,
        tuning.inverse_temperature,
        jnp.where(leaves, kept_token, -1),
        config.top_k,
    )
    token = jnp.where(stays, kept_token, draw.token)
    # The entropy belongs to the prefix: both traces must use the very same number.
    entropy = jnp.where(stays | leaves, stored(current.entropy), draw.entropy)
    live = ~suffix.done & draw.finite
    diverged = live & ~stays

    def put(values, kept_values, drawn):
        new = jnp.where(stays, stored(kept_values), drawn)
        return values.at[rows, slot].set(jnp.where(live, new, stored(values)))

    trace = Trace(
        tokens=put(suffix.trace.tokens, current.tokens, token),
        length=suffix.trace.length + live,
        log_prob=put(suffix.trace.log_prob, current.log_prob, draw.log_prob),
        log_q=put(suffix.trace.log_q, current.log_q, draw.log_q),
        log_weight=put(suffix.trace.log_weight, current.log_weight, draw.log_weight),
        entropy=put(suffix.trace.entropy, current.entropy, entropy),
    )
    extended = jax.vmap(acceptance.extend)(
        suffix.ratio,
        draw.log_weight,
        entropy,
        tuning.cut_power,
    )
    ratio = jax.tree.map(lambda new, old: jnp.where(diverged, new, old), extended, suffix.ratio)
    log_ratio = jax.vmap(acceptance.log_ratio)(
        ratio,
        cut.num_uniform_cuts(prompt_length, trace.length, config.cut_first_token),
        tuning.uniform_mix,
    )
    log_ratio = jnp.where(diverged, log_ratio, suffix.log_ratio)
    bounded = token_law.weights_are_bounded(tuning.power, tuning.inverse_temperature)
    hopeless = suffix.hopeless | (diverged & bounded & (log_ratio < plan.log_uniform))
    ended = is_eos(token, config.eos_ids) | (trace.length >= plan.horizon)
    done = suffix.done | ended | ~draw.finite
    drawn = Suffix(
        trace=trace,
        done=done | hopeless if config.early_rejection else done,
        hopeless=hopeless,
        # Logits beyond a certain rejection decide nothing, so they cannot fail the chain.
        finite=suffix.finite & (draw.finite | suffix.done | suffix.hopeless),
        decoded=suffix.decoded + ~suffix.done,
        ratio=ratio,
        log_ratio=log_ratio,
    )
    return drawn, cache


def draw_suffix(
    model: LanguageModel,
    config: Config,
    params: Params,
    tuning: Tuning,
    current: Trace,
    prompt_length: jax.Array,
    plan: Plan,
    suffix: Suffix,
    cache: Cache,
) -> tuple[Suffix, Cache]:
    """Draws every suffix to its end with ``draw_one``; the batch waits for the last."""

    def body(carry):
        return draw_one(model, config, params, tuning, current, prompt_length, plan, *carry)

    return jax.lax.while_loop(lambda carry: ~carry[0].done.all(), body, (suffix, cache))
