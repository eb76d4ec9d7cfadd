"""Driving chains from the host: one device call a step, with what a reader wants to see of each."""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import checks, compiled, ecmh
from ecmh_jax.base import Config, Info, State, Tuning
from models.load import LoadedModel


class Chains(NamedTuple):
    """A batch of chains before it starts; NumPy arrays, int32.

    Attributes:
      prompts: [B, P] padded on the right.
      prompt_lengths: [B].
      prompt_ids: [B].
      chain_ids: [B].
      real: [B] bool, False for rows that only fill the batch.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    prompt_ids: np.ndarray
    chain_ids: np.ndarray
    real: np.ndarray


class Report(NamedTuple):
    """What one device call did.

    Attributes:
      stage: 1..num_stages.
      step: 0 for the stage's extension, then 1..steps_per_stage.
      info: the step's record, NumPy; None for an extension.
      decoded: tokens decoded in this call, all chains together.
      state: the chains' state; valid until the next report.
      seconds: wall time of the call, compilation left out.
    """

    stage: int
    step: int
    info: Info | None
    decoded: int
    state: State
    seconds: float


def batches(
    prompts: np.ndarray, lengths: np.ndarray, num_chains: int, num_slots: int
) -> list[Chains]:
    """Lays ``num_chains`` chains of every prompt out in batches of one shape.

    Args:
      prompts: [num_prompts, P].
      lengths: [num_prompts].
      num_chains: chains of each prompt.
      num_slots: largest batch; the last one is filled up with rows that do nothing.
    """
    prompt_ids = np.repeat(np.arange(len(prompts), dtype=np.int32), num_chains)
    chain_ids = np.tile(np.arange(num_chains, dtype=np.int32), len(prompts))
    total = len(prompt_ids)
    batch_size = min(num_slots, total)
    result = []
    for start in range(0, total, batch_size):
        rows = np.arange(start, start + batch_size)
        real = rows < total
        ids, chains = prompt_ids[rows % total], chain_ids[rows % total]
        result.append(Chains(prompts[ids], lengths[ids], ids, chains, real))
    return result


def check(model: LoadedModel, chains: Chains, tuning: Tuning, config: Config) -> None:
    """Raises ValueError unless the chains can run on this model."""
    checks.check_config(config)
    checks.check_tuning(tuning, len(chains.real))
    vocabulary_size = checks.check_vocabulary(
        model.language_model, model.params, config, len(chains.real)
    )
    checks.check_prompts(chains.prompts, chains.prompt_lengths, config, vocabulary_size)
    if config.num_slots > model.config.context_length:
        raise ValueError(
            f"the longest prompt takes {config.prompt_length} slots and --max_new_tokens is "
            f"{config.max_new_tokens}, {config.num_slots} together; expected at most "
            f"{model.config.context_length}, the context of {model.name}: lower --max_new_tokens"
        )


@dataclasses.dataclass(frozen=True)
class Programs:
    """The compiled programs of one (model, config, batch shape).

    Attributes:
      init: prefills.
      extend: enters a stage.
      kernel: takes a Metropolis-Hastings step; None where there are no steps.
      compile_seconds: what compiling them took.
    """

    init: Any
    extend: Any
    kernel: Any
    compile_seconds: float


def compile_programs(
    rng_key: jax.Array, model: LoadedModel, chains: Chains, tuning: Tuning, config: Config
) -> Programs:
    """Compiles ahead of the run, so that its time is known apart."""
    started = time.perf_counter()
    static = {"model": model.language_model, "config": config}
    inputs = _device_inputs(chains)
    init = compiled.init.lower(params=model.params, **inputs, **static).compile()
    state = jax.eval_shape(
        lambda params, inputs: ecmh.init(params=params, **inputs, **static), model.params, inputs
    )
    arguments = (rng_key, state, model.params, tuning)
    extend = compiled.extend.lower(*arguments, **static).compile()
    kernel = None
    if config.steps_per_stage:
        kernel = compiled.kernel.lower(*arguments, **static).compile()
    return Programs(init, extend, kernel, time.perf_counter() - started)


def advance(
    rng_key: jax.Array,
    model: LoadedModel,
    chains: Chains,
    tuning: Tuning,
    config: Config,
    programs: Programs,
) -> Iterator[Report]:
    """Runs a batch to the end of its schedule, one report a device call.

    The traces are those of ``ecmh_jax.sample`` on a batch of the same shape, token for token.
    """
    state = programs.init(params=model.params, **_device_inputs(chains))
    state = state._replace(frozen=jnp.asarray(~chains.real))
    decoded_before = 0
    for stage in range(1, config.num_stages + 1):
        for step in range(config.steps_per_stage + 1):
            started = time.perf_counter()
            info = None
            if step == 0:
                state = programs.extend(rng_key, state, model.params, tuning)
            else:
                state, info = programs.kernel(rng_key, state, model.params, tuning)
                info = jax.tree.map(np.asarray, info)
            decoded = int(np.asarray(state.stats.decoded).sum())
            yield Report(
                stage, step, info, decoded - decoded_before, state, time.perf_counter() - started
            )
            decoded_before = decoded


def _device_inputs(chains: Chains) -> dict[str, jax.Array]:
    fields = chains._asdict()
    del fields["real"]
    return {name: jnp.asarray(value) for name, value in fields.items()}
