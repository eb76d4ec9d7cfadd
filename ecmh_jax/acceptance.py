"""The Metropolis-Hastings ratio of a suffix proposal, as a running sum.

    log A = sum_{s>=t} log_weight'_s - sum_{s>=t} log_weight_s + log c(t|x') - log c(t|x)

over whole suffixes, whatever their lengths. Up to the first divergence d of the two traces the
weights are equal and cancel, so both sums start at d. The ratio is kept token by token: while every
log-weight is <= 0 (``token_law.weights_are_bounded``) its running value can only fall, and once it
is below log u the proposal is rejected whatever follows (certain rejection). For one chain; callers
vmap.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ecmh_jax import cut as cut_lib


class RunningRatio(NamedTuple):
    """log A of a proposal as far as it is drawn; scalars of one chain, float32 nats.

    Attributes:
      log_reverse: what is fixed: - sum_{s>=d} log_weight_s - log c(t|x).
      log_weight_sum: sum of log_weight'_s over the slots drawn since d.
      log_cut_weight: log w_t, the same number for both traces.
      log_cut_total: log of the sum of the proposal's cut weights so far.
      entropy_before: entropy at the slot before the next one.
    """

    log_reverse: jax.Array
    log_weight_sum: jax.Array
    log_cut_weight: jax.Array
    log_cut_total: jax.Array
    entropy_before: jax.Array


def begin(
    log_weight: jax.Array,
    entropy: jax.Array,
    law: cut_lib.CutLaw,
    log_cut_probability: jax.Array,
    cut_slot: jax.Array,
    divergence_slot: jax.Array,
    length: jax.Array,
) -> RunningRatio:
    """Starts the ratio of a proposal that leaves the current trace at ``divergence_slot``.

    Args:
      log_weight: [T] current trace's log-weights by slot.
      entropy: [T] its entropies by slot.
      law: its cut law.
      log_cut_probability: log c(t|x).
      cut_slot: int32, slot of the cut t.
      divergence_slot: int32, slot of the first divergence d, ``cut_slot <= d < length``; a null
        move has none, and its ratio is not used.
      length: int32, live slots of the current trace.
    """
    slots = jnp.arange(log_weight.shape[0])
    left_behind = (slots >= divergence_slot) & (slots < length)
    shared = jnp.where(slots < divergence_slot, law.log_weights, -jnp.inf)
    return RunningRatio(
        log_reverse=-jnp.sum(jnp.where(left_behind, log_weight, 0.0)) - log_cut_probability,
        log_weight_sum=jnp.zeros((), jnp.float32),
        log_cut_weight=law.log_weights[cut_slot],
        log_cut_total=jax.nn.logsumexp(shared),
        entropy_before=jnp.where(divergence_slot > 0, entropy[divergence_slot - 1], 0.0),
    )


def extend(
    ratio: RunningRatio,
    log_weight: jax.Array,
    entropy: jax.Array,
    cut_power: jax.Array,
) -> RunningRatio:
    """Adds the proposal's next token, given its log-weight and entropy; it may always be cut."""
    added = cut_lib.log_cut_weight(entropy - ratio.entropy_before, cut_power)
    return ratio._replace(
        log_weight_sum=ratio.log_weight_sum + log_weight,
        log_cut_total=jnp.logaddexp(ratio.log_cut_total, added),
        entropy_before=entropy,
    )


def log_ratio(ratio: RunningRatio, num_cuts: jax.Array, uniform_mix: jax.Array) -> jax.Array:
    """Log A of the proposal as drawn so far, of which ``num_cuts`` slots may be cut."""
    log_cut = cut_lib.log_cut_probability(
        ratio.log_cut_weight, ratio.log_cut_total, num_cuts, uniform_mix
    )
    return ratio.log_reverse + ratio.log_weight_sum + log_cut
