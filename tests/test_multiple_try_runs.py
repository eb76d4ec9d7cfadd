"""Whole multiple-try runs: the final law, what switches change, what it costs, what may fail."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import compiled, make_tuning, multiple_try, rounds
from tests import enumeration, oracle, toy_chains
from tests.multiple_try_oracle import multiple_try_matrix
from tests.toy_models import random_toy_model, toy_language_model

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes far longer than running


@functools.partial(jax.jit, static_argnames=("model", "config", "options"), compiler_options=QUICK)
def jitted_run(rng_key, params, prompts, lengths, identities, tuning, *, model, config, options):
    batch = rounds.Batch(prompts, lengths, *identities, tuning)
    return rounds.run(multiple_try.build, rng_key, model, params, batch, config, options)


def run(model, config, num_tries, chain_ids, seed=0, run=jitted_run, skip=0.0, **tuning):
    """The whole schedule for results with the given chain ids, prompt 0 or 1 by their parity."""
    chain_ids = np.asarray(chain_ids, np.int32)
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
    prompts, lengths = toy_chains.toy_prompts(2)
    return run(
        jax.random.key(seed),
        params,
        prompts[chain_ids % 2],
        lengths[chain_ids % 2],
        (chain_ids % 2, chain_ids),
        make_tuning(len(chain_ids), **tuning),
        model=language_model,
        config=config,
        options=multiple_try.Options(num_tries, skip),
    )


def long_toy(eos_boost=-1.0):
    return random_toy_model(np.random.default_rng(11), 3, 4, eos_boost)


def test_one_try_is_the_ordinary_step_token_for_token():
    model = long_toy()
    config = toy_chains.toy_config(
        model, num_stages=2, steps_per_stage=3, refine_finished=True, early_rejection=False
    )
    chain_ids = np.arange(40, dtype=np.int32)
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
    prompts, lengths = toy_chains.toy_prompts(2)
    ordinary = compiled.run(
        jax.random.key(0),
        params,
        prompts[chain_ids % 2],
        lengths[chain_ids % 2],
        chain_ids % 2,
        chain_ids,
        make_tuning(40, power=2.0),
        model=language_model,
        config=config,
    )
    result = run(model, config, 1, chain_ids, power=2.0)
    jax.tree.map(np.testing.assert_array_equal, result.trace, ordinary.trace)
    jax.tree.map(np.testing.assert_array_equal, result.stats, ordinary.stats)
    for name in ("accepted", "cut", "divergence", "proposal_length", "decoded"):
        np.testing.assert_array_equal(getattr(result.info, name), getattr(ordinary.info, name))
    assert 0 < int(result.stats.accepted.sum()) < int(result.stats.attempted.sum())


@pytest.mark.parametrize("refine_finished", [False, True])
def test_schedule_has_the_enumerated_final_law(refine_finished, monkeypatch):
    def transition_matrix(model, horizon, *settings):
        return multiple_try_matrix(model, horizon, 2, *settings)

    monkeypatch.setattr(oracle, "transition_matrix", transition_matrix)
    model, num_results = long_toy(), 5000
    expected = oracle.final_law(
        model, 2, 2, 2, power=2.0, cut_power=1.0, refine_finished=refine_finished
    )
    config = toy_chains.toy_config(
        model, num_stages=2, steps_per_stage=2, refine_finished=refine_finished
    )
    result = run(model, config, 2, np.arange(num_results), power=2.0, cut_power=1.0)
    space = enumeration.state_space(model, model.horizon)
    rows = toy_chains.rows_of(result.trace, space)
    frequency = np.bincount(rows, minlength=len(space.states)) / num_results
    standard_error = np.sqrt(expected * (1 - expected) / num_results)
    assert np.all(np.abs(frequency - expected) < 6 * standard_error + 1e-4)


@pytest.mark.slow
def test_replay_and_certain_rejection_change_the_work_alone():
    model = long_toy()
    results = []
    for replay, early_rejection in itertools.product((False, True), repeat=2):
        config = toy_chains.toy_config(
            model,
            num_stages=2,
            steps_per_stage=4,
            refine_finished=True,
            replay=replay,
            early_rejection=early_rejection,
        )
        results.append(run(model, config, 3, np.arange(500), power=4.0, cut_power=1.0))
    plain, stopped, replayed, both = results
    for other in (stopped, replayed, both):
        jax.tree.map(np.testing.assert_array_equal, other.trace, plain.trace)
        np.testing.assert_array_equal(other.info.accepted, plain.info.accepted)
        np.testing.assert_array_equal(other.info.cut, plain.info.cut)
        np.testing.assert_array_equal(other.finite, plain.finite)
    np.testing.assert_array_equal(replayed.info.chosen, plain.info.chosen)
    assert int(plain.stats.saved.sum()) == int(plain.stats.replayed.sum()) == 0
    work = [int(result.stats.decoded.sum()) for result in results]
    assert work[0] > work[1] > work[3]
    assert work[0] > work[2] > work[3]
    np.testing.assert_array_equal(
        plain.stats.decoded, replayed.stats.decoded + replayed.stats.replayed
    )


@pytest.mark.parametrize("replay", [False, True])
@pytest.mark.parametrize("early_rejection", [False, True])
def test_every_decoded_token_is_counted(replay, early_rejection):
    num_tries, model = 3, long_toy(eos_boost=-80.0)  # nothing ends: every length is the horizon
    config = toy_chains.toy_config(
        model, num_stages=2, steps_per_stage=3, replay=replay, early_rejection=early_rejection
    )
    result = run(model, config, num_tries, np.arange(30), power=4.0, cut_power=1.0)
    stats, info = result.stats, result.info
    horizon = np.array([2, 4])[:, None, None]
    suffix_lengths = horizon - np.asarray(info.cut) + 1
    np.testing.assert_array_equal(info.current_length, np.broadcast_to(horizon, info.cut.shape))
    np.testing.assert_array_equal(stats.attempted, 6)
    np.testing.assert_array_equal(stats.decoded, model.horizon + info.decoded.sum(axis=(0, 1)))
    everything = stats.decoded + stats.replayed + stats.saved - model.horizon
    if replay or not early_rejection:
        np.testing.assert_array_equal(everything, num_tries * suffix_lengths.sum(axis=(0, 1)))
    assert bool(stats.replayed.any()) == replay
    assert bool(stats.saved.any()) == early_rejection
    assert np.all((info.effective_tries >= 1) & (info.effective_tries <= num_tries + 1e-5))
    assert np.all((info.chosen >= 0) & (info.chosen < num_tries))
    assert len(np.unique(info.chosen)) == num_tries
    np.testing.assert_array_equal(stats.accepted, info.accepted.sum(axis=(0, 1)))
    assert np.all(np.asarray(info.accepted)[np.asarray(info.log_acceptance) >= 0])


def test_a_result_does_not_depend_on_its_neighbours():
    model = long_toy()
    config = toy_chains.toy_config(model, num_stages=2, steps_per_stage=3)
    together = run(model, config, 3, [5, 0, 3, 8, 1], power=2.0)
    alone = run(model, config, 3, [3], power=2.0)
    jax.tree.map(
        lambda one, all_: np.testing.assert_array_equal(one[0], all_[2]),
        alone.trace,
        together.trace,
    )
    jax.tree.map(
        lambda one, all_: np.testing.assert_array_equal(one[..., 0], all_[..., 2]),
        alone.info,
        together.info,
    )
    other_seed = run(model, config, 3, [5, 0, 3, 8, 1], seed=1, power=2.0)
    assert np.any(other_seed.trace.tokens != together.trace.tokens)


@pytest.mark.slow
def test_runs_uncompiled():
    model = random_toy_model(np.random.default_rng(1), 3, 1)
    config = toy_chains.toy_config(model)
    expected = run(model, config, 2, [0], power=2.0)
    with jax.disable_jit():
        result = run(model, config, 2, [0], run=jitted_run.__wrapped__, power=2.0)
    np.testing.assert_array_equal(result.trace.tokens, expected.trace.tokens)


def test_a_stage_may_have_no_steps():
    config = toy_chains.toy_config(long_toy(), steps_per_stage=0)
    result = run(long_toy(), config, 2, [0, 1], power=2.0)
    assert result.info.chosen.shape == (1, 0, 2)
    np.testing.assert_array_equal(result.stats.attempted, 0)


def test_a_try_that_is_not_finite_is_never_picked():
    model = random_toy_model(np.random.default_rng(3), 3, 3, eos_boost=-4.0)
    broken, safe = [token for token in range(3) if token != model.eos_id]
    space = enumeration.state_space(model, 3)
    start = space.states.index((safe, safe, safe))
    model.logits[0] = np.where(np.arange(3) == model.eos_id, -4.0, 0.0)
    model.logits[1 + broken] = np.nan  # what follows the first token `broken`
    failed = {}
    for num_tries in (1, 4):
        config = toy_chains.toy_config(model, early_rejection=False)
        tuning = make_tuning(400, power=1.0, uniform_mix=1.0)
        language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
        state = toy_chains.state_on(
            dataclasses.replace(model, logits=np.nan_to_num(model.logits)),
            space,
            np.full(400, start),
            config,
            tuning,
        )
        kernel = multiple_try.build_kernel(language_model, config, multiple_try.Options(num_tries))
        after, _ = jax.jit(kernel)(jax.random.key(0), state, params, tuning)
        ends = toy_chains.rows_of(after.trace, space)
        assert all(space.states[row][0] != broken for row in ends)
        assert np.all(ends[~np.asarray(after.finite)] == start)
        np.testing.assert_array_equal(after.frozen, ~after.finite)
        failed[num_tries] = int((~after.finite).sum())
    assert failed[1] > 2 * failed[4] > 0


def test_certain_rejection_bounds_what_later_weights_can_bring():
    rng = np.random.default_rng(0)
    bounds = -3.0 * rng.random((2000, 3)).astype(np.float32)
    weights = bounds - 2.0 * rng.random((2000, 3)).astype(np.float32)
    highest = multiple_try.log_acceptance(jnp.asarray(bounds), jnp.asarray(bounds.argmax(axis=1)))
    for chosen in range(3):
        reached = multiple_try.log_acceptance(
            jnp.asarray(weights), jnp.full(2000, chosen, jnp.int32)
        )
        assert np.all(reached <= highest + 1e-6)


@pytest.mark.parametrize("num_tries", [0, -1, 2.0, "4"])
def test_bad_options_are_named(num_tries):
    with pytest.raises(ValueError, match=f"num_tries is {num_tries!r}"):
        multiple_try.check_options(multiple_try.Options(num_tries))
    multiple_try.check_options(multiple_try.Options())
    assert multiple_try.rows_per_chain(multiple_try.Options(3)) == 3


def test_blocks_of_low_entropy_are_skipped():
    model = random_toy_model(np.random.default_rng(4), 3, 4, -1.0, scale=1.0)
    config = toy_chains.toy_config(model, num_stages=2, steps_per_stage=3)
    chain_ids = np.arange(60)
    none, all_ = (run(model, config, 2, chain_ids, skip=skip, power=1.0) for skip in (0.0, 100.0))
    assert np.asarray(none.info.attempted)[0].all()
    assert not np.asarray(all_.info.attempted).any()
    # There nothing was ever changed: the blocks are as they were drawn.
    first = toy_chains.NUM_PROMPT_TOKENS
    lengths = np.minimum(np.asarray(all_.trace.length) - first, config.stage_length)
    drawn = np.asarray(all_.trace.entropy)[:, first : first + config.stage_length]
    means = drawn.sum(axis=1) / lengths
    values = np.sort(means)
    gap = 6 + np.diff(values[6:-6]).argmax()  # no rounding decides
    threshold = float(values[gap : gap + 2].mean())
    some = run(model, config, 2, chain_ids, skip=threshold, power=1.0)
    # A stage is skipped as a whole, by the entropy of the block that it has just drawn.
    attempted = np.asarray(some.info.attempted)
    assert (attempted == attempted[:, :1]).all()
    skipped = ~attempted[0, 0]
    assert 5 < skipped.sum() < 55
    np.testing.assert_array_equal(skipped, means < threshold)
    # A skipped chain goes on in the next stage.
    unfinished = np.asarray(all_.trace.length) - first > config.stage_length
    assert (np.asarray(some.trace.length)[skipped & unfinished] - first > config.stage_length).all()


def test_bad_thresholds_are_named():
    for value in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="inexact_skip_below is"):
            multiple_try.check_options(multiple_try.Options(2, value))
