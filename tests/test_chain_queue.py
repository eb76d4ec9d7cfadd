"""The host's queue: more chains than slots, each chain once, one prefill a prompt, no idle slot."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import chain_queue, compiled, engine, make_tuning, transition
from ecmh_jax.base import Info
from ecmh_jax.chain_queue import Chains, run_queue
from ecmh_jax.sampling import assemble
from tests import hashed_model
from tests.hashed_model import (
    LENGTHS,
    MODEL,
    PROMPTS,
    assert_same,
    assert_valid,
    make_params,
    rows_of,
    run,
)

# Frozen chains leave records empty, where those of the slot's last chain would show.
CONFIG = dataclasses.replace(hashed_model.CONFIG, refine_finished=False)
NUM_CHAINS = 11
NUM_SLOTS = 3
# Interleaved, so that chains of one prompt have to be brought together.
PROMPT_OF_CHAIN = np.arange(NUM_CHAINS) % 4
ALL_PROMPTS = np.concatenate([PROMPTS, [[2, 9, 1]]]).astype(np.int32)[PROMPT_OF_CHAIN]
ALL_LENGTHS = np.append(LENGTHS, 3)[PROMPT_OF_CHAIN]
# Beyond a prompt's length there is nothing: chains 0, 4 and 8 share a prompt all the same.
ALL_PROMPTS[4, 2] = 6
CHAINS = Chains(
    ALL_PROMPTS,
    ALL_LENGTHS,
    prompt_ids=np.arange(NUM_CHAINS, dtype=np.int32) % 4,
    chain_ids=np.arange(NUM_CHAINS, dtype=np.int32)[::-1] // 2,
    tuning=make_tuning(
        NUM_CHAINS,
        np.linspace(1.0, 4.0, NUM_CHAINS),
        np.linspace(1.0, 0.25, NUM_CHAINS),
        np.linspace(0.0, 4.0, NUM_CHAINS),
        np.linspace(0.0, 1.0, NUM_CHAINS),
    ),
)


def run_chains(rows, num_slots=NUM_SLOTS, seed=0, steps_per_tick=4, **changes):
    """``sample`` for the chains ``rows``, in that order."""
    chains = jax.tree.map(lambda leaf: leaf[np.asarray(rows)], CHAINS)
    return run(
        seed,
        **(
            chains._asdict()
            | {"params": make_params(num_chains=num_slots), "config": CONFIG}
            | changes
        ),
        num_slots=num_slots,
        steps_per_tick=steps_per_tick,
    )


def updates_of(params=None, seed=0, config=CONFIG):
    return list(
        run_queue(
            jax.random.key(seed), MODEL, params or make_params(), CHAINS, config, NUM_SLOTS, 4
        )
    )


def alone():
    """Each chain with the slots for itself, by seed."""
    return {seed: [run_chains([row], seed=seed) for row in range(NUM_CHAINS)] for seed in range(4)}


def together(config, order=range(NUM_CHAINS)):
    """The same chains in one queue."""
    results = {seed: run_chains(order, seed=seed, config=config) for seed in range(4)}
    return {
        seed: [rows_of(result, [list(order).index(row)]) for row in range(NUM_CHAINS)]
        for seed, result in results.items()
    }


def test_a_chain_does_not_depend_on_the_others_of_its_queue():
    expected = alone()
    assert_same(together(CONFIG), expected)
    assert_same(together(CONFIG, np.random.default_rng(0).permutation(NUM_CHAINS)), expected)
    result = run_chains(range(NUM_CHAINS))
    assert_valid(result.trace, CHAINS.tuning, CONFIG, ALL_PROMPTS, ALL_LENGTHS)
    assert len(np.unique(result.trace.tokens, axis=0)) > 6
    num_stages = result.stats.attempted // CONFIG.steps_per_stage
    assert set(num_stages.tolist()) == {1, 2}


def records_of_the_last_chain_kept(patch):
    original = transition.select

    def select(rows, new, old):
        return old if isinstance(new, Info) else original(rows, new, old)

    patch.setattr(transition, "select", select)


def cache_of_the_last_chain_kept(patch):
    patch.setattr(engine, "_fill_rows", lambda rows, source, target: target)


def all_prompts_taken_for_one(patch):
    patch.setattr(chain_queue, "_prompt_name", lambda chains, index: b"")


def neighbour_collected(patch):
    original = compiled.collect
    patch.setattr(compiled, "collect", lambda slots, row: original(slots, (row + 1) % NUM_SLOTS))


QUEUE_MUTANTS = [
    records_of_the_last_chain_kept,
    cache_of_the_last_chain_kept,
    all_prompts_taken_for_one,
    neighbour_collected,
]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", QUEUE_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_queue_mutant_is_killed(mutant, monkeypatch):
    # A stop id given twice: the same run, by a program that is not compiled yet.
    config = dataclasses.replace(CONFIG, eos_ids=CONFIG.eos_ids * (2 + QUEUE_MUTANTS.index(mutant)))
    expected = alone()
    mutant(monkeypatch)
    result = together(config)
    with pytest.raises(AssertionError):
        assert_same(result, expected)


def test_one_slot_serves_all_chains():
    result = run_chains(range(5), num_slots=1)
    assert_valid(result.trace, CHAINS.tuning, CONFIG, ALL_PROMPTS[:5], ALL_LENGTHS[:5])
    for row in range(5):
        assert_same(run_chains([row], num_slots=1), rows_of(result, [row]))


def test_every_chain_is_delivered_once():
    updates = updates_of()
    delivered = [index for update in updates for index in update.finished]
    assert sorted(delivered) == list(range(NUM_CHAINS))
    waiting = [update.waiting for update in updates]
    assert waiting == sorted(waiting, reverse=True)
    assert waiting[0] == NUM_CHAINS - NUM_SLOTS
    assert waiting[-1] == 0
    slot_of = {}
    for update in updates:
        for slot in np.flatnonzero(update.chains >= 0):
            assert slot_of.setdefault(int(update.chains[slot]), slot) == slot
    assert len(slot_of) == NUM_CHAINS
    finished = {index: chain for update in updates for index, chain in update.finished.items()}
    together = jax.tree.map(np.asarray, assemble([finished[row] for row in range(NUM_CHAINS)]))
    assert_same(together, run_chains(range(NUM_CHAINS)))


def prefilled(patch, rows=range(NUM_CHAINS)):
    """The live tokens of every prompt that is prefilled, in order."""
    original, prompts = compiled.prefill, []

    def prefill(params, prompt, prompt_length, **static):
        prompts.append(tuple(prompt[:prompt_length].tolist()))
        return original(params, prompt, prompt_length, **static)

    with patch.context() as inner:
        inner.setattr(compiled, "prefill", prefill)
        run_chains(rows)
    return prompts


def test_a_prompt_is_prefilled_once(monkeypatch):
    assert prefilled(monkeypatch) == [(2, 9), (5,), (1, 6, 4), (2, 9, 1)]
    monkeypatch.setattr(chain_queue, "_by_prompt", lambda chains: list(range(NUM_CHAINS)))
    assert len(prefilled(monkeypatch)) == NUM_CHAINS


def longest_idle(seed):
    """Ticks in a row that a slot is free or holds a chain that has finished, while others wait."""
    longest = 0
    idle = np.zeros(NUM_SLOTS, int)
    occupants = np.full(NUM_SLOTS, -1)
    for update in updates_of(seed=seed):
        if not update.waiting:
            break
        is_new = (update.chains >= 0) & (update.chains != occupants)
        idle = np.where(update.status.busy, 0, np.where(is_new, 0, idle) + 1)
        occupants = update.chains
        longest = max(longest, idle.max())
    return longest


def test_no_slot_is_idle_for_more_than_two_ticks(monkeypatch):
    assert max(longest_idle(seed) for seed in range(4)) == 2
    fill = chain_queue._HostSlots.fill

    def fill_once_all_are_free(slots, waiting):
        if (slots.occupants < 0).all():
            fill(slots, waiting)

    monkeypatch.setattr(chain_queue._HostSlots, "fill", fill_once_all_are_free)
    assert max(longest_idle(seed) for seed in range(4)) > 2


def test_a_fault_spoils_the_chains_of_its_slot_alone():
    clean = run_chains(range(NUM_CHAINS))
    fault = np.zeros((NUM_SLOTS, CONFIG.num_slots))
    fault[1] = np.nan
    # A clone of a chain in another slot would meet the fault in this one.
    config = dataclasses.replace(CONFIG, work_ahead=False)
    updates = updates_of(params=make_params(fault), config=config)
    finished = {index: chain for update in updates for index, chain in update.finished.items()}
    result = assemble([finished[row] for row in range(NUM_CHAINS)])
    result = jax.tree.map(np.asarray, result)
    spoilt = {int(update.chains[1]) for update in updates} - {-1}
    assert len(spoilt) > 3
    sound = [row for row in range(NUM_CHAINS) if row not in spoilt]
    assert len(sound) > 3
    np.testing.assert_array_equal(np.flatnonzero(~result.finite), sorted(spoilt))
    assert_same(rows_of(result, sound), rows_of(clean, sound))
    np.testing.assert_array_equal(result.trace.length[~result.finite], ALL_LENGTHS[~result.finite])
    assert not result.stats.attempted[~result.finite].any()


@pytest.mark.parametrize("sampler", ["standard", "low_temperature"])
def test_schedule_without_steps(sampler):
    result = run_chains(range(NUM_CHAINS), sampler=sampler)
    tuning = CHAINS.tuning
    if sampler == "standard":
        tuning = tuning._replace(inverse_temperature=np.ones(NUM_CHAINS, np.float32))
    assert_valid(result.trace, tuning, CONFIG, ALL_PROMPTS, ALL_LENGTHS)
    assert result.info.cut.shape == (1, 0, NUM_CHAINS)
    np.testing.assert_array_equal(result.stats.decoded, result.trace.length - ALL_LENGTHS)
    order = np.random.default_rng(1).permutation(NUM_CHAINS)
    assert_same(run_chains(order, sampler=sampler), rows_of(result, order))


PROGRAMS = ["prefill", "init_slots", "admit", "tick", "collect"]


def num_programs():
    return {name: getattr(compiled, name)._cache_size() for name in PROGRAMS}


def test_a_second_run_compiles_nothing():
    run_chains(range(NUM_CHAINS))
    before = num_programs()
    assert all(before.values())
    run_chains(
        range(4, 10),
        seed=5,
        params=jax.tree.map(lambda leaf: leaf + 0.5, make_params()),
        tuning=make_tuning(6, 3.0, 0.5, 2.0, 0.5),
    )
    assert num_programs() == before
    # The counter counts: another tick is another program.
    run(config=CONFIG, num_slots=NUM_SLOTS, steps_per_tick=3)
    assert num_programs() == before | {"tick": before["tick"] + 1}


@pytest.mark.slow
def test_queue_runs_without_jit():
    config = dataclasses.replace(CONFIG, max_new_tokens=1, num_stages=1, steps_per_stage=0)
    params = make_params(num_chains=2, num_slots=config.num_slots)
    settings = {"num_slots": 2, "steps_per_tick": 1, "config": config, "params": params}
    expected = run_chains(range(3), **settings)
    with jax.disable_jit():
        result = run_chains(range(3), **settings)
    assert_same(result.trace.tokens, expected.trace.tokens)
    assert_same(result.stats, expected.stats)
    assert jnp.isfinite(result.trace.log_prob).all()
