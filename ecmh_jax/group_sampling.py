"""Samplers with their own ``run``: particles, candidates, tries, the published kernels.

Most decode several rows for each result. Each is a module with ``Options``, ``check_options``,
``rows_per_chain`` and a traceable ``run``. Here they get one interface: results in groups that fit
into the rows at hand, one program for all.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import best_of_n, compiled, multiple_try, power_smc, published, smc, tmc
from ecmh_jax.base import Config, Info, LanguageModel, Params, Result, Tuning
from ecmh_jax.chain_queue import Chains


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


def sample_groups(
    rng_key: jax.Array,
    model: LanguageModel,
    params: Params,
    chains: Chains,
    config: Config,
    sampler: str,
    options: Any,
    num_slots: int | None,
) -> Result:
    """Samples one trace a result, in groups of as many results as fit.

    Args:
      rng_key: scalar typed key, the run's seed.
      model: the language model.
      params: its weights.
      chains: the results to draw, [N].
      config: the run.
      sampler: one of ``GROUP_SAMPLERS``.
      options: of that sampler, checked.
      num_slots: rows that decode together at most; None for all.

    Returns:
      The results in the order of ``chains``.

    Raises:
      ValueError: not even one result fits.
    """
    module, _, result_axis = GROUP_SAMPLERS[sampler]
    rows, num_chains = module.rows_per_chain(options), len(chains.prompts)
    if num_slots is not None and num_slots < rows:
        raise ValueError(
            f"num_slots is {num_slots}; expected at least {rows}, the rows that one result of "
            f"{sampler!r} decodes together"
        )
    size = num_chains if num_slots is None else min(num_chains, num_slots // rows)
    groups = []
    for begin in range(0, num_chains, size):
        # The last group is filled up, so that it has the shape, and the bits, of all others.
        members = np.arange(begin, begin + size) % num_chains
        fields = (jnp.asarray(field[members]) for field in chains[:4])
        tuning = Tuning(*(field[members] for field in chains.tuning))
        result = compiled.run_group(
            rng_key,
            params,
            *fields,
            tuning,
            run=module.run,
            model=model,
            config=config,
            options=options,
        )
        groups.append(_first(result, min(size, num_chains - begin), result_axis))
    return jax.tree.map(jnp.asarray, _concatenate(groups, result_axis))


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
