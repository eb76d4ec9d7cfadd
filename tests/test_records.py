"""The records of Metropolis-Hastings steps against tables of the model, and engine = lockstep."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import compiled, engine, multiple_try, proposal_record, published, transition
from experiments import memory
from tests import hashed_model
from tests.hashed_model import MODEL, assert_same, make_params
from tests.record_checks import (
    CHAINS,
    CONFIG,
    NUM_CHAINS,
    NUM_SLOTS,
    Completion,
    check,
    check_continuity,
    run_engine,
    run_lockstep,
    steps_of,
)

SEEDS = range(4)


@functools.cache
def results():
    """Runs of the engine by seed."""
    return [run_engine(seed) for seed in SEEDS]


def test_records_are_what_the_tables_say():
    for result in results():
        check(result)
    # Without these the test would compare little.
    infos = [info for result in results() for *_, info in steps_of(result)]
    assert sum(info.proposal.stopped for info in infos) > 20
    assert sum(info.accepted and info.divergence > info.cut for info in infos) > 5
    assert sum(info.accepted and not info.divergence for info in infos) > 20
    assert sum(info.proposal_length != info.current_length for info in infos) > 20
    assert len(infos) > 100
    assert sum((~result.info.attempted).sum() for result in results()) > 100
    assert np.ptp([info.proposal.cut_change for info in infos]) > 1


def test_engine_is_the_lockstep_form():
    for seed, result in zip(SEEDS, results(), strict=True):
        assert_same(result, run_lockstep(seed))


@pytest.mark.slow
@pytest.mark.parametrize("refine_finished", [True, False])
@pytest.mark.parametrize("switch", ["replay", "early_rejection", "work_ahead"])
def test_switches_may_be_off(switch, refine_finished):
    config = dataclasses.replace(CONFIG, **{switch: False}, refine_finished=refine_finished)
    plain = dataclasses.replace(CONFIG, refine_finished=refine_finished)
    for seed in SEEDS[:2]:
        result, expected = run_engine(seed, config), run_lockstep(seed, plain)
        assert_same(result, run_lockstep(seed, config))
        check(result, config)
        # The current traces, the numbers drawn and what they decided are those of all switches.
        for name in ("current_tokens", "current_entropy", "log_uniform"):
            assert_same(getattr(result.info.proposal, name), getattr(expected.info.proposal, name))
        if switch != "early_rejection":
            assert_same(result.info.proposal, expected.info.proposal)
        assert_same(result.info.log_prob, expected.info.log_prob)


@pytest.mark.slow
def test_steps_without_a_cut_are_draws_too():
    # Stages of one token: there is no cut in the first of them, and no attempt.
    config = dataclasses.replace(
        CONFIG, max_new_tokens=4, num_stages=4, steps_per_stage=2, cut_first_token=False
    )
    for seed in SEEDS:
        result = run_engine(seed, config)
        assert_same(result, run_lockstep(seed, config))
        assert not result.info.attempted[0].any()
        assert (result.info.log_prob < 0).all()


@pytest.mark.slow
def test_a_fault_leaves_sane_records():
    fault = np.zeros((1, CONFIG.num_slots))
    fault[:, 9] = np.nan
    failed = 0
    for seed in range(8):
        result, expected = (
            form(seed, params=make_params(np.repeat(fault, rows, axis=0)))
            for form, rows in ((run_engine, NUM_SLOTS), (run_lockstep, NUM_CHAINS))
        )
        assert_same(result, expected)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(result.info))
        check_continuity(result)
        last_step = result.stats.attempted % CONFIG.steps_per_stage != 0
        failed += (~result.finite & last_step).sum()
        np.testing.assert_allclose(
            result.info.log_prob[-1, -1], result.trace.log_prob.sum(axis=1), rtol=1e-5
        )
    assert failed > 3


def without_proposals(result):
    return result._replace(info=result.info._replace(proposal=()))


def test_recording_changes_nothing_else():
    config = dataclasses.replace(CONFIG, record_proposals=False)
    for seed, result in zip(SEEDS, results(), strict=True):
        plain = run_engine(seed, config)
        assert plain.info.proposal == ()
        assert_same(plain, without_proposals(result))


def tick_of(config):
    """The traced tick and the bytes of its slots."""
    slots = jax.eval_shape(lambda: engine.init_slots(MODEL, NUM_SLOTS, config))
    helpers = jax.ShapeDtypeStruct((NUM_SLOTS,), bool)
    params = make_params(num_chains=NUM_SLOTS, num_slots=config.num_slots)
    tick = engine.build_tick(MODEL, config, 4)
    traced = jax.make_jaxpr(tick)(jax.random.key(0), slots, params, helpers)
    return str(traced), memory.tree_bytes(slots)


def test_nothing_is_traced_when_off(monkeypatch):
    plain = dataclasses.replace(CONFIG, record_proposals=False)
    kept, kept_bytes = tick_of(CONFIG)
    expected, plain_bytes = tick_of(plain)
    steps = CONFIG.num_stages * CONFIG.steps_per_stage
    store = f"{CONFIG.num_stages},{CONFIG.steps_per_stage},{CONFIG.max_new_tokens}]"
    assert store in kept
    assert store not in expected
    for name in ("describe", "_completion"):
        monkeypatch.delattr(proposal_record, name)
    monkeypatch.setattr(proposal_record, "write", lambda store, *_: store)
    assert tick_of(plain)[0] == expected
    step_bytes = 16 * CONFIG.max_new_tokens + 4 * 4 + 1
    assert kept_bytes - plain_bytes == NUM_SLOTS * steps * step_bytes


def test_memory_estimate_counts_the_records():
    shape = types.SimpleNamespace(vocabulary_size=hashed_model.VOCABULARY_SIZE)
    model = types.SimpleNamespace(language_model=MODEL, config=shape)
    plain = dataclasses.replace(CONFIG, record_proposals=False)
    kept, without = (memory.estimate_slot_bytes(model, config) for config in (CONFIG, plain))
    steps = CONFIG.num_stages * CONFIG.steps_per_stage
    assert kept - without >= 16 * steps * CONFIG.max_new_tokens


@pytest.mark.slow
def test_a_schedule_without_steps_has_empty_records():
    config = dataclasses.replace(CONFIG, num_stages=1, steps_per_stage=0)
    result = run_engine(config=config)
    assert result.info.log_prob.shape == (1, 0, NUM_CHAINS)
    assert result.info.proposal.current_tokens.shape == (1, 0, NUM_CHAINS, CONFIG.max_new_tokens)


def run_sampler(sampler, options, rows, config=CONFIG):
    """Another sampler, ``rows`` rows a chain."""
    params = make_params(num_chains=rows * NUM_CHAINS, num_slots=config.num_slots)
    return hashed_model.run(
        1,
        **CHAINS._asdict(),
        config=config,
        params=params,
        sampler=sampler,
        options=options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("forbid_end_at_cut", [True, False])
def test_published_kernels_record_sane_proposals(forbid_end_at_cut):
    options = published.Options(forbid_end_at_cut=forbid_end_at_cut)
    result = run_sampler("published_entropy_cut", options, rows=1)
    check_continuity(result)
    accepted = 0
    for _, _, chain, info in steps_of(result):
        move = info.proposal
        current = move.current_tokens[: info.current_length]
        proposal = move.proposal_tokens[: info.proposal_length]
        kept = info.cut - 1
        assert current[:kept].tolist() == proposal[:kept].tolist()
        old, new = Completion(chain, current), Completion(chain, proposal)
        for value, expected in (
            (move.current_entropy[: len(current)], old.entropy),
            (move.proposal_entropy[: len(proposal)], new.entropy),
            (move.weight_new, new.log_weight[kept:].sum()),
            (move.weight_old, old.log_weight[kept:].sum()),
            (info.log_ratio, move.weight_new - move.weight_old + move.cut_change),
        ):
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-5)
        assert info.accepted == (info.log_ratio >= move.log_uniform)
        assert not move.stopped
        accepted += info.accepted
    assert accepted > 5


@pytest.mark.slow
def test_multiple_try_runs_beside_it():
    expected, result = (
        run_sampler(
            "multiple_try",
            multiple_try.Options(num_tries=2),
            rows=2,
            config=dataclasses.replace(CONFIG, record_proposals=recorded),
        )
        for recorded in (False, True)
    )
    assert_same(result, expected)


@pytest.mark.parametrize("num_slots", [1, 2, 100])
def test_sums_have_the_same_bits_in_any_batch(num_slots):
    values = np.random.default_rng(0).normal(size=(64, num_slots)).astype(np.float32)
    sum_slots = jax.jit(transition._sum_slots)
    whole = np.asarray(sum_slots(values))
    np.testing.assert_allclose(whole, values.astype(np.float64).sum(axis=1), atol=1e-5)
    assert_same(np.concatenate([sum_slots(values[row : row + 1]) for row in range(64)]), whole)


def wrong_describe(patch, change):
    """``change(record, state, plan, drawn)`` returns what is recorded."""
    original = proposal_record.describe

    def describe(state, plan, drawn, *rest):
        return change(original(state, plan, drawn, *rest), state, plan, drawn)

    patch.setattr(proposal_record, "describe", describe)


def stale_beyond_the_end(patch):
    def completion(trace, prompt_length, config):
        slots = prompt_length[:, None] + jnp.arange(config.max_new_tokens)[None]
        return tuple(jnp.take_along_axis(part, slots, 1) for part in (trace.tokens, trace.entropy))

    patch.setattr(proposal_record, "_completion", completion)


def trace_after_the_step(patch):
    original = transition.settle

    def settle(state, *rest):
        new_state, moved, _ = original(state, *rest)
        return new_state, moved, original(state._replace(trace=new_state.trace), *rest)[2]

    patch.setattr(transition, "settle", settle)


def shared_prefix_left_out(patch):
    def change(record, state, plan, drawn):
        place = state.prompt_length[:, None] + jnp.arange(CONFIG.max_new_tokens)[None]
        shared = place < plan.divergence[:, None]
        return record._replace(proposal_tokens=jnp.where(shared, 0, record.proposal_tokens))

    wrong_describe(patch, change)


def weights_summed_from_the_cut(patch):
    original = proposal_record.describe

    def describe(state, plan, *rest):
        return original(state, plan._replace(divergence=plan.cut_slot), *rest)

    patch.setattr(proposal_record, "describe", describe)


def cut_term_left_out(patch):
    wrong_describe(
        patch, lambda record, *_: record._replace(cut_change=jnp.zeros_like(record.cut_change))
    )


def whole_proposals_called_stopped(patch):
    wrong_describe(patch, lambda record, *rest: record._replace(stopped=rest[2].hopeless))


def steps_of_dropped_clones_kept(patch):
    def read(store, row, info):
        return jax.tree.map(lambda record: record[row], store)

    patch.setattr(proposal_record, "read", read)


def clones_write_into_rows_of_their_own(patch):
    original = proposal_record.write

    def write(store, proposal, rows, owner, chains):
        return original(store, proposal, rows, jnp.arange(NUM_SLOTS), chains)

    patch.setattr(proposal_record, "write", write)


def frozen_chains_left_empty(patch):
    patch.setattr(transition, "fill_records", lambda records, state: records)


def chain_measured_before_the_step(patch):
    original = transition.settle

    def settle(state, *rest):
        new_state, moved, info = original(state, *rest)
        log_prob, _ = transition.measure_completions(state.trace, state.prompt_length)
        return new_state, moved, info._replace(log_prob=log_prob)

    patch.setattr(transition, "settle", settle)


def entropy_divided_by_all_slots(patch):
    original = transition.measure_completions

    def measure_completions(trace, prompt_length):
        return original(trace, jnp.zeros_like(prompt_length))

    patch.setattr(transition, "measure_completions", measure_completions)


MUTANTS = [
    stale_beyond_the_end,
    trace_after_the_step,
    shared_prefix_left_out,
    weights_summed_from_the_cut,
    cut_term_left_out,
    whole_proposals_called_stopped,
    steps_of_dropped_clones_kept,
    clones_write_into_rows_of_their_own,
    frozen_chains_left_empty,
    chain_measured_before_the_step,
    entropy_divided_by_all_slots,
]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(mutant, monkeypatch):
    mutant(monkeypatch)
    # Another identity, for which nothing is compiled yet; ``collect`` does not ask for a model.
    model = MODEL._replace(decode=lambda *arguments: hashed_model.decode(*arguments))
    monkeypatch.setattr(compiled, "collect", jax.jit(lambda *slots: engine.collect(*slots)))
    with pytest.raises(AssertionError):
        check_seeds(model)


def check_seeds(model):
    for seed in SEEDS:
        check(run_engine(seed, model=model))
