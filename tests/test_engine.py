"""The engine against the lockstep form: free-running slots change no token and no number."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from ecmh_jax import engine, make_tuning, transition
from ecmh_jax.base import Result
from ecmh_jax.chain_queue import Chains, run_queue
from tests import hashed_model, kernel_mutants
from tests.hashed_model import (
    CONFIG,
    LENGTHS,
    MODEL,
    PROMPTS,
    SWITCH_TUNINGS,
    assert_same,
    host_loop,
    make_params,
    rows_of,
    run,
    run_lockstep,
)

SEEDS = range(4)
PLAIN = dataclasses.replace(CONFIG, replay=False, early_rejection=False)
# Per-chain powers and temperatures, by their place in the range of certain rejection and the cut.
TUNINGS = {
    (kind, uniform_mix): make_tuning(3, power, 1 / np.array(inverse), 1.0, uniform_mix)
    for (kind, (power, inverse)), uniform_mix in itertools.product(
        SWITCH_TUNINGS.items(), (0.05, 1.0)
    )
}


def run_engine(seed, name, config, steps_per_tick=4, **changes):
    """The engine with a slot for each chain."""
    return run(
        seed,
        tuning=TUNINGS[name],
        config=config,
        num_slots=3,
        steps_per_tick=steps_per_tick,
        **changes,
    )


@functools.cache
def plain_lockstep(seed, name, refine_finished=True):
    """The reference: lockstep, every proposal decoded from its cut to its end."""
    config = dataclasses.replace(PLAIN, refine_finished=refine_finished)
    return run_lockstep(seed, TUNINGS[name], config)


@functools.cache
def lockstep(seed, name, config):
    """Lockstep with the switches of ``config``, step by step, which takes fewer compilations."""
    states, infos = host_loop(config, seed, TUNINGS[name])
    steps = [info for info in infos if info is not None]
    shape = config.num_stages, config.steps_per_stage, 3
    info = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(shape), *steps)
    return Result(states[-1].trace, states[-1].stats, states[-1].finite, info)


def kept(result):
    """What no switch may change: traces and all that a step decided."""
    names = ("attempted", "accepted", "cut", "divergence", "current_length")
    info = {name: getattr(result.info, name) for name in names}
    stats = [getattr(result.stats, name) for name in ("attempted", "accepted", "null_moves")]
    return result.trace, result.finite, stats, info


SWITCHES = [  # replay, early rejection, refine finished
    pytest.param(*switches, marks=() if len(set(switches)) == 1 else pytest.mark.slow)
    for switches in itertools.product((True, False), repeat=3)
]


@pytest.mark.parametrize(("replay", "early_rejection", "refine_finished"), SWITCHES)
def test_engine_is_the_lockstep_form(replay, early_rejection, refine_finished):
    config = dataclasses.replace(
        CONFIG, refine_finished=refine_finished, replay=replay, early_rejection=early_rejection
    )
    for name in TUNINGS:
        results = []
        for seed in SEEDS:
            result = run_engine(seed, name, config)
            # With equal switches even the work is the same, and every last bit.
            assert_same(result, lockstep(seed, name, config))
            assert_same(kept(result), kept(plain_lockstep(seed, name, refine_finished)))
            results.append(result.stats)
        stats = jax.tree.map(lambda *leaves: np.stack(leaves), *results)
        assert stats.null_moves.any()
        assert stats.accepted.sum() < stats.attempted.sum()
        assert stats.replayed.any() == replay
        assert stats.saved.any() == (early_rejection and name[0] != "outside")
        froze = stats.attempted == CONFIG.steps_per_stage
        assert froze.any() == (not refine_finished)
        assert not froze.all()


@pytest.mark.parametrize("steps_per_tick", [1, 16])
def test_length_of_a_tick_changes_nothing(steps_per_tick):
    for seed, name in itertools.product(SEEDS[:2], TUNINGS):
        assert_same(run_engine(seed, name, CONFIG, steps_per_tick), lockstep(seed, name, CONFIG))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_fault_freezes_its_chain_alone(value):
    # The fault is in a slot's row: a clone of another chain would meet it there.
    config = dataclasses.replace(CONFIG, work_ahead=False)
    tuning = make_tuning(3, [2.0, 4.0, 4.0], [1.0, 0.5, 1.0], 1.0, 0.05)
    failed_in_a_step = 0
    for seed, row in itertools.product(range(50), range(3)):
        params = hashed_model.fault_at(row, 5, value)
        result = run(
            seed, params=params, tuning=tuning, config=config, num_slots=3, steps_per_tick=4
        )
        clean = run_lockstep(seed, tuning)
        others = [other for other in range(3) if other != row]
        assert_same(rows_of(result, others), rows_of(clean, others))
        assert_same(result, run_lockstep(seed, tuning, params=params))
        # A chain that fails while it extends has only whole stages behind it.
        failed_in_a_step += not result.finite[row] and result.stats.attempted[row] % 3 != 0
    assert failed_in_a_step > 3


def most_idle_steps(model=MODEL):
    """Decode steps in which a slot with a chain drew nothing, at most of the runs of one chain."""
    waste = []
    for seed in SEEDS:
        chains = Chains(
            PROMPTS[:1],
            LENGTHS[:1],
            np.zeros(1, np.int32),
            np.zeros(1, np.int32),
            make_tuning(1, 4.0, 0.25, 1.0, 0.05),
        )
        updates = list(run_queue(jax.random.key(seed), model, make_params(), chains, CONFIG, 1, 1))
        drawn = [int(update.status.drawn) for update in updates]
        last = max(tick for tick, number in enumerate(drawn) if number)
        assert updates[-1].finished[0].stats.decoded == sum(drawn)
        assert updates[-1].finished[0].stats.null_moves > 0
        waste.append(drawn[:last].count(0))
    return max(waste)


def test_null_moves_cost_no_decode_step():
    # The first decode step finds a chain that has only just arrived.
    assert most_idle_steps() == 1


def wrong_copies(patch, change):
    """``change(copies)`` says which rows of the banks change hands."""
    original = engine._turn_over

    def turn_over(*arguments):
        slots, copies, discarded = original(*arguments)
        return slots, change(copies), discarded

    patch.setattr(engine, "_turn_over", turn_over)


def first_left_out(rows):
    return rows.at[rows.argmax()].set(False)


def accepted_row_stale(patch):
    wrong_copies(patch, lambda copies: copies._replace(moved=first_left_out(copies.moved)))


def rejected_row_not_restored(patch):
    wrong_copies(patch, lambda copies: copies._replace(restored=first_left_out(copies.restored)))


def one_row_of_a_copy_skipped(patch):
    original = engine._write_rows

    def write_rows(rows, target, read):
        last = rows.shape[0] - 1 - rows[::-1].argmax()
        return original(rows.at[last].set(False), target, read)

    patch.setattr(engine, "_write_rows", write_rows)


def wrong_turns(patch, loop):
    """The loop of ``_turn_over`` becomes ``loop(while_loop, condition, turn, carry)``."""
    original, while_loop = engine._turn_over, jax.lax.while_loop

    def turn_over(*arguments):
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(jax.lax, "while_loop", functools.partial(loop, while_loop))
            return original(*arguments)

    patch.setattr(engine, "_turn_over", turn_over)


def all_but_the_last_turn_forgotten(patch):
    def loop(while_loop, condition, turn, carry):
        nowhere = carry[2]
        return while_loop(condition, lambda carry: turn((*carry[:2], nowhere, carry[3])), carry)

    wrong_turns(patch, loop)


def null_moves_left_unresolved(patch):
    wrong_turns(patch, lambda while_loop, condition, turn, carry: turn(carry))


def null_moves_not_counted(patch):
    original = transition.settle

    def settle(state, plan, *rest):
        return original(state, plan._replace(attempted=plan.attempted & plan.moves), *rest)

    patch.setattr(transition, "settle", settle)


def records_of_the_step_before(patch):
    original = engine._write_records

    def write_records(records, chains, *rest):
        return original(records, chains._replace(step=chains.step - 1), *rest)

    patch.setattr(engine, "_write_records", write_records)


def proposals_run_to_the_last_horizon(patch):
    def horizon(state, config):
        return state.prompt_length + config.max_new_tokens

    patch.setattr(transition, "_horizon", horizon)


MUTANTS = [
    kernel_mutants.bound_without_the_cut_term,
    kernel_mutants.bound_used_outside_its_range,
    kernel_mutants.excluded_token_forgotten,
    accepted_row_stale,
    rejected_row_not_restored,
    one_row_of_a_copy_skipped,
    all_but_the_last_turn_forgotten,
    null_moves_not_counted,
    records_of_the_step_before,
    proposals_run_to_the_last_horizon,
]


def fresh_model():
    """The same model under another identity, for which nothing is compiled yet."""
    return MODEL._replace(decode=lambda *arguments: hashed_model.decode(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(mutant, monkeypatch):
    cases = list(itertools.product(SEEDS, TUNINGS))
    # Before the mutation: the reference must not be traced with the fault in it.
    expected = [kept(plain_lockstep(*case)) for case in cases]
    mutant(monkeypatch)
    model = fresh_model()
    differs = False
    for case, reference in zip(cases, expected, strict=True):
        try:
            assert_same(kept(run_engine(*case, CONFIG, model=model)), reference)
        except AssertionError:
            differs = True
            break
    assert differs


@pytest.mark.slow
def test_mutant_that_wastes_decode_steps_is_killed(monkeypatch):
    null_moves_left_unresolved(monkeypatch)
    assert most_idle_steps(fresh_model()) > 1


def test_slots_take_a_runs_keys_whatever_the_default_kind():
    with jax.default_prng_impl("rbg"):
        slots = engine.init_slots(MODEL, 2, CONFIG)
    assert slots.plan.keys.dtype == jax.random.key(0, impl="threefry2x32").dtype
