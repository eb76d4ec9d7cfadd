"""The only place that compiles and donates. Everything else runs under ``jax.disable_jit()``.

The model and the configuration are static: one program for each pair of them and batch shape,
whatever the weights and the tuning. A model is known by its functions' identity: build it once.
A state that is passed to ``extend`` or ``kernel`` is consumed, and so are slots and carries.
"""

import functools

import jax

from ecmh_jax import ecmh, engine


@functools.partial(jax.jit, static_argnames=("model", "config"))
def init(model, params, prompts, prompt_lengths, prompt_ids, chain_ids, config):
    """Compiled ``ecmh.init``."""
    return ecmh.init(model, params, prompts, prompt_lengths, prompt_ids, chain_ids, config)


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames=("state",))
def extend(rng_key, state, params, tuning, *, model, config):
    """Compiled ``ecmh.build_extend``."""
    return ecmh.build_extend(model, config)(rng_key, state, params, tuning)


@functools.partial(jax.jit, static_argnames=("model", "config"), donate_argnames=("state",))
def kernel(rng_key, state, params, tuning, *, model, config):
    """Compiled ``ecmh.build_kernel``."""
    return ecmh.build_kernel(model, config)(rng_key, state, params, tuning)


@functools.partial(jax.jit, static_argnames=("model", "config"))
def run(rng_key, params, prompts, prompt_lengths, prompt_ids, chain_ids, tuning, *, model, config):
    """Compiled ``ecmh.run``."""
    return ecmh.run(
        rng_key,
        model,
        params,
        prompts,
        prompt_lengths,
        prompt_ids,
        chain_ids,
        tuning,
        config,
    )


_STATIC_ROUNDS = ("build", "model", "config", "options")


@functools.partial(jax.jit, static_argnames=_STATIC_ROUNDS)
def begin_rounds(rng_key, params, batch, *, build, model, config, options):
    """Compiled ``rounds.Rounds.begin``."""
    return build(model, config, options).begin(rng_key, params, batch)


@functools.partial(jax.jit, static_argnames=_STATIC_ROUNDS, donate_argnames=("carry",))
def advance_round(rng_key, params, batch, carry, index, *, build, model, config, options):
    """Compiled ``rounds.Rounds.advance``; returns the tokens decoded so far [] int32 too."""
    rounds = build(model, config, options)
    carry, record = rounds.advance(rng_key, params, batch, carry, index)
    return carry, record, rounds.decoded(carry).sum()


@functools.partial(jax.jit, static_argnames=_STATIC_ROUNDS)
def finish_rounds(rng_key, batch, carry, records, *, build, model, config, options):
    """Compiled ``rounds.Rounds.finish``."""
    return build(model, config, options).finish(rng_key, batch, carry, records)


@functools.partial(jax.jit, static_argnames=("model", "config"))
def prefill(params, prompt, prompt_length, *, model, config):
    """Compiled ``ecmh.prefill``."""
    return ecmh.prefill(model, params, prompt, prompt_length, config)


@functools.partial(jax.jit, static_argnames=("model", "num_slots", "config"))
def init_slots(*, model, num_slots, config):
    """Compiled ``engine.init_slots``."""
    return engine.init_slots(model, num_slots, config)


@functools.partial(jax.jit, static_argnames=("config",), donate_argnames=("slots",))
def admit(slots, arrivals, *, config):
    """Compiled ``engine.build_admit``."""
    return engine.build_admit(config)(slots, arrivals)


@functools.partial(
    jax.jit, static_argnames=("model", "config", "num_steps"), donate_argnames=("slots",)
)
def tick(rng_key, slots, params, helpers, *, model, config, num_steps):
    """Compiled ``engine.build_tick``."""
    return engine.build_tick(model, config, num_steps)(rng_key, slots, params, helpers)


@jax.jit
def collect(slots, row):
    """Compiled ``engine.collect``."""
    return engine.collect(slots, row)
