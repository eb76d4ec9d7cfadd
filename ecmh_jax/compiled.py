"""The only place that compiles and donates. Everything else runs under ``jax.disable_jit()``.

The model and the configuration are static: one program for each pair of them and batch shape,
whatever the weights and the tuning. A model is known by its functions' identity: build it once.
A state that is passed to ``extend`` or ``kernel`` is consumed.
"""

import functools

import jax

from ecmh_jax import ecmh


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
