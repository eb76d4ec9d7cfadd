"""``sample`` end to end: identity of chains, what a trace holds, shapes, and compilations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import checks, make_tuning, random_keys, sample
from tests import enumeration, hashed_model, oracle, toy_chains
from tests.hashed_model import (
    CONFIG,
    EOS,
    LENGTHS,
    MODEL,
    PAD,
    PROMPTS,
    TUNING,
    assert_same,
    assert_valid,
    fault_at,
    make_params,
    rows_of,
    run,
    start,
)
from tests.toy_models import random_toy_model, toy_language_model


def test_traces_hold_what_their_tokens_say():
    lengths = set()
    for seed in range(20):
        result = run(seed)
        assert_valid(result.trace, TUNING, CONFIG, PROMPTS, LENGTHS)
        assert result.finite.all()
        assert result.info.cut.shape == (2, 3, 3)
        np.testing.assert_array_equal(result.stats.attempted, [6, 6, 6])
        np.testing.assert_array_equal(result.stats.accepted, result.info.accepted.sum((0, 1)))
        lengths |= set((result.trace.length - LENGTHS).tolist())
    assert len(lengths) > 3


def test_a_chain_does_not_depend_on_its_row_nor_on_its_neighbours():
    prompt_ids, chain_ids = np.array([4, 0, 9]), np.array([1, 1, 0])
    result = run(prompt_ids=prompt_ids, chain_ids=chain_ids)
    assert_same(run(prompt_ids=prompt_ids, chain_ids=chain_ids), result)
    order = np.array([2, 0, 1])
    permuted = run(
        prompts=PROMPTS[order],
        prompt_lengths=LENGTHS[order],
        tuning=jax.tree.map(lambda leaf: leaf[order], TUNING),
        prompt_ids=prompt_ids[order],
        chain_ids=chain_ids[order],
    )
    assert_same(permuted, rows_of(result, order))
    prompts = PROMPTS + np.array([[0], [1], [2]], np.int32)
    prompts[0, 2] += 1  # beyond the prompt's length
    neighbours = run(
        prompts=prompts,
        prompt_lengths=np.array([2, 3, 1]),
        tuning=make_tuning(3, [4.0, 3.0, 2.0], [0.25, 0.5, 0.5], 1.0, [0.0, 0.3, 0.4]),
        prompt_ids=np.array([4, 1, 2]),
        chain_ids=np.array([1, 5, 6]),
    )
    assert_same(rows_of(neighbours, [0]), rows_of(result, [0]))


def test_seed_prompt_and_chain_each_change_the_draws():
    settings = {
        "prompts": np.tile(PROMPTS[:1], (3, 1)),
        "prompt_lengths": np.array([2, 2, 2]),
        "tuning": make_tuning(3, 1.0),
    }
    tokens = np.stack(
        [
            run(seed, prompt_ids=[0, 0, 7], chain_ids=[0, 7, 0], **settings).trace.tokens
            for seed in range(10)
        ]
    )
    for chain in range(3):
        assert len(np.unique(tokens[:, chain], axis=0)) > 3
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.any(tokens[:, one] != tokens[:, other], axis=-1).sum() > 3
    default, named = (
        run(**settings, **ids) for ids in ({}, {"prompt_ids": [0, 0, 0], "chain_ids": [0, 1, 2]})
    )
    assert_same(default, named)


def test_chains_start_with_their_prompts_alone():
    trace = jax.tree.map(np.asarray, start().trace)
    expected = np.full((3, CONFIG.num_slots), PAD)
    for row, length in enumerate(LENGTHS):
        expected[row, :length] = PROMPTS[row, :length]
    np.testing.assert_array_equal(trace.tokens, expected)
    np.testing.assert_array_equal(trace.length, LENGTHS)
    for statistic in (trace.log_prob, trace.log_q, trace.log_weight, trace.entropy):
        np.testing.assert_array_equal(statistic, np.zeros((3, CONFIG.num_slots)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_fault_while_extending_freezes_the_chain_alone(value):
    # Row 0 has two prompt tokens and three of stage 1: slot 5 is the first of stage 2.
    for seed in range(12):
        clean = run(seed)
        result = run(seed, params=fault_at(0, 5, value))
        np.testing.assert_array_equal(result.finite[1:], [True, True])
        assert_same(rows_of(result, [1, 2]), rows_of(clean, [1, 2]))
        assert_valid(result.trace, TUNING, CONFIG, PROMPTS, LENGTHS, result.finite)
        first_stage = jax.tree.map(lambda leaf: leaf[0, :, :1], (result.info, clean.info))
        assert_same(*first_stage)
        if not result.finite[0]:
            break
    assert not result.finite[0]
    assert not result.info.attempted[1, :, 0].any()
    assert not result.info.accepted[1, :, 0].any()
    # The prompt and stage 1 are there, and the one token that was drawn before the fault.
    assert result.trace.length[0] == 6


def test_no_two_draws_share_a_number():
    size = 3
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 4, indexing="ij"), axis=-1).reshape(-1, 4)

    @jax.jit
    def draws(rng_key, prompt_id, chain_id, stage, step):
        keys = random_keys.step_keys(
            random_keys.chain_keys(rng_key, prompt_id, chain_id), stage, step
        )
        positions = jnp.broadcast_to(jnp.arange(size), (len(grid), size))
        tokens = [
            random_keys.token_uniforms(keys, jnp.full_like(stage, slot)) for slot in range(size)
        ]
        cut, accept = random_keys.cut_uniform(keys), random_keys.accept_uniform(keys)
        stay = random_keys.stay_uniform(keys, positions)
        return jnp.concatenate([cut[:, None], accept[:, None], stay, *tokens], axis=1)

    numbers = np.concatenate([draws(jax.random.key(seed), *grid.T) for seed in range(2)])
    assert numbers.shape == (2 * size**4, 2 + size + 2 * size)
    assert (numbers >= 0).all()
    assert (numbers < 1).all()
    # Of 1,782 numbers out of 2^23, 0.2 pairs are equal by chance.
    assert len(np.unique(numbers)) >= numbers.size - 2


SHORT = dataclasses.replace(CONFIG, steps_per_stage=0)  # quick to compile


@pytest.fixture(scope="module")
def counting():
    """A compiled model like ``MODEL``; the list that grows as its decode is traced; by a check."""
    traces = []

    def decode(*arguments):
        traces.append(None)
        return hashed_model.decode(*arguments)

    model = MODEL._replace(decode=decode)
    checks.check_vocabulary(model, make_params(), SHORT, 3)
    of_a_check = len(traces)  # reading V off the model traces it, and compiles nothing
    run(model=model, config=SHORT)
    assert len(traces) > 2 * of_a_check
    return model, traces, of_a_check


def test_traces_of_extensions_alone_hold_what_their_tokens_say(counting):
    for seed in range(12):
        result = run(seed, model=counting[0], config=SHORT)
        assert_valid(result.trace, TUNING, SHORT, PROMPTS, LENGTHS)
        np.testing.assert_array_equal(result.stats.decoded, result.trace.length - LENGTHS)


COMPILED_ONCE = {
    "tuning": {"tuning": make_tuning(3, 3.0), "seed": 5},
    "sampler": {"tuning": make_tuning(3, [1, 2, 3], 1, 2, 0), "sampler": "uniform_cut"},
    "lists": {"prompts": PROMPTS[::-1].tolist(), "prompt_lengths": [3, 1, 2]},
    "ids": {"prompts": jnp.asarray(PROMPTS), "prompt_ids": [1, 2, 3], "chain_ids": np.arange(3)},
    "weights": {"params": make_params(np.ones((3, 9)))},
    "weak_types": {"tuning": TUNING._replace(power=jnp.full((3,), 4.0))},
}


@pytest.mark.parametrize("name", COMPILED_ONCE)
def test_a_sweep_compiles_once(name, counting):
    model, traces, of_a_check = counting
    traces.clear()
    run(model=model, config=SHORT, **COMPILED_ONCE[name])
    assert len(traces) == of_a_check


def test_baselines_draw_from_p_and_q():
    model = random_toy_model(np.random.default_rng(5), 3, 4)
    num_chains, top_k = 5_000, 2
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
    prompts, lengths = toy_chains.toy_prompts(num_chains)
    space = enumeration.state_space(model, model.horizon, top_k)
    laws = []
    for sampler, temperature in (("standard", 1.0), ("low_temperature", 0.4)):
        result = sample(
            jax.random.key(1),
            language_model,
            params,
            prompts,
            lengths,
            make_tuning(num_chains, 4.0, 0.4),
            toy_chains.toy_config(model, num_stages=2, steps_per_stage=1, top_k=top_k),
            sampler,
            num_slots=1_000,
        )
        laws.append(oracle.extension_law(model, (), model.horizon, temperature, top_k))
        rows = toy_chains.rows_of(result.trace, space)
        frequency = np.bincount(rows, minlength=len(space.states)) / num_chains
        standard_error = np.sqrt(laws[-1] * (1 - laws[-1]) / num_chains)
        assert np.all(np.abs(frequency - laws[-1]) < 6 * standard_error + 1e-4)
        assert not np.asarray(result.stats.attempted).any()
        assert result.info.accepted.shape == (1, 0, num_chains)
        np.testing.assert_array_equal(result.stats.decoded, result.trace.length - lengths)
    assert oracle.total_variation(*laws) > 0.1


ONE_TOKEN = dataclasses.replace(
    CONFIG, prompt_length=1, max_new_tokens=1, num_stages=1, steps_per_stage=1, eos_ids=(EOS, 0, 6)
)
FULL_PROMPT = dataclasses.replace(
    CONFIG,
    prompt_length=5,
    max_new_tokens=3,
    num_stages=3,
    steps_per_stage=0,
    eos_ids=(),
    top_k=None,
)


def run_one(config, prompt, seed=0, **changes):
    """One chain."""
    settings = {
        "params": make_params(num_chains=1, num_slots=config.num_slots),
        "prompts": np.array([prompt], np.int32),
        "prompt_lengths": np.array([len(prompt)]),
        "tuning": make_tuning(1, 2.0, 0.7, 1.0, 0.1),
        "config": config,
    }
    result = run(seed, **(settings | changes))
    return result, settings


@pytest.mark.parametrize(
    ("prompt", "config"),
    [([3], ONE_TOKEN), ([3, 2, 8, 5, 1], FULL_PROMPT)],
    ids=["one_token", "stages_of_one_token"],
)
def test_smallest_runs(prompt, config):
    texts = set()
    for seed in range(8):
        result, settings = run_one(config, prompt, seed)
        assert_valid(result.trace, settings["tuning"], config, settings["prompts"], [len(prompt)])
        assert result.stats.attempted[0] == config.num_stages * config.steps_per_stage
        texts.add(tuple(result.trace.tokens[0].tolist()))
    assert len(texts) > 1


@pytest.mark.parametrize("sampler", ["entropy_cut", "standard"])
def test_runs_without_jit(sampler):
    expected, _ = run_one(ONE_TOKEN, [3], sampler=sampler)
    with jax.disable_jit():
        result, _ = run_one(ONE_TOKEN, [3], sampler=sampler)
    assert_same(result.trace.tokens, expected.trace.tokens)
    assert_same(result.stats, expected.stats)
    for value, other in zip(result.trace, expected.trace, strict=True):
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-6)
    rounded = "log_ratio", "log_prob", "mean_entropy"
    for name in rounded:
        value, other = getattr(result.info, name), getattr(expected.info, name)
        np.testing.assert_allclose(value, other, rtol=1e-5, atol=1e-5)
    nothing = dict.fromkeys(rounded)
    assert_same(result.info._replace(**nothing), expected.info._replace(**nothing))
