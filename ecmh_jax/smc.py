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

import jax
import jax.numpy as jnp

from ecmh_jax import ecmh, particles, random_keys, transition
from ecmh_jax.base import Config, LanguageModel, Params, Result, Tuning

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


def run(
    rng_key,
    model: LanguageModel,
    params: Params,
    prompts,
    prompt_lengths,
    prompt_ids,
    chain_ids,
    tuning: Tuning,
    config: Config,
    options: Options,
) -> Result:
    """Runs the schedule and draws one trace a result.

    Args:
      rng_key: scalar typed key, the run's seed.
      model: the language model.
      params: its weights.
      prompts: [B, P] int32, padded on the right.
      prompt_lengths: [B] int32, 1..P.
      prompt_ids: [B] int32 and
      chain_ids: [B] int32: identity of each result, which determines its draws.
      tuning: per-result numbers; the proposal q is theirs, cuts play no part.
      config: the run; its Metropolis-Hastings steps play no part.
      options: the particles.

    Returns:
      B results with ``particles.Info``, S = ``config.num_stages``.
    """
    num_particles = options.num_particles
    extend = ecmh.build_extend(model, config)
    group_keys = random_keys.chain_keys(rng_key, prompt_ids, chain_ids)
    state = ecmh.init(model, params, prompts, prompt_lengths, prompt_ids, chain_ids, config)
    state, tuning = particles.spawn(state, tuning, num_particles)
    population = particles.start(prompts.shape[0], num_particles)

    def group_draws(stage, position):
        stages = jnp.broadcast_to(stage, group_keys.shape)
        keys = random_keys.step_keys(group_keys, stages, jnp.zeros_like(stages))
        return random_keys.group_uniform(keys, position)

    def take_stage(carry, stage):
        state, population = carry
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
        uniform = group_draws(stage, stage * config.stage_length)
        population, rows = particles.resample(population, due, uniform)
        # Who a row is and what it cost stay with the row.
        trace, cache, frozen, finite = particles.take_rows(
            (state.trace, state.cache, state.frozen, state.finite), rows
        )
        state = state._replace(trace=trace, cache=cache, frozen=frozen, finite=finite)
        return (state, population), (ess, due)

    stages = jnp.arange(1, config.num_stages + 1)
    (state, population), (ess, resampled) = jax.lax.scan(take_stage, (state, population), stages)
    uniform = group_draws(config.num_stages, particles.CHOICE)
    return particles.finish(state, population, uniform, ess, resampled)
