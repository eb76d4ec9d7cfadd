"""``sample`` end to end: identity of chains, switches, faults, shapes, and what a trace holds."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import Config, LanguageModel, checks, compiled, make_tuning, random_keys, sample
from tests import enumeration, oracle, toy_chains
from tests.toy_models import random_toy_model, toy_language_model

VOCABULARY_SIZE = 11  # V
PROMPT_SLOTS = 3  # P
EOS = 4
PAD = 7  # a token like any other, so that padding cannot pass for zeros
# The rows of a toy model serve as laws; here the row is not the prefix's own but a hash of it, so
# that prompts matter, may be ragged, and completions may be long.
TABLE = random_toy_model(np.random.default_rng(2), VOCABULARY_SIZE, 3).logits
TABLE[:, EOS] = np.median(TABLE, axis=1) + 0.5
TABLE = TABLE.astype(np.float32)


def table_rows(tokens, positions):
    """Row of ``TABLE`` with the logits after slot ``positions`` [B] of ``tokens`` [B, T]."""
    slots = np.arange(tokens.shape[1])
    summands = (tokens + 1) * (slots * slots + 3)[None]
    return (summands * (slots[None] <= positions[:, None])).sum(axis=-1) % len(TABLE)


def _init_cache(batch_size, num_slots):
    return jnp.zeros((batch_size, num_slots), jnp.int32)


def _logits_after(params, positions, cache):
    fault = params["fault"][jnp.arange(cache.shape[0]), positions]
    return params["logits"][table_rows(cache, positions)] + fault[:, None]


def _prefill(params, tokens, lengths, cache):
    cache = cache.at[:, : tokens.shape[1]].set(tokens)
    return _logits_after(params, lengths - 1, cache), cache


def _decode(params, tokens, positions, cache):
    cache = cache.at[jnp.arange(cache.shape[0]), positions].set(tokens)
    return _logits_after(params, positions, cache), cache


MODEL = LanguageModel(_init_cache, _prefill, _decode)
CONFIG = Config(
    prompt_length=PROMPT_SLOTS,
    max_new_tokens=6,  # T = 9
    num_stages=2,
    steps_per_stage=3,
    top_k=5,
    eos_ids=(EOS,),
    pad_id=PAD,
    refine_finished=True,
)
PROMPTS = np.array([[2, 9, 0], [5, 3, 8], [1, 6, EOS]], np.int32)  # the last one ends in EOS
LENGTHS = np.array([2, 1, 3], np.int32)
TUNING = make_tuning(3, [4.0, 2.0, 1.0], [0.25, 0.4, 0.8], 1.0, [0.0, 0.1, 1.0])


def make_params(fault=None, num_chains=3, num_slots=CONFIG.num_slots):
    """Weights; ``fault`` [B, T] is added to all logits that follow a chain's slot."""
    fault = np.zeros((num_chains, num_slots)) if fault is None else fault
    return {"logits": jnp.asarray(TABLE), "fault": jnp.asarray(fault, jnp.float32)}


def run(seed=0, **changes):
    """``sample`` with the settings above, except for ``changes``."""
    arguments = {
        "rng_key": jax.random.key(seed),
        "model": MODEL,
        "params": make_params(),
        "prompts": PROMPTS,
        "prompt_lengths": LENGTHS,
        "tuning": TUNING,
        "config": CONFIG,
    }
    return jax.tree.map(np.asarray, sample(**(arguments | changes)))


def rows_of(result, rows):
    """The chains ``rows`` of a Result: info has the chain axis last, the rest first."""
    others = jax.tree.map(lambda leaf: leaf[rows], result._replace(info=None))
    return others._replace(info=jax.tree.map(lambda leaf: leaf[..., rows], result.info))


def assert_same(result, expected):
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def assert_valid(trace, tuning, config, prompts, lengths, finite=None):
    """Asserts that traces hold what their tokens say, by float64 tables of the model."""
    tokens = trace.tokens
    finite = np.ones(len(tokens), bool) if finite is None else finite
    for row, (first, end) in enumerate(zip(lengths, trace.length, strict=True)):
        np.testing.assert_array_equal(tokens[row, :first], prompts[row, :first])
        completion = tokens[row, first:end]
        assert len(completion) <= config.max_new_tokens
        ends = np.isin(completion, config.eos_ids)
        assert not ends[:-1].any()
        assert not finite[row] or len(completion) == config.max_new_tokens or ends[-1:].any()
        np.testing.assert_array_equal(tokens[row, end:], config.pad_id)
        nodes = [table_rows(tokens[row : row + 1], np.array([s - 1]))[0] for s in range(first, end)]
        p = enumeration.truncated_law(TABLE[nodes].astype(np.float64), config.top_k)
        temperature = 1.0 / float(tuning.inverse_temperature[row])
        q = enumeration.proposal_law(p, temperature) if nodes else p
        at_token = (np.arange(len(nodes)), completion)
        log_prob, log_q = np.log(p[at_token]), np.log(q[at_token])
        for values, expected in (
            (trace.log_prob, log_prob),
            (trace.log_q, log_q),
            (trace.log_weight, float(tuning.power[row]) * log_prob - log_q),
            (trace.entropy, enumeration.entropy(p)),
        ):
            np.testing.assert_allclose(values[row, first:end], expected, rtol=1e-5, atol=1e-5)
            assert not values[row, :first].any()
            assert not values[row, end:].any()


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


def start():
    """``init`` with the settings above."""
    identity = jnp.arange(3, dtype=jnp.int32)
    prompts, lengths = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS)
    return compiled.init(
        MODEL, make_params(), prompts, lengths, jnp.zeros_like(identity), identity, CONFIG
    )


def test_chains_start_with_their_prompts_alone():
    trace = jax.tree.map(np.asarray, start().trace)
    expected = np.full((3, CONFIG.num_slots), PAD)
    for row, length in enumerate(LENGTHS):
        expected[row, :length] = PROMPTS[row, :length]
    np.testing.assert_array_equal(trace.tokens, expected)
    np.testing.assert_array_equal(trace.length, LENGTHS)
    for statistic in (trace.log_prob, trace.log_q, trace.log_weight, trace.entropy):
        np.testing.assert_array_equal(statistic, np.zeros((3, CONFIG.num_slots)))


def host_loop(config, seed=0, tuning=TUNING, faults=None):
    """The schedule as a loop on the host: states and infos (None for an extension) by step.

    ``faults`` maps the index of a step to the weights used in that step alone. ``extend`` is always
    that of the default switches, which spares compilations: they are about proposals.
    """
    key = jax.random.key(seed)
    default = dataclasses.replace(CONFIG, refine_finished=config.refine_finished)
    refining = dataclasses.replace(config, refine_finished=True)  # the kernel does not ask
    state = start()
    states, infos = [], []
    for _ in range(config.num_stages):
        for step in range(config.steps_per_stage + 1):
            params = (faults or {}).get(len(states), make_params())
            if step == 0:
                info = None
                state = compiled.extend(key, state, params, tuning, model=MODEL, config=default)
            else:
                state, info = compiled.kernel(
                    key, state, params, tuning, model=MODEL, config=refining
                )
            # Copied, because the next call consumes the state.
            states.append(jax.tree.map(np.array, state))
            infos.append(info if info is None else jax.tree.map(np.array, info))
    return states, infos


def fault_at(row, slot, value):
    fault = np.zeros((3, CONFIG.num_slots))
    fault[row, slot] = value
    return make_params(fault)


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


def test_scan_is_a_loop_over_extend_and_kernel():
    result = run()
    states, infos = host_loop(CONFIG)
    assert_same(result.trace, states[-1].trace)
    assert_same(result.stats, states[-1].stats)
    assert_same(result.finite, states[-1].finite)
    steps = [info for info in infos if info is not None]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves).reshape(2, 3, 3), *steps)
    assert_same(result.info, stacked)


# power, 1 / tau: at 1 / power, elsewhere in the range of certain rejection, outside of it.
SWITCH_TUNINGS = {
    "at_inverse_power": ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]),
    "in_range": ([2.0, 4.0, 4.0], [1.3, 1.0, 2.0]),
    "outside": ([1.0, 2.0, 4.0], [3.0, 0.6, 0.5]),
}


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
    for seed in range(25):
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
        return _decode(*arguments)

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
    num_chains, top_k = 20_000, 2
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
    assert_same(result.info._replace(log_ratio=0), expected.info._replace(log_ratio=0))


BAD_CALLS = {
    "empty prompt": ({"prompt_lengths": [2, 0, 3]}, ["prompt 1 has 0", "1..3"]),
    "prompt too long": ({"prompt_lengths": [2, 1, 4]}, ["prompt 2 has 4", "1..3"]),
    "negative length": ({"prompt_lengths": [2, 1, -1]}, ["prompt 2 has -1", "1..3"]),
    "fractional length": ({"prompt_lengths": [2.5, 1, 3]}, ["prompt_lengths", "float", "integer"]),
    "lengths missing": ({"prompt_lengths": [2, 1]}, ["prompt_lengths", "(2,)", "(3,)"]),
    "unknown token": ({"prompts": PROMPTS + 2}, ["prompt 0", "11", "0..10"]),
    "negative token": ({"prompts": PROMPTS - 2}, ["prompt 2", "-1", "0..10"]),
    "float prompts": ({"prompts": PROMPTS * 1.0}, ["prompts", "float64", "integer"]),
    "narrow prompts": ({"prompts": PROMPTS[:, :2]}, ["prompts", "(3, 2)", "[chains, 3]"]),
    "flat prompts": ({"prompts": PROMPTS[0]}, ["prompts", "(3,)", "[chains, 3]"]),
    "no prompts": ({"prompts": np.int32(3)}, ["prompts", "()", "[chains, 3]"]),
    "other tuning": ({"tuning": make_tuning(2)}, ["tuning.power", "[2]", "float32[3]"]),
    "half tuning": (
        {"tuning": TUNING._replace(cut_power=jnp.ones(3, jnp.float16))},
        ["tuning.cut_power", "float16", "float32[3]"],
    ),
    "unknown sampler": ({"sampler": "gibbs"}, ["'gibbs'", "entropy_cut", "standard"]),
    "raw key": ({"rng_key": np.zeros(2, np.uint32)}, ["rng_key", "0", "jax.random.key(seed)"]),
    "integer key": ({"rng_key": 3}, ["rng_key", "3", "jax.random.key(seed)"]),
    "rbg key": ({"rng_key": jax.random.key(0, impl="rbg")}, ["rng_key", "rbg", "threefry"]),
    "many keys": ({"rng_key": jax.random.split(jax.random.key(0), 3)}, ["(3,)", "scalar"]),
    "other chain ids": ({"chain_ids": np.arange(4)}, ["chain_ids", "(4,)", "(3,)"]),
    "float prompt ids": ({"prompt_ids": np.arange(3) / 2}, ["prompt_ids", "float64", "integer"]),
}
BAD_CONFIGS = {
    "no prompt slots": ({"prompt_length": 0}, ["prompt_length is 0", "at least 1"]),
    "no new tokens": ({"max_new_tokens": 0}, ["max_new_tokens is 0", "at least 1"]),
    "no stages": ({"num_stages": 0}, ["num_stages is 0", "at least 1"]),
    "uneven stages": ({"num_stages": 4}, ["num_stages is 4", "divisor", "6"]),
    "negative steps": ({"steps_per_stage": -1}, ["steps_per_stage is -1", "at least 0"]),
    "top_k 0": ({"top_k": 0}, ["top_k is 0", "at least 1"]),
    "top_k negative": ({"top_k": -5}, ["top_k is -5", "at least 1"]),
    "top_k above V": ({"top_k": 12}, ["top_k is 12", "at most", "11"]),
    "eos id above V": ({"eos_ids": (EOS, 11)}, ["eos_ids", "11", "0..10"]),
    "eos id negative": ({"eos_ids": (-2,)}, ["eos_ids", "-2", "0..10"]),
    "pad id above V": ({"pad_id": 11}, ["pad_id", "11", "0..10"]),
}
BAD_CALLS |= {
    name: ({"config": dataclasses.replace(CONFIG, **changes)}, fragments)
    for name, (changes, fragments) in BAD_CONFIGS.items()
}
BAD_TUNINGS = {
    "no chains": ({"num_chains": 0}, ["num_chains is 0", "at least 1"]),
    "power 0": ({"power": 0.0}, ["power is 0.0", "> 0"]),
    "power negative": ({"power": [1.0, -2.0, 3.0]}, ["power is", "-2.0", "> 0"]),
    "power nan": ({"power": np.nan}, ["power is nan", "> 0"]),
    "power infinite": ({"power": np.inf}, ["power is inf", "> 0"]),
    "wrong number": ({"power": [1.0, 2.0]}, ["power", "(2,)", "(3,)"]),
    "temperature 0": ({"proposal_temperature": 0.0}, ["proposal_temperature is 0.0", "> 0"]),
    "temperature nan": ({"proposal_temperature": np.nan}, ["proposal_temperature is nan", "> 0"]),
    "temperature tiny": ({"proposal_temperature": 1e-40}, ["proposal_temperature is 1e-40"]),
    "cut_power negative": ({"cut_power": -0.5}, ["cut_power is -0.5", ">= 0"]),
    "cut_power nan": ({"cut_power": np.nan}, ["cut_power is nan", ">= 0"]),
    "mix above 1": ({"uniform_mix": 1.5}, ["uniform_mix is 1.5", "0..1"]),
    "mix negative": ({"uniform_mix": [0.0, -0.1, 1.0]}, ["uniform_mix is", "-0.1", "0..1"]),
}


def assert_refused(function, fragments, **arguments):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the fragments say which
        function(**arguments)
    for fragment in fragments:
        assert fragment in str(error.value)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_says_what_was_expected(name):
    changes, fragments = BAD_CALLS[name]
    assert_refused(run, fragments, **changes)


@pytest.mark.parametrize("name", BAD_TUNINGS)
def test_bad_tuning_says_what_was_expected(name):
    changes, fragments = BAD_TUNINGS[name]
    assert_refused(make_tuning, fragments, **({"num_chains": 3} | changes))
