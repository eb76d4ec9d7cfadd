"""Stagewise sequential Monte Carlo for p^power.

The baseline of arXiv:2605.30327 with weights that are right: the published code takes the weight of
the whole trajectory at every stage and keeps it after resampling, so that ancestors count twice.

    for stage in 1..num_stages:
        extend every particle by stage_length tokens from q, or to end-of-sequence
        w_i = prod over the tokens of this stage of p^power / q;   Z <- Z sum_i W_i w_i
        W_i <- W_i w_i / sum_j W_j w_j
        if (sum W)^2 / sum W^2 < resample_below * N and some particle is unfinished:
            resample systematically;   W_i <- 1/N
    draw the trace by weight

The law of the trace tends to p^power on the completions of the last stage as N grows; weighted with
Z it is unbiased for every N: E[Z f(x)] = sum_x p(x)^power f(x).
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from ecmh_jax import ecmh, particles, random_keys, transition
from ecmh_jax.base import Config, LanguageModel, Params, Result, State
from ecmh_jax.rounds import Batch, Rounds, repeat

Info = particles.Info


@dataclasses.dataclass(frozen=True)
class Options:
    """Static settings.

    Attributes:
      num_particles: N, particles of one result, >= 1.
      resample_below: share of N, 0..1, below which the effective sample size causes resampling;
        0 never resamples.
    """

    num_particles: int = 64
    resample_below: float = 0.5


def check_options(options: Options) -> None:
    """Raises ValueError where a setting is out of range."""
    particles.check_options(options.num_particles, options.resample_below)


def rows_per_chain(options: Options) -> int:
    """Rows of the batch that one result needs: its particles."""
    return options.num_particles


class _Carry(NamedTuple):
    """Particles between two stages: rows [B * N] and their weights."""

    state: State
    population: particles.Population


def build(model: LanguageModel, config: Config, options: Options) -> Rounds:
    """Returns the sampler, one stage a round.

    Args:
      model: the language model.
      config: the run; its Metropolis-Hastings steps play no part.
      options: the particles. The proposal q is that of each result's tuning; cuts play no part.

    Returns:
      Its functions; ``info`` is ``particles.Info`` with S = ``config.num_stages``.
    """
    num_particles = options.num_particles
    extend = ecmh.build_extend(model, config)

    def group_draws(rng_key, batch: Batch, stage, position):
        keys = random_keys.chain_keys(rng_key, batch.prompt_ids, batch.chain_ids)
        stages = jnp.broadcast_to(stage, keys.shape)
        keys = random_keys.step_keys(keys, stages, jnp.zeros_like(stages))
        return random_keys.group_uniform(keys, position)

    def begin(rng_key, params: Params, batch: Batch) -> _Carry:
        del rng_key
        state = ecmh.init_batch(model, params, batch, config)
        return _Carry(
            particles.spawn(state, num_particles),
            particles.start(batch.prompts.shape[0], num_particles),
        )

    def advance(rng_key, params: Params, batch: Batch, carry: _Carry, index):
        state, population = carry
        stage = index + 1
        tuning = repeat(batch.tuning, num_particles)
        previous_length = state.trace.length
        state = extend(rng_key, state, params, tuning)
        population = particles.reweight(
            population,
            particles.log_increment(
                state.trace,
                previous_length,
                state.finite,
                tuning.power,
                tuning.power,
                tuning.power,
            ),
        )
        ess = particles.effective_sample_size(population.log_weights)
        unfinished = ~state.frozen & ~transition.has_ended(state, config)
        due = (
            (ess < options.resample_below * num_particles)
            & particles.any_of_group(unfinished, num_particles)
            & (stage < config.num_stages)
        )
        uniform = group_draws(rng_key, batch, stage, stage * config.stage_length)
        population, rows = particles.resample(population, due, uniform)
        # Who a row is and what it cost stay with the row.
        trace, cache, frozen, finite = particles.take_rows(
            (state.trace, state.cache, state.frozen, state.finite), rows
        )
        state = state._replace(trace=trace, cache=cache, frozen=frozen, finite=finite)
        return _Carry(state, population), (ess, due)

    def finish(rng_key, batch: Batch, carry: _Carry, records) -> Result:
        uniform = group_draws(rng_key, batch, config.num_stages, particles.CHOICE)
        return particles.finish(*carry, uniform, *records)

    return Rounds(
        config.num_stages, begin, advance, finish, lambda carry: carry.state.stats.decoded
    )
