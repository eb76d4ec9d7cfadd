"""Power-SMC (arXiv:2602.10273): sequential Monte Carlo for p^power, token by token.

    for token s in 1..max_new_tokens, until every particle has ended:
        draw a token of every unfinished particle from q
        w_i = p(x_s)^alpha_s / q(x_s) * p(x_<s)^(alpha_s - alpha_{s-1});   Z <- Z sum_i W_i w_i
        W_i <- W_i w_i / sum_j W_j w_j
        if (sum W)^2 / sum W^2 < resample_below * N and some particle is unfinished:
            resample systematically;   W_i <- 1/N
    draw the trace by weight

alpha_s rises linearly from 1 to ``power`` over the first ``ramp_tokens`` tokens. The target after s
tokens is p^alpha_s on whole prefixes, those that have ended included. The last target is always
p^power: a result whose particles have all ended earlier takes the rest of the ramp in one step,
w_i = p(x)^(power - alpha_s), before its trace is drawn. Exactness is that of ``smc``: unbiased with
Z for every N, p^power itself as N grows.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ecmh_jax import ecmh, particles, random_keys, suffix, transition
from ecmh_jax.base import Cache, Config, LanguageModel, Params, Result, State
from ecmh_jax.particles import Population
from ecmh_jax.rounds import Batch, Rounds, repeat
from ecmh_jax.suffix import Plan, Suffix

Info = particles.Info


@dataclasses.dataclass(frozen=True)
class Options:
    """Static settings.

    Attributes:
      num_particles: N, particles of one result, >= 1.
      resample_below: share of N, 0..1, below which the effective sample size causes resampling;
        0 never resamples.
      ramp_tokens: tokens over which the target's exponent rises from 1 to ``power``, >= 0; 0 is
        ``power`` from the first token on.
    """

    num_particles: int = 64
    resample_below: float = 0.5
    ramp_tokens: int = 0


def check_options(options: Options) -> None:
    """Raises ValueError where a setting is out of range."""
    particles.check_options(options.num_particles, options.resample_below)
    if not isinstance(options.ramp_tokens, int) or options.ramp_tokens < 0:
        raise ValueError(
            f"ramp_tokens is {options.ramp_tokens!r}; expected an integer of at least 0"
        )


def rows_per_chain(options: Options) -> int:
    """Rows of the batch that one result needs: its particles."""
    return options.num_particles


def ramped_power(power: jax.Array, num_tokens: int | jax.Array, ramp_tokens: int) -> jax.Array:
    """The target's exponent alpha_s after s = ``num_tokens`` tokens; ``power`` [B], float32."""
    share = jnp.minimum(num_tokens / max(ramp_tokens, 1), 1.0)
    return jnp.where(num_tokens >= ramp_tokens, power, 1.0 + (power - 1.0) * share)


class Progress(NamedTuple):
    """Particles under way.

    Attributes:
      state: [B * N] rows before their first token, without a cache.
      plan: their only move.
      drawn: the completions so far.
      cache: theirs.
      population: their weights.
      target_power: [B] float32, alpha_s.
      num_tokens: int32, s.
      due: [B] bool, results whose particles must be resampled before the next token.
      ess: [max_new_tokens, B] and
      resampled: [max_new_tokens, B], the records for ``Info``.
    """

    state: State
    plan: Plan
    drawn: Suffix
    cache: Cache
    population: Population
    target_power: jax.Array
    num_tokens: jax.Array
    due: jax.Array
    ess: jax.Array
    resampled: jax.Array


def build(model: LanguageModel, config: Config, options: Options) -> Rounds:
    """Returns the sampler; a round is as many tokens as a stage, and stages play no other part.

    Args:
      model: the language model.
      config: the run; its Metropolis-Hastings steps play no part.
      options: the particles. The proposal q is that of each result's tuning; cuts play no part.

    Returns:
      Its functions; ``info`` is ``particles.Info`` with S = ``config.max_new_tokens``.
    """
    round_tokens, num_rounds = config.stage_length, config.num_stages
    config = dataclasses.replace(config, num_stages=1)
    num_particles = options.num_particles

    def group_draws(rng_key, batch: Batch, position):
        keys = random_keys.chain_keys(rng_key, batch.prompt_ids, batch.chain_ids)
        only_stage = jnp.ones_like(batch.prompt_ids)
        keys = random_keys.step_keys(keys, only_stage, jnp.zeros_like(only_stage))
        return random_keys.group_uniform(keys, position)

    def begin(rng_key, params: Params, batch: Batch) -> Progress:
        state = ecmh.init_batch(model, params, batch, config)
        state = transition.enter_stage(particles.spawn(state, num_particles), config)
        keys = transition.step_keys(rng_key, state)
        plan, drawn = transition.begin_extension(keys, state, config)
        batch_size = batch.prompts.shape[0]
        return Progress(
            state=state._replace(cache=()),
            plan=plan,
            drawn=drawn,
            cache=state.cache,
            population=particles.start(batch_size, num_particles),
            target_power=ramped_power(batch.tuning.power, 0, options.ramp_tokens),
            num_tokens=jnp.zeros((), jnp.int32),
            due=jnp.zeros((batch_size,), bool),
            ess=jnp.zeros((config.max_new_tokens, batch_size), jnp.float32),
            resampled=jnp.zeros((config.max_new_tokens, batch_size), bool),
        )

    def draw_token(params: Params, batch: Batch, progress: Progress) -> Progress:
        tuning = repeat(batch.tuning, num_particles)
        earlier = progress.drawn
        drawn, cache = suffix.draw_one(
            model,
            config,
            params,
            tuning,
            progress.state.trace,
            progress.state.prompt_length,
            progress.plan,
            earlier,
            progress.cache,
        )
        num_tokens = progress.num_tokens + 1
        was_unfinished = particles.any_of_group(~earlier.done, num_particles)
        unfinished = particles.any_of_group(~drawn.done, num_particles)
        target_power = jnp.where(
            was_unfinished,
            ramped_power(batch.tuning.power, num_tokens, options.ramp_tokens),
            progress.target_power,
        )
        log_increments = particles.log_increment(
            drawn.trace,
            earlier.trace.length,
            drawn.finite,
            tuning.power,
            jnp.repeat(target_power, num_particles),
            jnp.repeat(progress.target_power, num_particles),
        )
        # A result that has ended is left alone, lest its last bits depend on its neighbours.
        population = transition.select(
            was_unfinished,
            particles.reweight(progress.population, log_increments),
            progress.population,
        )
        ess = particles.effective_sample_size(population.log_weights)
        due = (ess < options.resample_below * num_particles) & unfinished
        moment = progress.num_tokens
        return progress._replace(
            drawn=drawn,
            cache=cache,
            population=population,
            target_power=target_power,
            num_tokens=num_tokens,
            due=due,
            ess=progress.ess.at[moment].set(jnp.where(was_unfinished, ess, 0.0)),
            resampled=progress.resampled.at[moment].set(due),
        )

    def resample(rng_key, batch: Batch, progress: Progress) -> Progress:
        uniform = group_draws(rng_key, batch, progress.num_tokens)
        population, rows = particles.resample(progress.population, progress.due, uniform)
        drawn = progress.drawn
        # The keys and the cost stay with the row.
        trace, done, finite, cache = particles.take_rows(
            (drawn.trace, drawn.done, drawn.finite, progress.cache), rows
        )
        return progress._replace(
            drawn=drawn._replace(trace=trace, done=done, finite=finite),
            cache=cache,
            population=population,
            due=jnp.zeros_like(progress.due),
        )

    def advance(rng_key, params: Params, batch: Batch, progress: Progress, index):
        last = (index + 1) * round_tokens

        def has_tokens(progress: Progress):
            return ~progress.drawn.done.all() & (progress.num_tokens < last)

        # Two loops, because a copy of the cache inside the inner one, even under a condition that
        # never holds, would be made at every token.
        progress = jax.lax.while_loop(
            has_tokens,
            lambda progress: resample(
                rng_key,
                batch,
                jax.lax.while_loop(
                    lambda progress: has_tokens(progress) & ~progress.due.any(),
                    lambda progress: draw_token(params, batch, progress),
                    progress,
                ),
            ),
            progress,
        )
        return progress, ()

    def finish(rng_key, batch: Batch, progress: Progress, records) -> Result:
        del records  # they are by token, and in the carry
        state, _, _ = transition.settle(progress.state, progress.plan, progress.drawn, config)
        power = repeat(batch.tuning.power, num_particles)
        # Nothing else ends the ramp of a result whose last unfinished particle was not resampled.
        rest_of_ramp = particles.log_increment(
            state.trace,
            state.trace.length,
            state.finite,
            power,
            power,
            jnp.repeat(progress.target_power, num_particles),
        )
        population = particles.reweight(progress.population, rest_of_ramp)
        uniform = group_draws(rng_key, batch, particles.CHOICE)
        return particles.finish(state, population, uniform, progress.ess, progress.resampled)

    return Rounds(num_rounds, begin, advance, finish, lambda progress: progress.drawn.decoded)
