"""Entropy-Cut Metropolis-Hastings (arXiv:2605.30327), the exact lockstep form.

A run is a schedule of stages. Stage k extends every chain to the horizon of k blocks with the
proposal law q and then takes Metropolis-Hastings steps on completions that end in end-of-sequence
within the horizon or fill it:

    for stage in 1..num_stages:
        extend the chains that have not ended to stage * stage_length tokens
        for step in 1..steps_per_stage:
            draw a cut t from c(t | x), where next-token entropy jumps up
            redraw the suffix from t with q, to end-of-sequence or the horizon -> x'
            accept with probability min(1, A)

Every chain of the batch takes the same step at the same time. This is the reference that faster
engines are compared with, token for token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ecmh_jax import suffix, transition
from ecmh_jax.base import Cache, Config, Info, LanguageModel, Params, Result, State, Tuning
from ecmh_jax.rounds import Batch, Rounds


def prefill(model: LanguageModel, params: Params, prompt, prompt_length, config: Config) -> Cache:
    """Returns the cache of one prompt, with a chain axis of 1.

    One prompt at a time, because the last bits of a product move with its shape: a chain then has
    the same cache however many others start beside it. The prompt's last slot is left out, since
    every draw starts by decoding the token before it.

    Args:
      model: the language model.
      params: its weights.
      prompt: [P] int32, padded on the right.
      prompt_length: int32, 1..P.
      config: the run.
    """
    cache = model.init_cache(1, config.num_slots)
    if config.prompt_length == 1:
        return cache
    # For a prompt of one token, slot 0 is written here and again by its first draw.
    lengths = jnp.maximum(prompt_length - 1, 1)[None]
    _, cache = model.prefill(params, prompt[None, :-1], lengths, cache)
    return cache


def init(
    model: LanguageModel,
    params: Params,
    prompts,
    prompt_lengths,
    prompt_ids,
    chain_ids,
    config: Config,
) -> State:
    """Prefills the prompts and returns chains with empty completions.

    Args:
      model: the language model.
      params: its weights.
      prompts: [B, P] int32, padded on the right.
      prompt_lengths: [B] int32, 1..P.
      prompt_ids: [B] int32 and
      chain_ids: [B] int32: identity of each chain, which determines its draws.
      config: the run.
    """

    def prefill_one(row):
        prompt, prompt_length = row
        return prefill(model, params, prompt, prompt_length, config)

    caches = jax.lax.map(prefill_one, (prompts, prompt_lengths))
    cache = jax.tree.map(lambda leaf: leaf[:, 0], caches)
    return transition.empty_state(cache, prompts, prompt_lengths, prompt_ids, chain_ids, config)


def build_extend(model: LanguageModel, config: Config):
    """Returns ``extend(rng_key, state, params, tuning) -> state``: enters the next stage.

    Chains that have ended are frozen first unless ``config.refine_finished``; the others draw from
    q up to the new horizon.
    """

    def extend(rng_key, state: State, params: Params, tuning: Tuning) -> State:
        state = transition.enter_stage(state, config)
        keys = transition.step_keys(rng_key, state)
        plan, planned = transition.begin_extension(keys, state, config)
        drawn, cache = suffix.draw_suffix(
            model,
            config,
            params,
            tuning,
            state.trace,
            state.prompt_length,
            plan,
            planned,
            state.cache,
        )
        state, _, _ = transition.settle(state, plan, drawn, config)
        return state._replace(cache=cache)

    return extend


def build_kernel(model: LanguageModel, config: Config):
    """Returns ``kernel(rng_key, state, params, tuning) -> (state, info)``: one step of every chain.

    A reference, simple before fast: it decodes into a copy of the cache and selects by rows.
    The kernel leaves p^power on the completions of the state's stage invariant: it is reversible,
    with A the ratio of ``acceptance``. ``rng_key`` is the run's scalar key, the same at every step:
    the state says which draws are due.
    """

    def kernel(rng_key, state: State, params: Params, tuning: Tuning) -> tuple[State, Info]:
        state = state._replace(step=state.step + 1)
        keys = transition.step_keys(rng_key, state)
        plan, planned = transition.begin_step(keys, state, tuning, config)
        drawn, cache = suffix.draw_suffix(
            model,
            config,
            params,
            tuning,
            state.trace,
            state.prompt_length,
            plan,
            planned,
            state.cache,
        )
        state, moved, info = transition.settle(state, plan, drawn, config)
        return state._replace(cache=transition.select(moved, cache, state.cache)), info

    return kernel


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
) -> Result:
    """Runs the whole schedule as one scan over stages of scans over steps.

    Args:
      rng_key: scalar typed key, the run's seed.
      model: the language model.
      params: its weights.
      prompts: [B, P] int32, padded on the right.
      prompt_lengths: [B] int32, 1..P.
      prompt_ids: [B] int32 and
      chain_ids: [B] int32: identity of each chain.
      tuning: per-chain numbers.
      config: the run.

    Returns:
      The chains after the last step of the last stage.
    """
    enter_stage = build_stage(build_extend(model, config), build_kernel(model, config), config)
    state = init(model, params, prompts, prompt_lengths, prompt_ids, chain_ids, config)
    state, info = jax.lax.scan(
        lambda state, _: enter_stage(rng_key, state, params, tuning),
        state,
        length=config.num_stages,
    )
    return Result(trace=state.trace, stats=state.stats, finite=state.finite, info=info)


def build_stage(
    extend: Callable[..., State], kernel: Callable[..., tuple[State, Any]], config: Config
):
    """Returns ``enter_stage(rng_key, state, params, tuning) -> (state, info)``: a whole stage.

    Args:
      extend: as ``build_extend`` returns.
      kernel: as ``build_kernel`` returns, with a record of its own.
      config: the run.

    Returns:
      The function; the leaves of ``info`` have a leading axis [steps_per_stage].
    """

    def enter_stage(rng_key, state: State, params: Params, tuning: Tuning) -> tuple[State, Any]:
        def take_step(state, _):
            return kernel(rng_key, state, params, tuning)

        state = extend(rng_key, state, params, tuning)
        if config.steps_per_stage == 0:  # a scan of no steps does not run under disable_jit
            _, info = jax.eval_shape(take_step, state, None)
            return state, jax.tree.map(
                lambda field: jnp.zeros((0, *field.shape), field.dtype), info
            )
        return jax.lax.scan(take_step, state, length=config.steps_per_stage)

    return enter_stage


def build_rounds(
    model: LanguageModel, config: Config, enter_stage: Callable[..., tuple[State, Any]]
) -> Rounds:
    """Returns a Metropolis-Hastings sampler whose rounds are its stages.

    Args:
      model: the language model.
      config: the run.
      enter_stage: as ``build_stage`` returns, with a record of its own.
    """

    def begin(rng_key, params, batch: Batch) -> State:
        del rng_key
        return init_batch(model, params, batch, config)

    def advance(rng_key, params, batch: Batch, state: State, index):
        del index  # the state counts its stages
        return enter_stage(rng_key, state, params, batch.tuning)

    def finish(rng_key, batch: Batch, state: State, info) -> Result:
        del rng_key, batch
        return Result(trace=state.trace, stats=state.stats, finite=state.finite, info=info)

    return Rounds(config.num_stages, begin, advance, finish, lambda state: state.stats.decoded)


def init_batch(model: LanguageModel, params: Params, batch: Batch, config: Config) -> State:
    """``init`` of a batch of results."""
    return init(
        model,
        params,
        batch.prompts,
        batch.prompt_lengths,
        batch.prompt_ids,
        batch.chain_ids,
        config,
    )
