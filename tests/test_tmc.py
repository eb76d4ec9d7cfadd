"""Twisted Monte Carlo against its enumerated law and p^power, and mutants that must fail it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import make_tuning, rounds, tmc
from ecmh_jax.tmc import Options
from tests import enumeration, oracle, toy_chains
from tests.toy_models import (
    child_index,
    prefix_index,
    random_toy_model,
    toy_language_model,
)

NUM_RESULTS = 10_000
POWER = 3.0


@dataclasses.dataclass(frozen=True)
class Case:
    """Twisted Monte Carlo on one toy model, one token a stage."""

    seed: int
    options: Options
    horizon: int = 2
    scale: float = 1.0
    temperature: float = 0.6

    def model(self):
        return random_toy_model(np.random.default_rng(self.seed), 3, self.horizon, scale=self.scale)


SET = Case(27, Options(3, 3, 2), scale=2.0, temperature=3.0)  # rollouts whose weights differ widely
IMPORTANCE = Case(2, Options(3, 2, 2, base_weight="importance"), horizon=3)
PLAIN = Case(13, Options(6, 3, 2, jackknife=False), scale=0.5)
FAR = Case(4, Options(2, 1, 2, rollout_stages=2), horizon=3)
KEPT = Case(1, Options(3, 2, 2), horizon=3)
CASES = [SET, IMPORTANCE, PLAIN, FAR, KEPT]


@functools.cache
def program(model, options, stage_length=1):
    """A compiled run on one toy model."""
    config = toy_chains.toy_config(model, num_stages=model.horizon // stage_length)
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)

    # Compiling is nearly all of the tests' time, and what is run is small.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def call(prompts, lengths, prompt_ids, chain_ids, tuning):
        batch = rounds.Batch(prompts, lengths, prompt_ids, chain_ids, tuning)
        return rounds.run(
            tmc.build, jax.random.key(0), language_model, params, batch, config, options
        )

    return call


def run(model, options, num_results, temperature=0.6, stage_length=1, first_id=0):
    """Runs ``num_results`` results, numbered from ``first_id``."""
    prompts, lengths = toy_chains.toy_prompts(num_results)
    identity = jnp.arange(first_id, first_id + num_results, dtype=jnp.int32)
    return program(model, options, stage_length)(
        jnp.asarray(prompts), jnp.asarray(lengths), jnp.full_like(identity, 3), identity,
        make_tuning(num_results, POWER, temperature),
    )  # fmt: skip


def published_probabilities(base: np.ndarray, zeta: np.ndarray, jackknife: bool) -> np.ndarray:
    """The choice among K blocks of base weight [K], with S rollout weights [K, S]."""
    num_rollouts = zeta.shape[1]
    law = base * zeta.mean(axis=1)
    law = law / law.sum()
    if not jackknife:
        return law
    corrected = num_rollouts * law
    for rollout in range(num_rollouts):
        other = base * np.delete(zeta, rollout, axis=1).mean(axis=1)
        corrected -= (num_rollouts - 1) / num_rollouts * other / other.sum()
    corrected = np.maximum(corrected, 0)
    return corrected / corrected.sum()


def stage_law(model, tables, prefix, num_tokens, options) -> np.ndarray:
    """Law [V] of the next token after ``prefix``, over all candidates and rollouts."""
    node = prefix_index(prefix, model.vocabulary_size)
    q, p = np.exp(tables.log_q[node]), np.exp(tables.log_p[node])
    # How the rollouts of every token can end: [(chance, weight), ...].
    futures = []
    for token in range(model.vocabulary_size):
        after = model.horizon - num_tokens
        looks_ahead = 0 if token == model.eos_id else min(options.rollout_stages, after)
        futures.append(rollout_law(model, tables, node, token, looks_ahead))
    choices: dict[tuple, float] = {}  # what is kept, with its base weights -> chance
    for drawn in itertools.product(range(model.vocabulary_size), repeat=options.num_candidates):
        weights = {}
        for token in drawn:
            importance = drawn.count(token) * p[token] ** POWER / q[token]
            weights[token] = p[token] ** POWER if options.base_weight == "set" else importance
        kept = sorted(weights.items(), key=lambda item: -item[1])[: options.num_kept]
        key = tuple(sorted(kept))
        choices[key] = choices.get(key, 0.0) + q[list(drawn)].prod()
    law = np.zeros(model.vocabulary_size)
    for kept, chance in choices.items():
        tokens, base = [item[0] for item in kept], np.array([item[1] for item in kept])
        rollouts = [
            itertools.product(futures[token], repeat=options.num_rollouts) for token in tokens
        ]
        for outcome in itertools.product(*rollouts):
            outcome = np.array(outcome)  # [kept, rollouts, (chance, weight)]
            probabilities = published_probabilities(base, outcome[..., 1], options.jackknife)
            law[tokens] += chance * outcome[..., 0].prod() * probabilities
    return law


def rollout_law(model, tables, node, token, num_tokens) -> list[tuple[float, float]]:
    """Chance under q and weight p^power / q of every way to go on for ``num_tokens`` tokens."""
    if num_tokens == 0:
        return [(1.0, 1.0)]
    child = child_index(node, token, model.vocabulary_size)
    law = []
    for following in range(model.vocabulary_size):
        log_q, log_weight = tables.log_q[child, following], tables.log_weight[child, following]
        left = 0 if following == model.eos_id else num_tokens - 1
        for chance, weight in rollout_law(model, tables, child, following, left):
            law.append((np.exp(log_q) * chance, np.exp(log_weight) * weight))
    return law


def exact(case: Case) -> tuple[enumeration.StateSpace, np.ndarray]:
    """Law of the result over the completions."""
    model = case.model()
    tables = enumeration.laws(model, POWER, case.temperature, None)
    space = enumeration.state_space(model, model.horizon)
    laws: dict[tuple[int, ...], np.ndarray] = {}
    result = np.ones(len(space.states))
    for row, state in enumerate(space.states):
        for place, token in enumerate(state):
            prefix = state[:place]
            if prefix not in laws:
                laws[prefix] = stage_law(model, tables, prefix, place + 1, case.options)
            result[row] *= laws[prefix][token]
    return space, result


def excess(case: Case) -> float:
    """Largest |frequency - probability| beyond 6 standard errors + 1e-3."""
    space, expected = exact(case)
    result = run(case.model(), case.options, NUM_RESULTS, case.temperature)
    rows = toy_chains.rows_of(result.trace, space)
    if (rows < 0).any() or not np.asarray(result.finite).all():
        return np.inf
    frequency = np.bincount(rows, minlength=len(expected)) / NUM_RESULTS
    standard_error = np.sqrt(expected * (1 - expected) / NUM_RESULTS)
    return float((np.abs(frequency - expected) - 6 * standard_error - 1e-3).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"model{case.seed}")
def test_result_has_the_enumerated_law(case):
    _, law = exact(case)
    np.testing.assert_allclose(law.sum(), 1.0)
    assert excess(case) < 0


def duplicates_not_merged(patch):
    patch.setattr(tmc, "merge", lambda blocks, lengths, finite: (finite, jnp.ones_like(lengths)))


def rollouts_past_the_horizon(patch):
    patch.setattr(
        tmc, "rollout_stage", lambda stage, options, config: stage + options.rollout_stages
    )


def jackknife_with_the_wrong_sign(patch):
    def correct_bias(probabilities, left_out, num_rollouts):
        share = (num_rollouts - 1) / num_rollouts
        corrected = num_rollouts * probabilities + share * left_out
        return corrected / corrected.sum(axis=-1, keepdims=True)

    patch.setattr(tmc, "correct_bias", correct_bias)


def zeta_of_the_finished_not_one(patch):
    original = tmc.block_probabilities

    def block_probabilities(log_base, log_rollout, jackknife):
        return original(log_base, jnp.where(log_rollout == 0, -1.0, log_rollout), jackknife)

    patch.setattr(tmc, "block_probabilities", block_probabilities)


def weakest_blocks_kept(patch):
    original = jax.lax.top_k

    def top_k(values, count):
        if count == KEPT.options.num_kept and values.ndim == 2:
            present = values > -jnp.inf
            weakest, places = original(jnp.where(present, -values, -jnp.inf), count)
            return jnp.where(weakest > -jnp.inf, -weakest, -jnp.inf), places
        return original(values, count)

    patch.setattr(jax.lax, "top_k", top_k)


MUTANTS = {
    duplicates_not_merged: PLAIN,
    rollouts_past_the_horizon: KEPT,
    jackknife_with_the_wrong_sign: SET,
    zeta_of_the_finished_not_one: PLAIN,
    weakest_blocks_kept: KEPT,
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(mutant, monkeypatch):
    mutant(monkeypatch)  # every case builds its model, and thus its program, anew
    assert excess(MUTANTS[mutant]) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "all_options",
    [
        (Options(2, 2, 2), Options(24, 24, 12)),
        (Options(24, 24, 12, base_weight="importance"),),
    ],
    ids=["set", "importance"],
)
def test_error_shrinks_as_candidates_and_rollouts_grow(all_options):
    # Blocks of two tokens: 7 of them may start a completion.
    model = random_toy_model(np.random.default_rng(5), 3, 4, eos_boost=-1.0, scale=1.0)
    space = enumeration.state_space(model, model.horizon)
    target = oracle.target(model, model.horizon, POWER)
    num_results = 2000
    standard_error = np.sqrt(target * (1 - target) / num_results)
    # The expected distance of num_results independent draws of the target from the target.
    floor = 0.5 * np.sqrt(2 / np.pi) * standard_error.sum()
    distances = []
    for options in all_options:
        result = run(model, options, num_results, stage_length=2)
        rows = toy_chains.rows_of(result.trace, space)
        assert (rows >= 0).all()
        frequency = np.bincount(rows, minlength=len(target)) / num_results
        distances.append(oracle.total_variation(frequency, target))
    assert distances[-1] < 2 * floor
    assert all(distance > 4 * floor for distance in distances[:-1])


def expected_decoded(info, options, num_stages):
    """Tokens [B] that chains without end-of-sequence draw, with one token a stage."""
    distinct = np.asarray(info.num_distinct)[:-1]  # the last stage has no rollouts
    rollouts = np.minimum(distinct, options.num_kept).sum(axis=0) * options.num_rollouts
    return num_stages * options.num_candidates + rollouts


def test_decoded_tokens_are_counted():
    options = Options(3, 2, 2)
    endless = random_toy_model(np.random.default_rng(3), 3, 3, eos_boost=-50.0)
    result = run(endless, options, 50)
    assert {1, 2} <= set(np.asarray(result.info.num_distinct).flat)
    np.testing.assert_array_equal(
        result.stats.decoded, expected_decoded(result.info, options, num_stages=3)
    )
    assert np.all(result.stats.attempted == 0)


@pytest.mark.slow
def test_runs_without_compilation():
    options = Options(2, 1, 2)
    endless = random_toy_model(np.random.default_rng(9), 3, 2, eos_boost=-50.0)
    with jax.disable_jit():
        result = run(endless, options, 1)
    np.testing.assert_array_equal(result.trace.length, toy_chains.NUM_PROMPT_TOKENS + 2)
    np.testing.assert_array_equal(
        result.stats.decoded, expected_decoded(result.info, options, num_stages=2)
    )


def test_a_result_does_not_depend_on_its_neighbours():
    model = KEPT.model()
    first = toy_chains.NUM_PROMPT_TOKENS
    together = run(model, KEPT.options, 7)
    for row in (0, 6):
        alone = run(model, KEPT.options, 1, first_id=row)
        np.testing.assert_array_equal(
            together.trace.tokens[row, first:], alone.trace.tokens[0, first:]
        )
        np.testing.assert_array_equal(together.info.chosen[:, row], alone.info.chosen[:, 0])
        assert together.stats.decoded[row] == alone.stats.decoded[0]
    # What has ended goes on with one empty block, which costs nothing.
    ended = np.asarray(together.trace.length) < first + model.horizon
    assert ended.any()
    np.testing.assert_array_equal(together.info.num_distinct[-1, ended], 1)
    np.testing.assert_allclose(together.info.effective_blocks[-1, ended], 1.0)
    np.testing.assert_allclose(together.info.log_zeta[-1, ended], 0.0)


def test_a_block_without_finite_logits_wins_only_where_all_have_none():
    model = random_toy_model(np.random.default_rng(8), 3, 4)
    first = (model.eos_id + 1) % 3
    model.logits[0] = 0.0
    model.logits[first + 1] = np.nan  # what follows this token is missing
    result = run(model, Options(2, 2, 2), 200, stage_length=2)
    finite = np.asarray(result.finite)
    failed = np.asarray(result.trace.tokens)[:, toy_chains.NUM_PROMPT_TOKENS] == first
    assert 0 < failed.sum() < 200
    np.testing.assert_array_equal(finite, ~failed)
    assert np.all(np.isfinite(result.trace.log_prob))
    assert np.all(np.asarray(result.info.num_distinct)[:, ~finite] == 0)


def test_probabilities_of_failed_rollouts():
    nothing = -np.inf
    log_base = jnp.log(jnp.asarray([[0.6, 0.4], [0.6, 0.4], [0.6, 0.0], [0.0, 0.0]]))
    log_rollout = jnp.asarray(
        [
            [[0.0, nothing], [nothing, 0.0]],  # means of what is left
            [[nothing, nothing], [nothing, nothing]],  # the base weights alone
            [[-500.0, -500.0], [0.0, 0.0]],
            [[0.0, 0.0], [0.0, 0.0]],
        ]
    )
    expected = [[0.6, 0.4], [0.6, 0.4], [1.0, 0.0], [0.5, 0.5]]
    plain = tmc.block_probabilities(log_base, log_rollout, jackknife=False)
    np.testing.assert_allclose(plain, expected, rtol=1e-5)
    corrected = tmc.block_probabilities(log_base, log_rollout, jackknife=True)
    np.testing.assert_allclose(corrected.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(corrected[1:], expected[1:], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(0), "num_candidates is 0; expected an integer of at least 1"),
        (Options(4, 5), "num_kept is 5; expected at most num_candidates, which is 4"),
        (Options(num_rollouts=1), "num_rollouts is 1; expected at least 2 with the jackknife"),
        (Options(rollout_stages=0), "rollout_stages is 0; expected an integer of at least 1"),
        (Options(base_weight="p"), "base_weight is 'p'; expected one of set, importance"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tmc.check_options(options)


def test_good_options_pass():
    tmc.check_options(Options())
    tmc.check_options(Options(num_rollouts=1, jackknife=False))
    assert tmc.rows_per_chain(Options()) == 64
    assert tmc.rows_per_chain(Options(4, 2, 3)) == 6
