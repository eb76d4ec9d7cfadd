"""``sample``: every sampler behind one function of arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import checks
from ecmh_jax.base import Config, LanguageModel, Params, Result, Tuning
from ecmh_jax.chain_queue import Chains, run_queue
from ecmh_jax.engine import Finished
from ecmh_jax.group_sampling import GROUP_SAMPLERS, check_options, sample_groups

CHAIN_SAMPLERS = ("entropy_cut", "uniform_cut", "low_temperature", "standard")  # a row a trace
SAMPLERS = (*CHAIN_SAMPLERS, *GROUP_SAMPLERS)


def specialise(sampler: str, tuning: Tuning, config: Config) -> tuple[Tuning, Config]:
    """Returns the tuning and the schedule with which chains are the named sampler.

    * ``entropy_cut``: as given.
    * ``uniform_cut``: uniform cuts (arXiv:2510.14901, with the exact ratio).
    * ``low_temperature``: one draw from q to the last horizon, no Metropolis-Hastings.
    * ``standard``: the same at temperature 1, that is from p itself.
    * all others: as given.

    Raises:
      ValueError: the sampler is unknown.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    if sampler == "uniform_cut":
        tuning = tuning._replace(uniform_mix=jnp.ones_like(tuning.uniform_mix))
    if sampler == "standard":
        tuning = tuning._replace(inverse_temperature=jnp.ones_like(tuning.inverse_temperature))
    if sampler in ("low_temperature", "standard"):
        config = dataclasses.replace(config, num_stages=1, steps_per_stage=0)
    return tuning, config


def sample(
    rng_key: jax.Array,
    model: LanguageModel,
    params: Params,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    tuning: Tuning,
    config: Config,
    sampler: str = "entropy_cut",
    prompt_ids: jax.Array | None = None,
    chain_ids: jax.Array | None = None,
    num_slots: int | None = None,
    steps_per_tick: int = 4,
    options: Any = None,
    budget: jax.Array | None = None,
) -> Result:
    """Samples one trace a chain from the power distribution p^power, or by a baseline.

    With ``config.refine_finished`` the law of a trace tends to p^power on completions of at most
    ``max_new_tokens`` tokens as steps grow. Without it (the paper's schedule) a chain stays as
    it is after the stage in which it ends, which is cheaper and only approximately p^power.

    Args:
      rng_key: scalar typed threefry key, ``jax.random.key(seed)``.
      model: the language model, three pure functions.
      params: its weights.
      prompts: [B, P] integers, padded on the right to ``config.prompt_length``.
      prompt_lengths: [B] integers in 1..P.
      tuning: per-chain numbers, from ``make_tuning``.
      config: the static configuration.
      sampler: one of ``SAMPLERS``.
      prompt_ids: [B] int32 and
      chain_ids: [B] int32: who each chain is. A chain's draws depend on the key and on these two
        alone, so equal pairs with equal prompts and tunings give equal traces, in any batch
        row. Default: prompt 0 and the row number.
      num_slots: chains that decode together, >= 1; the others wait for a free slot. Default: B. It
        bounds the memory of a run, and moves the last bits of its numbers.
      steps_per_tick: decode steps in one call of the device, >= 1. Changes no token of any chain.
      options: static settings of a sampler that decodes several rows for each trace
        (``group_sampling.GROUP_SAMPLERS``): the ``Options`` of its module. Default: the module's.
      budget: [B] int32, decoded tokens that each result of ``best_of_n`` may spend, >= 1: that of a
        run to be compared with, ``result.stats.decoded``. Default: no limit.

    Returns:
      The final traces, counters and per-step records.

    Raises:
      ValueError: a value is out of range; the message names it and what was expected.
    """
    tuning, config = specialise(sampler, tuning, config)
    if sampler in GROUP_SAMPLERS:
        options = check_options(sampler, options)
    elif options is not None:
        raise ValueError(f"options are {options!r}; expected None for sampler {sampler!r}")
    checks.check_key(rng_key)
    checks.check_config(config)
    num_chains = checks.check_prompt_shape(prompts, config)
    checks.check_tuning(tuning, num_chains)
    vocabulary_size = checks.check_vocabulary(model, params, config, num_chains)
    checks.check_prompts(prompts, prompt_lengths, config, vocabulary_size)
    if prompt_ids is None:
        prompt_ids = jnp.zeros((num_chains,), jnp.int32)
    if chain_ids is None:
        chain_ids = jnp.arange(num_chains, dtype=jnp.int32)
    checks.check_integers("prompt_ids", prompt_ids, num_chains)
    checks.check_integers("chain_ids", chain_ids, num_chains)
    if budget is not None:
        checks.check_budget(sampler, budget, num_chains)
    for name, value in (("num_slots", num_slots), ("steps_per_tick", steps_per_tick)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")
    chains = Chains(
        prompts=np.asarray(prompts, np.int32),
        prompt_lengths=np.asarray(prompt_lengths, np.int32),
        prompt_ids=np.asarray(prompt_ids, np.int32),
        chain_ids=np.asarray(chain_ids, np.int32),
        tuning=tuning,
    )
    if sampler in GROUP_SAMPLERS:
        return sample_groups(
            rng_key, model, params, chains, config, sampler, options, num_slots, budget
        )
    finished: dict[int, Finished] = {}
    for update in run_queue(
        rng_key, model, params, chains, config, num_slots or num_chains, steps_per_tick
    ):
        finished |= update.finished
    return assemble([finished[index] for index in range(num_chains)])


def assemble(finished: Sequence[Finished]) -> Result:
    """Stacks chains into a ``Result``, in the order given."""
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *finished)
    # Records are [num_stages, steps_per_stage, B, ...].
    info = jax.tree.map(lambda record: np.moveaxis(record, 0, 2), stacked.info)
    return jax.tree.map(jnp.asarray, Result(stacked.trace, stacked.stats, stacked.finite, info))
