"""Driving the engine from the host: more chains than slots, and no slot left empty.

The host never waits for the tick it has just started: it reads the status of the tick before,
collects the chains that finished in it and refills their slots while the device is busy.
"""

import collections
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import compiled
from ecmh_jax.base import Cache, Config, LanguageModel, Params, Tuning
from ecmh_jax.engine import Arrivals, Finished, Status


class Chains(NamedTuple):
    """Chains that wait for a slot; N of them, NumPy arrays.

    Attributes:
      prompts: [N, P] int32, padded on the right.
      prompt_lengths: [N] int32.
      prompt_ids: [N] int32 and
      chain_ids: [N] int32: who each chain is.
      tuning: their numbers, each [N] float32.
    """

    prompts: np.ndarray
    prompt_lengths: np.ndarray
    prompt_ids: np.ndarray
    chain_ids: np.ndarray
    tuning: Tuning


class Update(NamedTuple):
    """What one tick did, as the host sees it; NumPy.

    Attributes:
      finished: chains that ended their schedule, by their index among the N.
      status: the slots after the tick.
      chains: [B] int, the index of each slot's chain, -1 for a free slot.
      waiting: chains that have no slot yet.
    """

    finished: dict[int, Finished]
    status: Status
    chains: np.ndarray
    waiting: int


def run_queue(
    rng_key: jax.Array,
    model: LanguageModel,
    params: Params,
    chains: Chains,
    config: Config,
    num_slots: int,
    steps_per_tick: int,
) -> Iterator[Update]:
    """Runs every chain to the end of its schedule.

    Chains of one prompt follow each other, so that one prefill serves them all; otherwise they
    start in their own order.

    Args:
      rng_key: scalar typed key, the run's seed.
      model: the language model.
      params: its weights.
      chains: the chains, checked.
      config: the run.
      num_slots: B, chains that decode together.
      steps_per_tick: decode steps of a tick; a free slot waits for at most two ticks.

    Yields:
      An update a tick; every chain is in exactly one of them.
    """
    slots = _HostSlots(rng_key, model, params, chains, config, num_slots, steps_per_tick)
    waiting = collections.deque(_by_prompt(chains))
    slots.fill(waiting)
    in_flight: tuple[np.ndarray, Status] | None = None
    arriving: dict[int, Finished] = {}
    while (slots.occupants >= 0).any() or in_flight is not None:
        started = None
        if (slots.occupants >= 0).any():
            started = slots.occupants.copy(), slots.tick(works_ahead=not waiting)
        if in_flight is not None:
            occupants, status = in_flight[0], jax.tree.map(np.asarray, in_flight[1])
            # What was collected before the tick that is now running is complete.
            finished, arriving = jax.tree.map(np.asarray, arriving), {}
            for row in np.flatnonzero((occupants >= 0) & ~status.busy):
                if slots.occupants[row] == occupants[row]:
                    arriving[int(occupants[row])] = slots.release(int(row))
            slots.fill(waiting)
            yield Update(finished, status, occupants, len(waiting))
        in_flight = started


def _by_prompt(chains: Chains) -> list[int]:
    """Indices of the chains, those of one prompt side by side."""
    members: dict[bytes, list[int]] = {}
    for index in range(len(chains.prompts)):
        members.setdefault(_prompt_name(chains, index), []).append(index)
    return [index for group in members.values() for index in group]


def _prompt_name(chains: Chains, index: int) -> bytes:
    return chains.prompts[index, : chains.prompt_lengths[index]].tobytes()


class _HostSlots:
    """The slots on the device, and which chain is in which."""

    def __init__(
        self,
        rng_key: jax.Array,
        model: LanguageModel,
        params: Params,
        chains: Chains,
        config: Config,
        num_slots: int,
        steps_per_tick: int,
    ):
        self._rng_key, self._params, self._chains = rng_key, params, chains
        self._model, self._config, self._steps_per_tick = model, config, steps_per_tick
        self._slots = compiled.init_slots(model=model, num_slots=num_slots, config=config)
        self._prompt: tuple[bytes, Cache] | None = None
        self.occupants = np.full(num_slots, -1)

    def tick(self, works_ahead: bool) -> Status:
        self._slots, status = compiled.tick(
            self._rng_key,
            self._slots,
            self._params,
            jnp.asarray((self.occupants < 0) & works_ahead),
            model=self._model,
            config=self._config,
            num_steps=self._steps_per_tick,
        )
        return status

    def release(self, row: int) -> Finished:
        self.occupants[row] = -1
        return compiled.collect(self._slots, jnp.int32(row))

    def fill(self, waiting: collections.deque[int]) -> None:
        """Puts chains into free slots, one call for those of one prompt."""
        while waiting and (self.occupants < 0).any():
            name = _prompt_name(self._chains, waiting[0])
            rows = []
            for row in np.flatnonzero(self.occupants < 0):
                if not waiting or _prompt_name(self._chains, waiting[0]) != name:
                    break
                self.occupants[row] = waiting.popleft()
                rows.append(row)
            self._admit(name, np.asarray(rows))

    def _admit(self, name: bytes, rows: np.ndarray) -> None:
        chains, indices = self._chains, self.occupants[rows]
        prompt = jnp.asarray(chains.prompts[indices[0]], jnp.int32)
        prompt_length = jnp.int32(chains.prompt_lengths[indices[0]])
        if self._prompt is None or self._prompt[0] != name:
            cache = compiled.prefill(
                self._params, prompt, prompt_length, model=self._model, config=self._config
            )
            self._prompt = name, cache

        def by_slot(values: np.ndarray, dtype: type) -> jax.Array:
            placed = np.zeros(len(self.occupants), dtype)
            placed[rows] = values[indices]
            return jnp.asarray(placed)

        arrivals = Arrivals(
            rows=jnp.asarray(np.isin(np.arange(len(self.occupants)), rows)),
            cache=self._prompt[1],
            prompt=prompt,
            prompt_length=prompt_length,
            prompt_id=by_slot(chains.prompt_ids, np.int32),
            chain_id=by_slot(chains.chain_ids, np.int32),
            tuning=Tuning(*(by_slot(np.asarray(field), np.float32) for field in chains.tuning)),
        )
        self._slots = compiled.admit(self._slots, arrivals, config=self._config)
