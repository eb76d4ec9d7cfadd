"""Samplers of several rows a result behind ``sample``: groups, options, errors.

What each of them draws is the business of its own tests.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ecmh_jax
from ecmh_jax import (
    best_of_n,
    group_sampling,
    multiple_try,
    power_smc,
    published,
    rounds,
    smc,
    tmc,
)
from ecmh_jax.group_sampling import GROUP_SAMPLERS
from tests.toy_chains import NUM_PROMPT_TOKENS, toy_config, toy_prompts
from tests.toy_models import random_toy_model, toy_language_model

OPTIONS = {
    "smc": smc.Options(num_particles=3),
    "power_smc": power_smc.Options(num_particles=3, ramp_tokens=2),
    "tmc": tmc.Options(num_candidates=3, num_kept=2, num_rollouts=2),
    "best_of_n": best_of_n.Options(num_candidates=3),
    "multiple_try": multiple_try.Options(num_tries=3),
    "published_entropy_cut": published.PUBLISHED_ENTROPY_CUT,
    "published_uniform_cut": published.PUBLISHED_UNIFORM_CUT,
}
NUM_RESULTS = 5


@pytest.fixture(scope="module")
def toy():
    model = random_toy_model(np.random.default_rng(3), vocabulary_size=3, horizon=4)
    config = toy_config(model, num_stages=2, steps_per_stage=2, refine_finished=True)
    return *toy_language_model(model, NUM_PROMPT_TOKENS), config


def sample(toy, sampler, options, rows=slice(None), **settings):
    """Some of five results."""
    language_model, params, config = toy
    prompts, lengths = (field[rows] for field in toy_prompts(NUM_RESULTS))
    prompt_ids = np.array([0, 0, 1, 1, 2], np.int32)[rows]
    chain_ids = np.array([0, 1, 0, 1, 0], np.int32)[rows]
    tuning = ecmh_jax.make_tuning(len(prompts), power=jnp.linspace(2.0, 4.0, NUM_RESULTS)[rows])
    return ecmh_jax.sample(
        jax.random.key(0),
        language_model,
        params,
        prompts,
        lengths,
        tuning,
        config,
        sampler=sampler,
        prompt_ids=prompt_ids,
        chain_ids=chain_ids,
        options=options,
        **settings,
    )


def test_every_sampler_of_this_kind_is_tested():
    assert set(OPTIONS) == set(GROUP_SAMPLERS)
    assert set(GROUP_SAMPLERS) < set(ecmh_jax.SAMPLERS)


@pytest.mark.parametrize("sampler", OPTIONS)
def test_groups_change_nothing(toy, sampler):
    """Five results at once, and in groups of two of which the last is filled up."""
    options = OPTIONS[sampler]
    whole = sample(toy, sampler, options)
    rows = GROUP_SAMPLERS[sampler].module.rows_per_chain(options)
    parts = sample(toy, sampler, options, num_slots=2 * rows + 1)
    assert whole.trace.tokens.shape[0] == NUM_RESULTS
    assert (np.asarray(whole.stats.decoded) > 0).all()
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


@pytest.mark.parametrize("sampler", OPTIONS)
def test_rounds_are_one_scan(toy, sampler):
    """Driven from the host a round at a time, a sampler is its own single program."""
    language_model, params, config = toy
    prompts, lengths = map(jnp.asarray, toy_prompts(2))
    identity = jnp.arange(2, dtype=jnp.int32)
    tuning = ecmh_jax.make_tuning(2, power=3.0)
    batch = rounds.Batch(prompts, lengths, identity, identity, tuning)
    build = GROUP_SAMPLERS[sampler].module.build

    @jax.jit
    def whole(params):
        key = jax.random.key(7)
        return rounds.run(build, key, language_model, params, batch, config, OPTIONS[sampler])

    by_round = ecmh_jax.sample(
        jax.random.key(7),
        language_model,
        params,
        prompts,
        lengths,
        tuning,
        config,
        sampler=sampler,
        prompt_ids=identity,
        chain_ids=identity,
        options=OPTIONS[sampler],
    )
    # Compiled as another program, the last bits may differ.
    jax.tree.map(
        lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5),
        whole(params),
        by_round,
    )
    np.testing.assert_array_equal(whole(params).trace.tokens, by_round.trace.tokens)


@pytest.mark.parametrize("num_slots", [None, 3])
def test_a_budget_reaches_its_result(toy, num_slots):
    """Each result of best-of-N stops with the candidate that crosses its own budget."""
    options = best_of_n.Options(num_candidates=6, rows=3)
    unlimited = sample(toy, "best_of_n", options).info
    decoded = np.asarray(unlimited.candidates.length) - 2
    budget = np.array([1, 5, 9, 40, 3], np.int32)
    limited = sample(toy, "best_of_n", options, budget=budget, num_slots=num_slots)
    for row in range(NUM_RESULTS):
        crossed = np.flatnonzero(np.cumsum(decoded[row]) >= budget[row])
        expected = crossed[0] + 1 if len(crossed) else 6
        assert limited.info.num_used[row] == expected
        assert limited.stats.decoded[row] == decoded[row, :expected].sum()
    assert len(set(np.asarray(limited.info.num_used).tolist())) > 1


def test_bad_budgets_are_named(toy):
    with pytest.raises(ValueError, match="budget is given for sampler 'smc'; expected None"):
        sample(toy, "smc", None, budget=np.ones(NUM_RESULTS, np.int32))
    with pytest.raises(ValueError, match="budget holds 0; expected at least 1"):
        sample(toy, "best_of_n", None, budget=np.array([1, 1, 0, 1, 1]))
    with pytest.raises(ValueError, match=r"budget are float.*; expected integers of shape \(5,\)"):
        sample(toy, "best_of_n", None, budget=np.ones(NUM_RESULTS))


@pytest.mark.parametrize("sampler", OPTIONS)
def test_results_are_on_their_own_axis(toy, sampler):
    """Every leaf of ``info`` holds the results where the table says."""
    info = sample(toy, sampler, OPTIONS[sampler], num_slots=2 * 12).info
    for name, field in info._asdict().items():
        axis = GROUP_SAMPLERS[sampler].result_axis.get(name, 0)
        for leaf in jax.tree.leaves(field):
            assert leaf.shape[axis] == NUM_RESULTS, name


def test_wrong_options(toy):
    with pytest.raises(ValueError, match=r"expected ecmh_jax\.smc\.Options for sampler 'smc'"):
        sample(toy, "smc", tmc.Options())
    with pytest.raises(ValueError, match="num_particles is 0"):
        sample(toy, "smc", smc.Options(num_particles=0))
    with pytest.raises(ValueError, match="expected None for sampler 'entropy_cut'"):
        sample(toy, "entropy_cut", smc.Options())
    with pytest.raises(ValueError, match="'magic'; expected one of entropy_cut"):
        sample(toy, "magic", None)
    with pytest.raises(ValueError, match="num_slots is 2; expected at least 3, the rows that one"):
        sample(toy, "smc", OPTIONS["smc"], num_slots=2)


def test_defaults_are_the_modules_own():
    for sampler, (module, default, _) in GROUP_SAMPLERS.items():
        assert group_sampling.check_options(sampler, None) == default
        assert isinstance(default, module.Options)
    assert GROUP_SAMPLERS["published_uniform_cut"].default.cut == "uniform_cut"
