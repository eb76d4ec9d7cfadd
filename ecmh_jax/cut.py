"""The law of the cut: where a proposal leaves the current trace.

With entropies H_1..H_n of a completion and H_0 = 0, position t has the weight
w_t = max(H_t - H_{t-1}, 0)^cut_power and is cut with probability

    c(t) = (1 - uniform_mix) * w_t / sum_s w_s + uniform_mix / n,

or 1/n where all weights are zero (arXiv:2605.30327, the entropy-cut proposal; H_0 = 0 lets the
first token be cut, without which the chain is reducible). ``uniform_mix = 1`` is uniform cutting.
0^0 is 1, so a cut power of 0 is uniform too. Everything is in logs, for one chain; callers vmap.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class CutLaw(NamedTuple):
    """The weights of a completion's cuts and their sum.

    Attributes:
      log_weights: [T] log w_t by slot; -inf where nothing can be cut.
      log_total: log of the sum of the weights; -inf if all are zero.
      num_cuts: float32, positions that uniform cutting chooses from; may be 0.
    """

    log_weights: jax.Array
    log_total: jax.Array
    num_cuts: jax.Array


def log_cut_weight(jump: jax.Array, cut_power: jax.Array) -> jax.Array:
    """Log of max(jump, 0)^cut_power; shapes broadcast; jumps in nats."""
    rises = jump > 0
    log_jump = jnp.log(jnp.where(rises, jump, 1.0))
    # -inf * 0 is NaN, and 0^0 is 1: a cut power of 0 needs its own branch.
    return jnp.where(rises, cut_power * log_jump, jnp.where(cut_power == 0, 0.0, -jnp.inf))


def cut_law(
    entropy: jax.Array,
    prompt_length: jax.Array,
    length: jax.Array,
    cut_power: jax.Array,
    cut_first_token: bool,
) -> CutLaw:
    """Returns the cut weights of one trace.

    Args:
      entropy: [T] float32 nats by slot, zero on the prompt (which makes H_0 zero).
      prompt_length: int32, live prompt tokens.
      length: int32, prompt and completion; slots beyond it are ignored.
      cut_power: float32 >= 0.
      cut_first_token: whether the completion's first token may be cut.
    """
    slots = jnp.arange(entropy.shape[0])
    before = jnp.concatenate([jnp.zeros((1,), entropy.dtype), entropy[:-1]])
    cuttable = is_cuttable(slots, prompt_length, length, cut_first_token)
    log_weights = jnp.where(cuttable, log_cut_weight(entropy - before, cut_power), -jnp.inf)
    return CutLaw(
        log_weights=log_weights,
        log_total=jax.nn.logsumexp(log_weights),
        num_cuts=num_uniform_cuts(prompt_length, length, cut_first_token),
    )


def is_cuttable(
    slots: jax.Array, prompt_length: jax.Array, length: jax.Array, cut_first_token: bool
) -> jax.Array:
    """Whether a slot holds a completion token that may be cut."""
    return (slots >= first_cut_slot(prompt_length, cut_first_token)) & (slots < length)


def first_cut_slot(prompt_length: jax.Array, cut_first_token: bool) -> jax.Array:
    """The first slot that may be cut."""
    return prompt_length + (0 if cut_first_token else 1)


def num_uniform_cuts(
    prompt_length: jax.Array, length: jax.Array, cut_first_token: bool
) -> jax.Array:
    """The number of slots that may be cut, as float32."""
    first = first_cut_slot(prompt_length, cut_first_token)
    return jnp.maximum(length - first, 0).astype(jnp.float32)


def log_cut_probability(
    log_weight: jax.Array, log_total: jax.Array, num_cuts: jax.Array, uniform_mix: jax.Array
) -> jax.Array:
    """Log c(t) from log w_t, the log of the weights' sum and the number of positions.

    It can only fall while a trace grows, because w_t is fixed and the sum and the number grow.
    """
    uniform = -jnp.log(num_cuts)
    has_weights = log_total > -jnp.inf
    weighted = log_weight - jnp.where(has_weights, log_total, 0.0)
    mixed = jnp.logaddexp(jnp.log1p(-uniform_mix) + weighted, jnp.log(uniform_mix) + uniform)
    return jnp.where(has_weights, mixed, uniform)


def log_cut_probabilities(
    law: CutLaw,
    prompt_length: jax.Array,
    length: jax.Array,
    uniform_mix: jax.Array,
    cut_first_token: bool,
) -> jax.Array:
    """[T] log c by slot; -inf where nothing can be cut."""
    slots = jnp.arange(law.log_weights.shape[0])
    log_probabilities = log_cut_probability(
        law.log_weights, law.log_total, law.num_cuts, uniform_mix
    )
    cuttable = is_cuttable(slots, prompt_length, length, cut_first_token)
    return jnp.where(cuttable, log_probabilities, -jnp.inf)
