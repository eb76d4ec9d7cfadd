"""From logits to a drawn token and its statistics, in one fused step.

One law serves target, proposal and entropy: p is the model's next-token law truncated to its
``top_k`` most probable tokens and renormalised, and q = p^(1/tau) / Z is its tempered form.
Everything is float32, whatever the dtype of the logits.
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

_GROUP_SIZE = 64  # tokens whose maximum or sum stands for them in a first pass


class Draw(NamedTuple):
    """A drawn token and its statistics, all [B]; float32 nats.

    Attributes:
      token: int32.
      log_prob: log p(token).
      log_q: log q(token).
      log_weight: power * log_prob - log_q; for tau = 1/power it is log Z whatever was drawn.
      entropy: -sum_v p(v) log p(v) over the truncated law.
      finite: bool, False where a logit is NaN or +inf, or all are -inf; the rest is then undefined.
    """

    token: jax.Array
    log_prob: jax.Array
    log_q: jax.Array
    log_weight: jax.Array
    entropy: jax.Array
    finite: jax.Array


def draw_token(
    logits: jax.Array,
    uniforms: jax.Array,
    power: jax.Array,
    inverse_temperature: jax.Array,
    excluded: jax.Array,
    top_k: int | None,
) -> Draw:
    """Draws one token a chain from q without ``excluded``; its statistics are those of all of q.

    Args:
      logits: [B, V], any float dtype; -inf marks impossible tokens.
      uniforms: [B, 2] float32 in [0, 1).
      power: [B] float32, alpha.
      inverse_temperature: [B] float32, 1/tau.
      excluded: [B] int32, a token that must not be drawn, -1 for none. It is drawn all the same
        where no other token has any probability.
      top_k: tokens that truncation keeps, 1..V, or None for all.

    Returns:
      The draw and its statistics.
    """
    batch_size, vocabulary_size = logits.shape
    chex.assert_shape(uniforms, (batch_size, 2))
    chex.assert_shape((power, inverse_temperature, excluded), (batch_size,))
    if top_k is None:
        kept_logits = logits.astype(jnp.float32)
        token_ids = jnp.broadcast_to(jnp.arange(vocabulary_size), logits.shape)
        maximum = kept_logits.max(axis=-1)
    else:
        kept_logits, token_ids, maximum = top_k_logits(logits, top_k)
    log_probs = jax.nn.log_softmax(kept_logits, axis=-1)
    probs = jnp.exp(log_probs)
    entropy = -jnp.sum(jnp.where(probs > 0, probs * log_probs, 0.0), axis=-1)

    tempered = inverse_temperature[:, None] * log_probs
    log_normaliser = jax.nn.logsumexp(tempered, axis=-1)
    allowed = jnp.where(token_ids == excluded[:, None], -jnp.inf, tempered)
    best = allowed.max(axis=-1, keepdims=True)
    allowed = jnp.where(best > -jnp.inf, allowed - best, tempered - log_normaliser[:, None])
    index = _draw_index(jnp.exp(allowed), uniforms)

    def at_index(values):
        return jnp.take_along_axis(values, index[:, None], axis=-1)[:, 0]

    log_prob = at_index(log_probs)
    log_weight = (power - inverse_temperature) * log_prob + log_normaliser
    return Draw(
        token=at_index(token_ids),
        log_prob=log_prob,
        log_q=inverse_temperature * log_prob - log_normaliser,
        # Certain rejection counts on it that rounding lifts no weight above zero.
        log_weight=jnp.where(
            weights_are_bounded(power, inverse_temperature),
            jnp.minimum(log_weight, 0.0),
            log_weight,
        ),
        entropy=entropy,
        finite=jnp.isfinite(maximum),
    )


def weights_are_bounded(power: jax.Array, inverse_temperature: jax.Array) -> jax.Array:
    """Whether 1 <= 1/tau <= power, where every log-weight is at most 0."""
    return (inverse_temperature >= 1.0) & (inverse_temperature <= power)


def top_k_logits(logits: jax.Array, top_k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the ``top_k`` largest logits without sorting the vocabulary.

    The k largest lie inside the k groups with the largest maxima, so two small searches find
    exactly what ``jax.lax.top_k`` finds, ties included: groups are searched in the order of their
    tokens, so an equal logit with a lower token id still comes first.

    Args:
      logits: [B, V], any float dtype.
      top_k: 1..V.

    Returns:
      Logits [B, K] float32 in falling order, their token ids [B, K] int32, and the row maxima [B]
      float32, NaN where any logit is.
    """
    batch_size, vocabulary_size = logits.shape
    num_groups = -(-vocabulary_size // _GROUP_SIZE)
    if top_k >= num_groups:
        kept, token_ids = jax.lax.top_k(logits.astype(jnp.float32), top_k)
        return kept, token_ids, logits.max(axis=-1).astype(jnp.float32)
    padding = num_groups * _GROUP_SIZE - vocabulary_size
    if padding:
        logits = jnp.pad(logits, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    groups = logits.reshape(batch_size, num_groups, _GROUP_SIZE)
    group_maxima = groups.max(axis=-1).astype(jnp.float32)
    _, best_groups = jax.lax.top_k(group_maxima, top_k)
    best_groups = jnp.sort(best_groups, axis=-1)
    candidates = jnp.take_along_axis(groups, best_groups[:, :, None], axis=1).astype(jnp.float32)
    kept, places = jax.lax.top_k(candidates.reshape(batch_size, -1), top_k)
    group = jnp.take_along_axis(best_groups, places // _GROUP_SIZE, axis=-1)
    return kept, group * _GROUP_SIZE + places % _GROUP_SIZE, group_maxima.max(axis=-1)


def _draw_index(weights: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Draws one index a row with probability proportional to ``weights`` [B, K] >= 0.

    By inverse transform, first over groups and then inside one: one uniform of 23 bits would give
    the tail of a large vocabulary no chance.
    """
    batch_size, num_weights = weights.shape
    num_groups = -(-num_weights // _GROUP_SIZE)
    if num_groups == 1:
        return invert_distribution(weights, uniforms[:, 0])
    weights = jnp.pad(weights, ((0, 0), (0, num_groups * _GROUP_SIZE - num_weights)))
    groups = weights.reshape(batch_size, num_groups, _GROUP_SIZE)
    group = invert_distribution(groups.sum(axis=-1), uniforms[:, 0])
    members = jnp.take_along_axis(groups, group[:, None, None], axis=1)[:, 0]
    return group * _GROUP_SIZE + invert_distribution(members, uniforms[:, 1])


def invert_distribution(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Returns the first index [B] whose cumulated weight exceeds ``uniform`` of the total.

    Args:
      weights: [B, K] float32 >= 0; need not sum to 1. An index without weight is never returned
        unless none has any.
      uniform: [B] float32 in [0, 1).
    """
    cumulated = jnp.cumsum(weights, axis=-1)
    total = cumulated[:, -1:]
    passed = (cumulated > uniform[:, None] * total) & (weights > 0)
    # A parallel cumulative sum may dip by a rounding error; the heaviest index is then as good.
    return jnp.where(passed.any(axis=-1), passed.argmax(axis=-1), weights.argmax(axis=-1))
