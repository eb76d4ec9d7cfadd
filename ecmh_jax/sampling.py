"""``sample``: every sampler behind one function of arrays."""

import dataclasses

import jax
import jax.numpy as jnp

from ecmh_jax import checks, compiled
from ecmh_jax.base import Config, LanguageModel, Params, Result, Tuning

SAMPLERS = ("entropy_cut", "uniform_cut", "low_temperature", "standard")


def specialise(sampler: str, tuning: Tuning, config: Config) -> tuple[Tuning, Config]:
    """Returns the tuning and the schedule with which the chains are the named sampler.

    * ``entropy_cut``: as given.
    * ``uniform_cut``: uniform cuts (arXiv:2510.14901, with the exact ratio).
    * ``low_temperature``: one draw from q to the last horizon, no Metropolis-Hastings.
    * ``standard``: the same at temperature 1, that is from p itself.

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

    Returns:
      The final traces, counters and per-step records.

    Raises:
      ValueError: a value is out of range; the message names it and what was expected.
    """
    tuning, config = specialise(sampler, tuning, config)
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
    return compiled.run(
        rng_key,
        params,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(prompt_lengths, jnp.int32),
        jnp.asarray(prompt_ids, jnp.int32),
        jnp.asarray(chain_ids, jnp.int32),
        # An explicit dtype also drops a weak type, which would be another program.
        jax.tree.map(lambda values: jnp.asarray(values, jnp.float32), tuning),
        model=model,
        config=config,
    )
