"""Free slots that work ahead: fewer decode steps, and not a token changed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import engine, make_tuning, transition, work_ahead
from ecmh_jax.chain_queue import Chains, run_queue
from tests import hashed_model
from tests.hashed_model import (
    CONFIG,
    LENGTHS,
    MODEL,
    PROMPTS,
    assert_same,
    make_params,
    run_lockstep,
)

# Long enough for lists of clones that grow, break off and cross stages.
LONG = dataclasses.replace(CONFIG, max_new_tokens=18, num_stages=3, steps_per_stage=6)
TUNING = make_tuning(3, [4.0, 2.0, 4.0], [0.25, 0.4, 1.0], 1.0, [0.1, 0.0, 1.0])
SEEDS = range(3)
_MOST_TICKS = 500


def run_on(num_slots, config=LONG, seed=0, model=MODEL, steps_per_tick=1, params=None):
    """Three chains on ``num_slots`` slots: the chains, and decode steps and drawn tokens."""
    chains = Chains(PROMPTS, LENGTHS, np.zeros(3, np.int32), np.arange(3, dtype=np.int32), TUNING)
    params = params or make_params(num_chains=num_slots, num_slots=config.num_slots)
    finished, drawn, kept = {}, [], 0
    updates = run_queue(
        jax.random.key(seed), model, params, chains, config, num_slots, steps_per_tick
    )
    for update in itertools.islice(updates, _MOST_TICKS):  # a mutant may never end
        finished |= update.finished
        drawn.append(int(update.status.drawn))
        kept += int(update.status.drawn) - int(update.status.discarded)
    assert len(finished) == 3
    chains = jax.tree.map(lambda *leaves: np.stack(leaves), *(finished[row] for row in range(3)))
    assert kept == chains.stats.decoded.sum()
    return chains, np.trim_zeros(drawn, "b")


def reference(config=LONG, seed=0, params=None):
    params = params or make_params(num_slots=config.num_slots)
    result = run_lockstep(seed, TUNING, config, params)
    info = jax.tree.map(lambda record: np.moveaxis(record, -1, 0), result.info)
    return result.trace, result.stats, result.finite, info


@pytest.mark.parametrize(
    ("num_slots", "refine_finished"),
    [
        (7, True),
        pytest.param(4, False, marks=pytest.mark.slow),
        pytest.param(20, False, marks=pytest.mark.slow),
    ],
)
def test_spare_slots_change_nothing(num_slots, refine_finished):
    config = dataclasses.replace(LONG, refine_finished=refine_finished)
    for seed in SEEDS:
        chains, _ = run_on(num_slots, config, seed, steps_per_tick=4)
        assert_same(tuple(chains), reference(config, seed))


@pytest.mark.slow
@pytest.mark.parametrize("switch", ["replay", "early_rejection"])
def test_other_switches_may_be_off(switch):
    config = dataclasses.replace(LONG, **{switch: False})
    chains, _ = run_on(8, config)
    assert_same(tuple(chains), reference(config))


@pytest.mark.slow
def test_spare_slots_save_decode_steps():
    without = dataclasses.replace(LONG, work_ahead=False)
    alone, beside_free_slots = run_on(3, without), run_on(9, without)
    assert_same(alone[0], beside_free_slots[0])
    assert alone[1] == beside_free_slots[1]
    # Even with a slot a chain: the chain that is left at the end has the slots of the others.
    some, many = run_on(3)[1], run_on(12)[1]
    assert len(some) < len(alone[1])
    assert len(many) < 0.8 * len(alone[1])
    decoded = alone[0].stats.decoded.sum()
    assert sum(alone[1]) == decoded
    assert sum(many) > decoded  # what nobody needed


def test_a_fault_in_a_clone_is_the_chains():
    # The same fault in every row: chains meet it in the step in which they would have met it alone.
    slots = 7
    failed = 0
    for seed in range(12):
        fault = np.zeros((1, LONG.num_slots))
        fault[:, 12] = np.nan
        chains, _ = run_on(
            slots, seed=seed, params=make_params(np.repeat(fault, slots, axis=0)), steps_per_tick=4
        )
        expected = reference(seed=seed, params=make_params(np.repeat(fault, 3, axis=0)))
        assert_same(tuple(chains), expected)
        failed += (~chains.finite & (chains.stats.attempted % LONG.steps_per_stage != 0)).sum()
    assert failed > 3


def test_clones_wait_for_chains():
    # While chains wait, no slot is given to a clone: every token drawn is one that counts.
    chains = Chains(
        np.repeat(PROMPTS, 4, axis=0),
        np.repeat(LENGTHS, 4),
        np.zeros(12, np.int32),
        np.arange(12, dtype=np.int32),
        jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), 4), TUNING),
    )
    params = make_params(num_slots=LONG.num_slots)
    updates = list(run_queue(jax.random.key(0), MODEL, params, chains, LONG, 3, 4))
    while_waiting = [update for update in updates if update.waiting]
    assert len(while_waiting) > 20
    for update in while_waiting:
        assert not (update.status.busy & (update.chains < 0)).any()
    assert any((update.status.busy & (update.chains < 0)).any() for update in updates)


def clone_cache_left_behind(patch):
    original = engine._refill_rows

    def refill_rows(copies, *rest):
        return original(copies._replace(adopted=jnp.full_like(copies.adopted, -1)), *rest)

    patch.setattr(engine, "_refill_rows", refill_rows)


def clone_starts_from_a_stale_row(patch):
    def refill_rows(copies, root, *rest):
        own = jnp.arange(root.shape[0])
        return refill(copies._replace(restored=copies.restored & (root == own)), root, *rest)

    refill = engine._refill_rows
    patch.setattr(engine, "_refill_rows", refill_rows)


def clones_outlive_an_acceptance(patch):
    patch.setattr(work_ahead, "release", lambda slots, rows: (slots, jnp.int32(0)))


def null_moves_of_clones_not_counted(patch):
    original = work_ahead.adopt

    def adopt(slots, rejected):
        after, heirs = original(slots, rejected)
        stats = transition.select(heirs >= 0, slots.chains.stats, after.chains.stats)
        return after._replace(chains=after.chains._replace(stats=stats)), heirs

    patch.setattr(work_ahead, "adopt", adopt)


def clone_stays_at_the_same_step(patch):
    original = work_ahead.spawn

    def spawn(slots, due, helpers):
        after, born = original(slots, due, helpers)
        step = after.chains.step - born
        return after._replace(chains=after.chains._replace(step=step)), born

    patch.setattr(work_ahead, "spawn", spawn)


def records_of_clones_lost(patch):
    original = work_ahead.adopt

    def adopt(slots, rejected):
        after, heirs = original(slots, rejected)
        return after._replace(records=slots.records), heirs

    patch.setattr(work_ahead, "adopt", adopt)


MUTANTS = [
    clone_cache_left_behind,
    clone_starts_from_a_stale_row,
    clones_outlive_an_acceptance,
    null_moves_of_clones_not_counted,
    clone_stays_at_the_same_step,
    records_of_clones_lost,
]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(mutant, monkeypatch):
    expected = [reference(seed=seed) for seed in SEEDS]
    mutant(monkeypatch)
    model = MODEL._replace(decode=lambda *arguments: hashed_model.decode(*arguments))
    with pytest.raises(AssertionError):
        assert_runs_are(expected, model)


def assert_runs_are(expected, model):
    for seed, traces in zip(SEEDS, expected, strict=True):
        assert_same(tuple(run_on(7, seed=seed, model=model, steps_per_tick=4)[0]), traces)
