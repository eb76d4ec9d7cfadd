"""Weighted particles: what the sequential Monte Carlo samplers share.

A result is carried by N particles, neighbouring rows of the batch that decodes: ``B`` results are
``B * N`` rows, and group operations see ``[B, N]``. Each particle has a trace and a normalised
weight W. When the target grows from gamma to gamma' and a particle draws tokens from q,

    w_i = gamma'(x_i) / (gamma(x_i) q(tokens drawn)),    Z' = Z sum_i W_i w_i,    W'_i ~ W_i w_i

and ``E[Z' f(x)] = sum_x gamma'(x) f(x)`` for x drawn by weight, whatever N and whenever particles
were resampled (Del Moral, Doucet & Jasra 2006; Chopin & Papaspiliopoulos 2020, chapter 10).
"""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from ecmh_jax import rounds, token_law
from ecmh_jax.base import Result, State, Trace

CHOICE = 0  # position of the group's final draw; the others count tokens, from 1


class Population(NamedTuple):
    """The weights of the particles of each result.

    Attributes:
      log_weights: [B, N] float32, log W: their exponentials sum to 1; -inf for a particle whose
        logits were not finite, and for all once none is left.
      log_evidence: [B] float32 nats, log Z of the target so far.
      ancestor: [B, N] int32, the first particle, 0..N-1, that each one descends from.
    """

    log_weights: jax.Array
    log_evidence: jax.Array
    ancestor: jax.Array


class Info(NamedTuple):
    """What the particles of each result did. S are the moments at which resampling is considered.

    Attributes:
      log_evidence: [B] float32 nats: exp of it is an unbiased estimate of
        Z = sum_x p(x)^power over the completions of the last stage; -inf if every particle failed.
      ess: [S, B] float32, effective sample size before resampling, 1..N; 0 where every particle
        failed or nothing was drawn any more.
      resampled: [S, B] bool.
      num_ancestors: [B] int32, particles of the first moment from which the last ones descend.
      log_weights: [B, N] float32, normalised, those of the final draw.
      chosen: [B] int32, the particle in 0..N-1 whose trace is the result.
    """

    log_evidence: jax.Array
    ess: jax.Array
    resampled: jax.Array
    num_ancestors: jax.Array
    log_weights: jax.Array
    chosen: jax.Array


def check_options(num_particles: int, resample_below: float) -> None:
    """Raises ValueError unless there is a particle and the threshold is a share of them."""
    if not isinstance(num_particles, int) or num_particles < 1:
        raise ValueError(f"num_particles is {num_particles!r}; expected an integer of at least 1")
    if not 0.0 <= resample_below <= 1.0:
        raise ValueError(
            f"resample_below is {resample_below!r}; expected a share of the particles in 0..1"
        )


def start(batch_size: int, num_particles: int) -> Population:
    """Particles with empty completions: equal weights, and Z = 1."""
    shape = (batch_size, num_particles)
    return Population(
        log_weights=equal_log_weights(shape),
        log_evidence=jnp.zeros((batch_size,), jnp.float32),
        ancestor=jnp.broadcast_to(jnp.arange(num_particles, dtype=jnp.int32)[None], shape),
    )


def equal_log_weights(shape: tuple[int, int]) -> jax.Array:
    """Returns log 1/N in ``shape`` [B, N]."""
    return jnp.full(shape, -jnp.log(float(shape[1])), jnp.float32)


def spawn(state: State, num_particles: int) -> State:
    """Repeats every row [B] for its particles [B * N]; each draws tokens of its own.

    Particle i of chain c is chain ``c * N + i`` to the random numbers of tokens.
    """
    state = rounds.repeat(state, num_particles)
    particle = jnp.arange(state.chain_id.shape[0], dtype=jnp.int32) % num_particles
    return state._replace(chain_id=state.chain_id * num_particles + particle)


def log_increment(
    trace: Trace,
    previous_length: jax.Array,
    finite: jax.Array,
    power: jax.Array,
    target_power: jax.Array,
    previous_power: jax.Array,
) -> jax.Array:
    """Log of the weight that each row gains by the tokens from slot ``previous_length`` on.

    From the target p^previous_power of the shorter traces to p^target_power of the longer ones:

        sum over new tokens of (target_power log p - log q)
        + (target_power - previous_power) * sum over earlier tokens of log p

    A completion that had ended has no new tokens: at constant power it gains nothing, log 1.

    Args:
      trace: [B * N, ...], with ``log_weight`` at the full ``power``.
      previous_length: [B * N] int32.
      finite: [B * N] bool; a row that failed gains -inf.
      power: [B * N] float32, alpha.
      target_power: [B * N] float32 and
      previous_power: [B * N] float32.

    Returns:
      [B * N] float32 nats.
    """
    chex.assert_equal_shape([previous_length, finite, power, target_power, previous_power])
    new = jnp.arange(trace.tokens.shape[1])[None] >= previous_length[:, None]
    missing_power = (target_power - power)[:, None]
    tokens = jnp.where(new, trace.log_weight + missing_power * trace.log_prob, 0.0).sum(axis=-1)
    earlier = jnp.where(new, 0.0, trace.log_prob).sum(axis=-1)
    return jnp.where(finite, tokens + (target_power - previous_power) * earlier, -jnp.inf)


def reweight(population: Population, log_increments: jax.Array) -> Population:
    """Multiplies the weights by their increments and moves their sum into the evidence.

    Args:
      population: with normalised weights [B, N].
      log_increments: [B * N] or [B, N] float32 nats.
    """
    log_weights = population.log_weights
    log_weights = log_weights + log_increments.reshape(log_weights.shape)
    log_total = jax.nn.logsumexp(log_weights, axis=-1)
    # Where every particle failed there is nothing to normalise by.
    shift = jnp.where(jnp.isneginf(log_total), 0.0, log_total)
    return population._replace(
        log_weights=log_weights - shift[:, None],
        log_evidence=population.log_evidence + log_total,
    )


def effective_sample_size(log_weights: jax.Array) -> jax.Array:
    """(sum w)^2 / sum w^2, [B] in 1..N, of normalised weights [B, N]; 0 where all are 0."""
    weights = jnp.exp(log_weights)
    total, squares = weights.sum(axis=-1), jnp.square(weights).sum(axis=-1)
    return jnp.where(total > 0, jnp.square(total) / jnp.maximum(squares, 1e-30), 0.0)


def any_of_group(rows: jax.Array, num_particles: int) -> jax.Array:
    """Whether any particle of a result is set: [B * N] bool -> [B] bool."""
    return rows.reshape(-1, num_particles).any(axis=-1)


def systematic_ancestors(log_weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Systematic resampling: particle i is a copy of where (i + u) / N falls among the weights.

    Every particle has N W copies on average, and in fact that number rounded up or down
    (Carpenter, Clifford & Fearnhead 1999).

    Args:
      log_weights: [B, N] float32, of which some are finite.
      uniform: [B] float32 in [0, 1), one for all particles of a result.

    Returns:
      [B, N] int32 in 0..N-1, rising; never a particle without weight.
    """
    batch_size, num_particles = log_weights.shape
    chex.assert_shape(uniform, (batch_size,))
    points = (jnp.arange(num_particles)[None] + uniform[:, None]) / num_particles
    ancestors = jax.vmap(token_law.invert_distribution, in_axes=(None, 1), out_axes=1)(
        jnp.exp(log_weights), points
    )
    return ancestors.astype(jnp.int32)


def resample(
    population: Population, due: jax.Array, uniform: jax.Array
) -> tuple[Population, jax.Array]:
    """Copies particles by weight where it is due, after which their weights are equal.

    Args:
      population: the particles.
      due: [B] bool, the results whose particles are resampled; the others stay as they are.
      uniform: [B] float32 in [0, 1).

    Returns:
      The population, and for every row the row that it becomes a copy of, [B * N] int32.
    """
    batch_size, num_particles = population.log_weights.shape
    stay = jnp.broadcast_to(jnp.arange(num_particles)[None], (batch_size, num_particles))
    ancestors = jnp.where(due[:, None], systematic_ancestors(population.log_weights, uniform), stay)
    first_rows = jnp.arange(batch_size)[:, None] * num_particles
    population = population._replace(
        log_weights=jnp.where(
            due[:, None],
            equal_log_weights((batch_size, num_particles)),
            population.log_weights,
        ),
        ancestor=jnp.take_along_axis(population.ancestor, ancestors, axis=1),
    )
    return population, (first_rows + ancestors).reshape(-1)


def take_rows(tree, rows: jax.Array):
    """Takes ``rows`` of every leaf, whose leading axis is that of the batch."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), tree)


def finish(
    state: State,
    population: Population,
    uniform: jax.Array,
    ess: jax.Array,
    resampled: jax.Array,
) -> Result:
    """Draws the trace of each result by weight and sums what its particles cost.

    Args:
      state: [B * N] rows.
      population: their weights.
      uniform: [B] float32 in [0, 1).
      ess: [S, B] and
      resampled: [S, B], the records for ``Info``.

    Returns:
      B results; ``finite`` is False where every particle failed.
    """
    batch_size, num_particles = population.log_weights.shape
    chosen = token_law.invert_distribution(jnp.exp(population.log_weights), uniform)
    rows = jnp.arange(batch_size) * num_particles + chosen
    descends = population.ancestor[:, :, None] == jnp.arange(num_particles)[None, None]
    trace, finite = take_rows((state.trace, state.finite), rows)
    return Result(
        trace=trace,
        stats=jax.tree.map(
            lambda count: count.reshape(batch_size, num_particles).sum(axis=-1), state.stats
        ),
        finite=finite,
        info=Info(
            log_evidence=population.log_evidence,
            ess=ess,
            resampled=resampled,
            num_ancestors=descends.any(axis=1).sum(axis=-1),
            log_weights=population.log_weights,
            chosen=chosen.astype(jnp.int32),
        ),
    )
