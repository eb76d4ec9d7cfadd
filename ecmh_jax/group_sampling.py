"""Samplers in rounds: particles, candidates, tries, the published kernels.

Most decode several rows for each result. Each is a module with ``Options``, ``check_options``,
``rows_per_chain`` and ``build``, which returns ``rounds.Rounds``. Here they get one interface:
results in groups that fit into the rows at hand, one set of programs for all.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import best_of_n, compiled, multiple_try, power_smc, published, smc, tmc
from ecmh_jax.base import Config, Info, LanguageModel, Params, Result, Tuning
from ecmh_jax.chain_queue import Chains
from ecmh_jax.rounds import Batch


class GroupSampler(NamedTuple):
    """A sampler of this kind.

    Attributes:
      module: where it is.
      default: its options where none are given.
      result_axis: field of its ``Info`` -> axis of the results; 0 where it is not named.
    """

    module: Any
    default: Any
    result_axis: dict[str, int]


_PARTICLE_AXES = {"ess": 1, "resampled": 1}  # [moments, results]
_STEP_AXES = dict.fromkeys((*Info._fields, *multiple_try.Info._fields), 2)  # [stages, steps, ...]
GROUP_SAMPLERS = {
    "smc": GroupSampler(smc, smc.Options(), _PARTICLE_AXES),
    "power_smc": GroupSampler(power_smc, power_smc.Options(), _PARTICLE_AXES),
    "tmc": GroupSampler(tmc, tmc.Options(), dict.fromkeys(tmc.Info._fields, 1)),
    "best_of_n": GroupSampler(best_of_n, best_of_n.Options(), {}),
    "multiple_try": GroupSampler(multiple_try, multiple_try.Options(), _STEP_AXES),
    "published_entropy_cut": GroupSampler(published, published.PUBLISHED_ENTROPY_CUT, _STEP_AXES),
    "published_uniform_cut": GroupSampler(published, published.PUBLISHED_UNIFORM_CUT, _STEP_AXES),
}


def check_options(sampler: str, options: Any) -> Any:
    """Returns the options, or the sampler's defaults for None.

    Raises:
      ValueError: they are another sampler's, or a value is out of range.
    """
    module, default, _ = GROUP_SAMPLERS[sampler]
    options = default if options is None else options
    if not isinstance(options, module.Options):
        raise ValueError(
            f"options are {options!r}; expected {module.__name__}.Options for sampler {sampler!r}"
        )
    module.check_options(options)
    return options


class Update(NamedTuple):
    """What one round of one group did, as the host sees it.

    Attributes:
      members: the group's results, by their index among the N.
      round: the round that ended, 1..num_rounds.
      num_rounds: rounds of each group.
      decoded: tokens that the group's rows have drawn so far.
      result: the members' results after the last round, NumPy; None before.
    """

    members: np.ndarray
    round: int
    num_rounds: int
    decoded: int
    result: Result | None


def check_num_slots(sampler: str, options: Any, num_slots: int | None) -> None:
    """Raises ValueError where not even one result fits into ``num_slots`` rows."""
    rows = GROUP_SAMPLERS[sampler].module.rows_per_chain(options)
    if num_slots is not None and num_slots < rows:
        raise ValueError(
            f"num_slots is {num_slots}; expected at least {rows}, the rows that one result of "
            f"{sampler!r} decodes together"
        )


def group_size(sampler: str, options: Any, num_chains: int, num_slots: int | None) -> int:
    """Results of each group: as many as fit into the rows, even where fewer are to be drawn."""
    rows = GROUP_SAMPLERS[sampler].module.rows_per_chain(options)
    return num_chains if num_slots is None else num_slots // rows


def run_groups(
    rng_key: jax.Array,
    model: LanguageModel,
    params: Params,
    chains: Chains,
    config: Config,
    sampler: str,
    options: Any,
    num_slots: int | None,
    budget: Any = None,
) -> Iterator[Update]:
    """Runs groups of as many results as fit, round by round.

    Args:
      rng_key: scalar typed key, the run's seed.
      model: the language model.
      params: its weights.
      chains: the results to draw, [N].
      config: the run.
      sampler: one of ``GROUP_SAMPLERS``.
      options: of that sampler, checked.
      num_slots: rows that decode together at most; None for all. The last bits of a result depend
        on it, and not on how many results there are.
      budget: [N] integers for ``best_of_n``, decoded tokens that each result may spend.

    Yields:
      An update a round; every result is in the last one of its group.

    Raises:
      ValueError: not even one result fits.
    """
    check_num_slots(sampler, options, num_slots)
    module, _, result_axis = GROUP_SAMPLERS[sampler]
    static = {"build": module.build, "model": model, "config": config, "options": options}
    num_rounds = module.build(model, config, options).num_rounds
    num_chains = len(chains.prompts)
    size = group_size(sampler, options, num_chains, num_slots)
    for first in range(0, num_chains, size):
        members = np.arange(first, min(first + size, num_chains))
        # The last group is filled up, so that it has the shape, and the bits, of all others.
        rows = np.arange(first, first + size) % num_chains
        batch = Batch(
            *(jnp.asarray(field[rows]) for field in chains[:4]),
            tuning=Tuning(*(field[rows] for field in chains.tuning)),
            budget=None if budget is None else jnp.asarray(np.asarray(budget)[rows], jnp.int32),
        )
        carry = compiled.begin_rounds(rng_key, params, batch, **static)
        records = []
        for index in range(num_rounds):
            carry, record, decoded = compiled.advance_round(
                rng_key, params, batch, carry, jnp.int32(index), **static
            )
            records.append(record)
            result = None
            if index == num_rounds - 1:
                stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *records)
                whole = compiled.finish_rounds(rng_key, batch, carry, stacked, **static)
                result = _first(whole, len(members), result_axis)
            yield Update(members, index + 1, num_rounds, int(decoded), result)


def sample_groups(
    rng_key: jax.Array,
    model: LanguageModel,
    params: Params,
    chains: Chains,
    config: Config,
    sampler: str,
    options: Any,
    num_slots: int | None,
    budget: Any = None,
) -> Result:
    """Samples one trace a result; arguments as for ``run_groups``.

    Returns:
      The results in the order of ``chains``.
    """
    if num_slots is not None:  # no more than are of use
        rows = GROUP_SAMPLERS[sampler].module.rows_per_chain(options)
        num_slots = min(num_slots, rows * len(chains.prompts))
    updates = run_groups(
        rng_key, model, params, chains, config, sampler, options, num_slots, budget
    )
    groups = [update.result for update in updates if update.result is not None]
    result_axis = GROUP_SAMPLERS[sampler].result_axis
    return jax.tree.map(jnp.asarray, _concatenate(groups, result_axis))


def select(sampler: str, result: Result, index: int) -> Result:
    """One result of several, NumPy, without the axis of results."""

    def take(axis: int, leaf: np.ndarray) -> np.ndarray:
        return np.take(leaf, index, axis=axis)

    return _by_axis(take, [result], GROUP_SAMPLERS[sampler].result_axis)


def _first(result: Result, count: int, result_axis: dict[str, int]) -> Result:
    """The first ``count`` results, on the host."""

    def take(axis: int, leaf: jax.Array) -> np.ndarray:
        return np.take(np.asarray(leaf), np.arange(count), axis=axis)

    return _by_axis(take, [result], result_axis)


def _concatenate(groups: list[Result], result_axis: dict[str, int]) -> Result:
    return _by_axis(lambda axis, *leaves: np.concatenate(leaves, axis), groups, result_axis)


def _by_axis(function: Any, results: list[Result], result_axis: dict[str, int]) -> Result:
    """Maps ``function(axis, *leaves)`` over results, where ``axis`` is that of the results."""

    def mapped(axis: int, *trees: Any) -> Any:
        return jax.tree.map(lambda *leaves: function(axis, *leaves), *trees)

    infos = [result.info for result in results]
    info = type(infos[0])(
        *(
            mapped(result_axis.get(name, 0), *(getattr(info, name) for info in infos))
            for name in infos[0]._fields
        )
    )
    others = [result._replace(info=None) for result in results]
    return mapped(0, *others)._replace(info=info)
