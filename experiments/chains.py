"""From prompts to chains that a queue can run: their layout, their checks, their programs."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import checks, compiled, ecmh, engine, group_sampling
from ecmh_jax.base import Config, Tuning
from ecmh_jax.chain_queue import Chains
from ecmh_jax.engine import Arrivals
from ecmh_jax.rounds import Batch
from experiments.prompts import EncodedPrompts
from models.load import LoadedModel

STEPS_PER_TICK = 4  # decode steps between two looks of the host; changes no token


def lay_out(prompts: EncodedPrompts, num_chains: int, tuning: Tuning) -> Chains:
    """Lays out ``num_chains`` chains of every prompt, those of one prompt side by side.

    Args:
      prompts: the prompts; their places in it are the prompt ids.
      num_chains: chains of each prompt, numbered from 0.
      tuning: numbers of all the chains, each [number of prompts x num_chains].
    """
    num_prompts = len(prompts.lengths)
    prompt_ids = np.repeat(np.arange(num_prompts, dtype=np.int32), num_chains)
    return Chains(
        prompts=prompts.tokens[prompt_ids],
        prompt_lengths=prompts.lengths[prompt_ids],
        prompt_ids=prompt_ids,
        chain_ids=np.tile(np.arange(num_chains, dtype=np.int32), num_prompts),
        tuning=tuning,
    )


def check(model: LoadedModel, prompts: EncodedPrompts, config: Config) -> None:
    """Raises ValueError unless chains of the prompts can run on this model."""
    checks.check_config(config)
    vocabulary_size = checks.check_vocabulary(
        model.language_model, model.params, config, len(prompts.lengths)
    )
    checks.check_prompts(prompts.tokens, prompts.lengths, config, vocabulary_size)
    if config.num_slots > model.config.longest_length:
        raise ValueError(
            f"the longest prompt takes {config.prompt_length} slots and --max_new_tokens is "
            f"{config.max_new_tokens}, {config.num_slots} together; expected at most "
            f"{model.config.longest_length}, the context of {model.name}: lower --max_new_tokens"
        )


def compile_programs(
    rng_key: jax.Array,
    model: LoadedModel,
    config: Config,
    num_slots: int,
    steps_per_tick: int = STEPS_PER_TICK,
) -> float:
    """Compiles what a queue of ``num_slots`` slots will call, so that its time is known apart.

    The calls find the programs: JAX keeps them by function, static arguments and shapes.

    Returns:
      Seconds.
    """
    started = time.perf_counter()
    language_model = model.language_model
    static = {"model": language_model, "config": config}
    number, prompt = _abstract((), jnp.int32), _abstract((config.prompt_length,), jnp.int32)
    compiled.init_slots.lower(**static, num_slots=num_slots).compile()
    compiled.prefill.lower(model.params, prompt, number, **static).compile()

    slots = jax.eval_shape(lambda: engine.init_slots(language_model, num_slots, config))
    cache = jax.eval_shape(
        lambda params, prompt, length: ecmh.prefill(language_model, params, prompt, length, config),
        model.params,
        prompt,
        number,
    )
    whole, real, flag = (_abstract((num_slots,), dtype) for dtype in (jnp.int32, jnp.float32, bool))
    tuning = Tuning(real, real, real, real)
    arrivals = Arrivals(flag, cache, prompt, number, whole, whole, tuning)
    compiled.admit.lower(slots, arrivals, config=config).compile()
    arguments = rng_key, slots, model.params, flag
    compiled.tick.lower(*arguments, **static, num_steps=steps_per_tick).compile()
    compiled.collect.lower(slots, number).compile()
    return time.perf_counter() - started


def compile_rounds(
    rng_key: jax.Array,
    model: LoadedModel,
    chains: Chains,
    config: Config,
    sampler: str,
    options: Any,
    num_slots: int,
    budget: np.ndarray | None = None,
) -> float:
    """Compiles what ``group_sampling.run_groups`` will call; its arguments.

    Returns:
      Seconds.
    """
    started = time.perf_counter()
    module = group_sampling.GROUP_SAMPLERS[sampler].module
    size = group_sampling.group_size(sampler, options, len(chains.prompts), num_slots)
    whole, real = _abstract((size,), jnp.int32), _abstract((size,), jnp.float32)
    batch = Batch(
        prompts=_abstract((size, config.prompt_length), jnp.int32),
        prompt_lengths=whole,
        prompt_ids=whole,
        chain_ids=whole,
        tuning=Tuning(real, real, real, real),
        budget=None if budget is None else whole,
    )
    language_model = model.language_model
    static = {"build": module.build, "model": language_model, "config": config, "options": options}
    begin = compiled.begin_rounds.lower(rng_key, model.params, batch, **static)
    begin.compile()
    carry, index = _as_abstract(begin.out_info), _abstract((), jnp.int32)
    advance = compiled.advance_round.lower(rng_key, model.params, batch, carry, index, **static)
    advance.compile()
    carry, record, _ = _as_abstract(advance.out_info)
    num_rounds = module.build(language_model, config, options).num_rounds
    records = jax.tree.map(lambda leaf: _abstract((num_rounds, *leaf.shape), leaf.dtype), record)
    compiled.finish_rounds.lower(rng_key, batch, carry, records, **static).compile()
    return time.perf_counter() - started


def _as_abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: _abstract(leaf.shape, leaf.dtype), tree)


def _abstract(shape: tuple[int, ...], dtype: Any) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)
