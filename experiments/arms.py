"""The arms of an experiment: a sampler with its settings, under the name that its rows carry."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import Config, Tuning, make_tuning, sampling
from ecmh_jax.chain_queue import Chains
from experiments.prompts import EncodedPrompts


@dataclasses.dataclass(frozen=True)
class Arm:
    """One arm.

    Attributes:
      name: what its rows are called: the sampler's name, or that and the values of a sweep.
      sampler: one of ``ecmh_jax.SAMPLERS``.
      config: its schedule.
      power: alpha of its target.
      proposal_temperature: tau, None for 1 / power.
      cut_power: beta.
      uniform_mix: share of uniform cuts.
      options: the sampler's own settings, None where it has none.
      match: the arm whose decoded tokens ``best_of_n`` may spend, chain by chain; None for no
        limit.
    """

    name: str
    sampler: str
    config: Config
    power: float
    proposal_temperature: float | None
    cut_power: float
    uniform_mix: float
    options: Any = None
    match: str | None = None

    def describe(self) -> dict[str, Any]:
        """Returns the arm's part of ``settings.json``."""
        return dataclasses.asdict(self)

    def specialise(self) -> tuple[Tuning, Config]:
        """Returns the tuning of one chain and the schedule with which it is the sampler.

        Raises:
          ValueError: a value is out of range.
        """
        tuning = make_tuning(
            1, self.power, self.proposal_temperature, self.cut_power, self.uniform_mix
        )
        return sampling.specialise(self.sampler, tuning, self.config)


class Cell(NamedTuple):
    """A chain's place: its arm and its problem, by number, and its seed."""

    arm: int
    problem: int
    seed: int


def lay_out(
    arms: Sequence[Arm],
    prompts: EncodedPrompts,
    cells: Sequence[Cell],
) -> Chains:
    """Lays out chains.

    Args:
      arms: the arms.
      prompts: the problems' prompts.
      cells: of each chain; problems are places among the prompts.
    """
    tunings = [arm.specialise()[0] for arm in arms]
    of_chains = [tunings[cell.arm] for cell in cells]
    problems = np.array([cell.problem for cell in cells], np.int32)
    return Chains(
        prompts=prompts.tokens[problems],
        prompt_lengths=prompts.lengths[problems],
        prompt_ids=problems,
        chain_ids=np.array([cell.seed for cell in cells], np.int32),
        tuning=jax.tree.map(lambda *fields: jnp.concatenate(fields), *of_chains),
    )
