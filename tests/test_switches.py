"""Replay, early rejection and faults, step by step in lockstep."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from ecmh_jax import make_tuning
from tests.hashed_model import (
    CONFIG,
    EOS,
    LENGTHS,
    PROMPTS,
    SWITCH_TUNINGS,
    TUNING,
    assert_same,
    assert_valid,
    host_loop,
    make_params,
    run_lockstep,
)


def test_scan_is_a_loop_over_extend_and_kernel():
    result = run_lockstep()
    states, infos = host_loop(CONFIG)
    assert_same(result.trace, states[-1].trace)
    assert_same(result.stats, states[-1].stats)
    assert_same(result.finite, states[-1].finite)
    steps = [info for info in infos if info is not None]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(2, 3, 3), *steps)
    assert_same(result.info, stacked)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("early_rejection", [True, False])
def test_a_fault_in_a_proposal_freezes_the_chain_alone(value, early_rejection):
    config = dataclasses.replace(CONFIG, early_rejection=early_rejection)
    states, infos = host_loop(config)
    step = next(step for step, info in enumerate(infos) if info is not None and info.decoded[1])
    everywhere = np.zeros((3, CONFIG.num_slots))
    everywhere[1] = value
    faulty_states, faulty_infos = host_loop(config, faults={step: make_params(everywhere)})
    before, after = states[step - 1], faulty_states[step]
    np.testing.assert_array_equal(after.finite, [True, False, True])
    np.testing.assert_array_equal(after.frozen, [False, True, False])
    assert faulty_infos[step].attempted[1]
    assert_valid(faulty_states[-1].trace, TUNING, config, PROMPTS, LENGTHS, after.finite)
    for later, clean in zip(faulty_states[step:], states[step:], strict=True):
        assert_same(*(jax.tree.map(lambda leaf: leaf[1], s.trace) for s in (later, before)))
        assert later.stats.accepted[1] == before.stats.accepted[1]
        assert later.stats.attempted[1] == before.stats.attempted[1] + 1
        # A cache may differ beyond the slots that it promises to hold.
        assert_same(
            *(jax.tree.map(lambda leaf: leaf[[0, 2]], s._replace(cache=())) for s in (later, clean))
        )
    for info in faulty_infos[step:]:
        assert info is None or not info.accepted[1]


@pytest.mark.parametrize("kind", SWITCH_TUNINGS)
@pytest.mark.parametrize("refine_finished", [True, False])
@pytest.mark.parametrize("uniform_mix", [0.05, 1.0], ids=["entropy_cut", "uniform_cut"])
def test_replay_and_early_rejection_change_no_token(kind, refine_finished, uniform_mix):
    powers, inverse_temperatures = (np.array(values) for values in SWITCH_TUNINGS[kind])
    chosen = make_tuning(3, powers, 1 / inverse_temperatures, 1.0, uniform_mix)
    totals, num_ended = {}, 0
    for seed in range(10):
        plain_states, plain_infos = None, None
        for replay, early_rejection in itertools.product((False, True), repeat=2):
            config = dataclasses.replace(
                CONFIG,
                refine_finished=refine_finished,
                replay=replay,
                early_rejection=early_rejection,
            )
            states, infos = host_loop(config, seed, chosen)
            if plain_states is None:
                plain_states, plain_infos = states, infos
                assert_valid(states[-1].trace, chosen, config, PROMPTS, LENGTHS)
                first = states[3].trace  # after stage 1
                ended = first.tokens[np.arange(3), first.length - 1] == EOS
                steps = np.where(ended & (not refine_finished), 3, 6)
                assert_same(states[-1].stats.attempted, steps)
                num_ended += ended.sum()
            for state, plain in zip(states, plain_states, strict=True):
                assert_same(state.trace, plain.trace)
                assert_same((state.finite, state.frozen), (plain.finite, plain.frozen))
                for name in ("attempted", "accepted", "null_moves"):
                    assert_same(getattr(state.stats, name), getattr(plain.stats, name))
            for info, plain in zip(infos, plain_infos, strict=True):
                for name in ("attempted", "accepted", "cut", "divergence", "current_length"):
                    assert info is None or np.array_equal(getattr(info, name), getattr(plain, name))
            stats = jax.tree.map(np.sum, states[-1].stats)
            total = totals.setdefault((replay, early_rejection), jax.tree.map(np.zeros_like, stats))
            totals[replay, early_rejection] = jax.tree.map(np.add, total, stats)
    assert 0 < num_ended < 30
    for (replay, early_rejection), total in totals.items():
        assert total.null_moves > 0
        assert total.accepted < total.attempted
        assert (total.replayed > 0) == replay
        assert (total.saved > 0) == (early_rejection and kind != "outside")
    decoded = {switches: int(total.decoded) for switches, total in totals.items()}
    assert decoded[True, True] < decoded[False, True] <= decoded[False, False]
    assert decoded[True, True] <= decoded[True, False] < decoded[False, False]
    if kind != "outside":
        assert decoded[False, True] < decoded[False, False]
        assert decoded[True, True] < decoded[True, False]


def test_switches_change_nothing_where_chains_fail():
    # Chains that ended early meet the fault in a proposal, some of them after a certain rejection.
    fault = np.zeros((3, CONFIG.num_slots))
    fault[:, 5] = np.nan
    faults = dict.fromkeys(range(8), make_params(fault))
    chosen = make_tuning(3, [2.0, 4.0, 4.0], [1.0, 0.5, 1.0], 1.0, 0.05)
    failed_in_a_step = 0
    for seed in range(60):
        plain = None
        for replay, early_rejection in itertools.product((False, True), repeat=2):
            config = dataclasses.replace(CONFIG, replay=replay, early_rejection=early_rejection)
            states, _ = host_loop(config, seed, chosen, faults)
            kept = [(s.trace, s.finite, s.frozen, s.stats.accepted) for s in states]
            plain = kept if plain is None else plain
            assert_same(kept, plain)
            assert early_rejection or not states[-1].stats.saved.any()
        failed_in_a_step += (states[4].finite & ~states[7].finite).sum()
    assert failed_in_a_step > 3
