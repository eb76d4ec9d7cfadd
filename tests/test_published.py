"""The published code's steps: the enumerated faulty kernel, and how far it is from p^power."""

import dataclasses

import jax
import numpy as np
import pytest

from ecmh_jax import ecmh, make_tuning, published, rounds
from tests import exactness_table, oracle, toy_chains
from tests.oracle_mutants import embed, mutant_transition_matrix
from tests.toy_models import random_toy_model, toy_language_model

DRAWS = 4096  # chains started from every state
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes far longer than running
EXACT = published.Options("entropy_cut", False, False, False, False)


def settings(mutant, sampler):
    """The options that have the faults of a mutant of ``tests.oracle_mutants``."""
    options = dataclasses.replace(EXACT, cut=sampler)
    faults = {
        None: {},
        "published": {
            "cap_at_current_length": True,
            "slice_current_suffix": True,
            "forbid_end_at_cut": True,
            "omit_uniform_cut_term": True,
        },
        "capped_at_current_length": {"cap_at_current_length": True},
        "sliced_suffix": {"slice_current_suffix": True},
        "eos_masked_at_cut": {"forbid_end_at_cut": True},
        "no_cut_term": {"omit_uniform_cut_term": True},
    }
    return dataclasses.replace(options, **faults[mutant])


def excess(options, mutant, sampler, seed=6):
    """Largest |frequency - probability| beyond 6 standard errors + 0.002, after 1 and 2 steps."""
    model = random_toy_model(np.random.default_rng(seed), 3, 3, -0.5)
    config = toy_chains.toy_config(model)
    space, transitions = mutant_transition_matrix(
        model, 3, mutant, 2.0, 1.0, 0.1, 0.6, sampler=sampler
    )
    num_states = len(space.states)
    starts = np.repeat(np.arange(num_states), DRAWS)
    tuning = make_tuning(len(starts), 2.0, 0.6, 1.0, 0.1)
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
    kernel = jax.jit(
        published.build_kernel(language_model, config, options), compiler_options=QUICK
    )
    state = toy_chains.state_on(model, space, starts, config, tuning)
    largest = -np.inf
    for step in (1, 2):
        state, info = kernel(jax.random.key(0), state, params, tuning)
        assert np.all(info.decoded == info.proposal_length - info.cut + 1)
        ends = toy_chains.rows_of(state.trace, space)
        if (ends < 0).any():
            return np.inf
        counts = np.zeros((num_states, num_states))
        np.add.at(counts, (starts, ends), 1)
        expected = np.linalg.matrix_power(transitions, step)
        standard_error = np.sqrt(np.maximum(expected * (1 - expected), 0.0) / DRAWS)
        beyond = np.abs(counts / DRAWS - expected) - 6 * standard_error - 0.002
        largest = max(largest, float(beyond.max()))
    return largest


@pytest.mark.parametrize(
    ("mutant", "sampler"),
    [
        ("published", "entropy_cut"),
        ("published", "uniform_cut"),
        pytest.param("capped_at_current_length", "entropy_cut", marks=pytest.mark.slow),
        pytest.param("sliced_suffix", "entropy_cut", marks=pytest.mark.slow),
        pytest.param("eos_masked_at_cut", "entropy_cut", marks=pytest.mark.slow),
        pytest.param("no_cut_term", "uniform_cut", marks=pytest.mark.slow),
        (None, "entropy_cut"),
        (None, "uniform_cut"),
    ],
)
def test_kernel_has_the_enumerated_transitions_of_its_faults(mutant, sampler):
    options = settings(mutant, sampler)
    assert excess(options, mutant, sampler) < 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "missing", ["cap_at_current_length", "slice_current_suffix", "forbid_end_at_cut"]
)
def test_every_fault_is_seen(missing):
    options = dataclasses.replace(published.PUBLISHED_ENTROPY_CUT, **{missing: False})
    assert excess(options, "published", "entropy_cut") > 0


def test_the_uniform_cut_term_is_seen():
    # Alone: a capped proposal is never longer, so that the term only ever favours it.
    assert excess(settings(None, "uniform_cut"), "no_cut_term", "uniform_cut") > 0


def run(model, config, num_chains, options):
    """A whole schedule on a toy model, compiled; without options that of ``ecmh``."""
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
    prompts, lengths = toy_chains.toy_prompts(1)
    identity = np.arange(num_chains, dtype=np.int32)

    def call(params, tuning):
        batch = rounds.Batch(
            np.repeat(prompts, num_chains, axis=0),
            np.repeat(lengths, num_chains),
            np.zeros_like(identity),
            identity,
            tuning,
        )
        key = jax.random.key(0)
        if options is None:
            return ecmh.run(key, language_model, params, *batch[:5], config)
        return rounds.run(published.build, key, language_model, params, batch, config, options)

    return jax.jit(call, compiler_options=QUICK)(params, make_tuning(num_chains, power=4.0))


def test_published_law_is_not_the_target():
    """After 10 steps on a model that often ends: TV above 0.2, the exact kernel's below 0.1.

    A frequency of 4000 results lies within 0.04 in total variation of its law here.
    """
    model = exactness_table.table_models(exactness_table.EOS_BOOSTS["EOS-heavy"])[2]
    config = toy_chains.toy_config(model, steps_per_stage=10, refine_finished=True)
    num_chains = 4000
    stage = oracle.state_space(model, model.horizon)
    distances = {}
    for name, options in (
        ("exact", None),
        ("entropy_cut", published.PUBLISHED_ENTROPY_CUT),
        ("uniform_cut", published.PUBLISHED_UNIFORM_CUT),
    ):
        cut = "uniform_cut" if name == "uniform_cut" else "entropy_cut"
        mutant = None if name == "exact" else "published"
        space, step = mutant_transition_matrix(model, model.horizon, mutant, 4.0, sampler=cut)
        goal = embed(oracle.target(model, model.horizon, 4.0), stage, space)
        start = embed(oracle.extension_law(model, (), model.horizon, 0.25), stage, space)
        law = start @ np.linalg.matrix_power(step, 10)
        result = run(model, config, num_chains, options)
        rows = toy_chains.rows_of(result.trace, space)
        assert rows.min() >= 0
        frequency = np.bincount(rows, minlength=len(space.states)) / num_chains
        assert oracle.total_variation(frequency, law) < 0.04
        distances[name] = oracle.total_variation(frequency, goal)
    assert distances["exact"] < 0.1
    assert min(distances["entropy_cut"], distances["uniform_cut"]) > 0.2


def test_a_short_trace_grows_by_one_stage_and_stays_short():
    model = random_toy_model(np.random.default_rng(4), 3, 4, -1.0)
    config = toy_chains.toy_config(model, num_stages=2, steps_per_stage=6)
    result = run(model, config, 400, published.PUBLISHED_ENTROPY_CUT)
    lengths = np.asarray(result.trace.length) - toy_chains.NUM_PROMPT_TOKENS
    last = np.asarray(result.trace.tokens)[np.arange(400), lengths + 1]
    unfinished = last != model.eos_id
    assert np.any(unfinished & (lengths < 4))
    assert lengths.max() <= 4
    assert np.all(np.diff(np.asarray(result.info.current_length[0]), axis=0) <= 0)


def test_runs_uncompiled_and_alone():
    model = random_toy_model(np.random.default_rng(1), 3, 1)
    config = toy_chains.toy_config(model)
    together = run(model, config, 3, published.PUBLISHED_ENTROPY_CUT)
    with jax.disable_jit():
        alone = run(model, config, 1, published.PUBLISHED_ENTROPY_CUT)
    np.testing.assert_array_equal(alone.trace.tokens[0], together.trace.tokens[0])


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="cut is 'entropy'"):
        published.check_options(published.Options("entropy"))
    published.check_options(published.PUBLISHED_UNIFORM_CUT)
    assert published.rows_per_chain(published.PUBLISHED_UNIFORM_CUT) == 1
