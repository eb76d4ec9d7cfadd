"""Best-of-N against the enumerated law of its winner, and mutants that must fail it."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import best_of_n, compiled, make_tuning, rounds
from ecmh_jax.base import Trace
from ecmh_jax.best_of_n import Options
from tests import enumeration, oracle, toy_chains
from tests.toy_models import ToyModel, num_prefixes, random_toy_model, toy_language_model

NUM_RESULTS = 6000
POWER = 2.0
TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class Case:
    """Best-of-N on one toy model.

    A budget of None is no limit; ``tied`` makes all tokens of a prefix equally likely.
    """

    seed: int
    num_candidates: int = 3
    score: str = "mean_log_prob"
    rows: int | None = None
    budget: int | None = None
    tied: bool = False

    def model(self) -> ToyModel:
        if self.tied:
            return ToyModel(3, 3, 1, np.zeros((num_prefixes(3, 3), 3)))
        return random_toy_model(np.random.default_rng(self.seed), 3, 3)

    def options(self) -> Options:
        return Options(self.num_candidates, self.score, self.rows)


CASES = [
    Case(seed=1),
    Case(seed=2, score="total_log_prob"),
    Case(seed=3, num_candidates=4, rows=2, budget=5),
    Case(seed=4, num_candidates=4, rows=1, budget=4, score="total_log_prob"),
    Case(seed=5, num_candidates=3, budget=3),
    Case(seed=6, tied=True, score="total_log_prob", budget=5),
]


@functools.cache
def program(model, options):
    """A compiled best-of-N of results on one toy model."""
    config = toy_chains.toy_config(model)
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)

    # Compiling is nearly all of the tests' time, and what is run is small.
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def call(prompts, lengths, prompt_ids, chain_ids, tuning, budget):
        batch = rounds.Batch(prompts, lengths, prompt_ids, chain_ids, tuning, budget)
        return rounds.run(
            best_of_n.build, jax.random.key(0), language_model, params, batch, config, options
        )

    return call


def run(model, options, num_results, budget=None, first_id=0):
    """Best-of-N of ``num_results`` results, numbered from ``first_id``."""
    if budget is not None:
        budget = jnp.broadcast_to(jnp.asarray(budget, jnp.int32), (num_results,))
    prompts, lengths = toy_chains.toy_prompts(num_results)
    identity = jnp.arange(first_id, first_id + num_results, dtype=jnp.int32)
    return program(model, options)(
        jnp.asarray(prompts), jnp.asarray(lengths), jnp.full_like(identity, 3), identity,
        make_tuning(num_results, POWER, TEMPERATURE), budget,
    )  # fmt: skip


def exact(case: Case) -> tuple[enumeration.StateSpace, np.ndarray, np.ndarray]:
    """Law of the winner [states] and of the counted tokens, over all tuples of candidates."""
    model = case.model()
    space = enumeration.state_space(model, model.horizon)
    law = oracle.extension_law(model, (), model.horizon, TEMPERATURE)
    tables = enumeration.laws(model, POWER, TEMPERATURE, None)
    total = space.along(tables.log_p).sum(axis=1)
    score = total / space.lengths if case.score == "mean_log_prob" else total
    score = score.round(9)  # sums in another order are still equal
    budget = np.inf if case.budget is None else case.budget
    winner = np.zeros(len(space.states))
    spent_law = np.zeros(case.num_candidates * model.horizon + 1)
    for drawn in itertools.product(range(len(space.states)), repeat=case.num_candidates):
        best, spent = drawn[0], 0
        for candidate in drawn:
            if spent >= budget:
                break
            spent += space.lengths[candidate]
            if score[candidate] > score[best]:
                best = candidate
        chance = law[list(drawn)].prod()
        winner[best] += chance
        spent_law[spent] += chance
    return space, winner, spent_law


def excess(case: Case) -> float:
    """Largest |frequency - probability| beyond 6 standard errors + 1e-3: winner and cost."""
    space, winner, spent = exact(case)
    result = run(case.model(), case.options(), NUM_RESULTS, case.budget)
    rows = toy_chains.rows_of(result.trace, space)
    if (rows < 0).any() or not np.asarray(result.finite).all():
        return np.inf
    frequency = np.bincount(rows, minlength=len(winner)) / NUM_RESULTS
    counted = np.bincount(np.asarray(result.stats.decoded), minlength=len(spent)) / NUM_RESULTS
    if len(counted) > len(spent):
        return np.inf
    observed, expected = np.append(frequency, counted), np.append(winner, spent)
    standard_error = np.sqrt(expected * (1 - expected) / NUM_RESULTS)
    return float((np.abs(observed - expected) - 6 * standard_error - 1e-3).max())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"model{case.seed}")
def test_winner_and_cost_have_the_enumerated_law(case):
    assert excess(case) < 0


def crossing_candidate_dropped(patch):
    def used_candidates(decoded, budget):
        fits = jnp.cumsum(decoded, axis=1) <= budget[:, None]
        return fits | (jnp.arange(decoded.shape[1])[None] == 0)

    patch.setattr(best_of_n, "used_candidates", used_candidates)


def score_not_divided_by_length(patch):
    patch.setattr(
        best_of_n, "score_candidates", lambda trace, lengths, score: trace.log_prob.sum(axis=-1)
    )


def candidate_beyond_the_budget_wins(patch):
    original = best_of_n.choose

    def choose(score, used, finite):
        return original(score, jnp.ones_like(used), finite)

    patch.setattr(best_of_n, "choose", choose)
    patch.setattr(best_of_n, "_blank_unused", lambda candidates, used, bare: candidates)


def all_decoded_tokens_counted(patch):
    patch.setattr(best_of_n, "count_decoded", lambda decoded, used: decoded.sum(axis=1))


def budget_counts_candidates_after_it(patch):
    # One candidate too many: the test of the budget is made before its last token is booked.
    def used_candidates(decoded, budget):
        return jnp.cumsum(decoded, axis=1) - decoded <= budget[:, None]

    patch.setattr(best_of_n, "used_candidates", used_candidates)


def prompt_counts_as_completion(patch):
    original = best_of_n.score_candidates

    def score_candidates(trace, prompt_lengths, score):
        return original(trace, jnp.zeros_like(prompt_lengths), score)

    patch.setattr(best_of_n, "score_candidates", score_candidates)


MUTANTS = {
    crossing_candidate_dropped: CASES[4],
    score_not_divided_by_length: CASES[0],
    candidate_beyond_the_budget_wins: dataclasses.replace(CASES[2], rows=4),
    all_decoded_tokens_counted: dataclasses.replace(CASES[2], rows=4),
    budget_counts_candidates_after_it: CASES[4],
    prompt_counts_as_completion: CASES[0],
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(mutant, monkeypatch):
    mutant(monkeypatch)  # every case builds its model, and thus its program, anew
    assert excess(MUTANTS[mutant]) > 0


def test_info_obeys_the_budget_rule_result_by_result():
    model = CASES[0].model()
    num_results = 36
    budget = np.arange(num_results) % 12
    result = run(model, Options(num_candidates=4), num_results, budget)
    info = jax.tree.map(np.asarray, result.info)
    everything = jax.tree.map(
        np.asarray, run(model, Options(num_candidates=4), num_results, budget=99).info
    )
    all_lengths = everything.candidates.length - toy_chains.NUM_PROMPT_TOKENS
    assert {1, 2, 4} <= set(info.num_used.tolist())
    for row in range(num_results):
        used, spent = 0, 0
        while used < 4 and (used == 0 or spent < budget[row]):
            spent += all_lengths[row, used]
            used += 1
        assert info.num_used[row] == used
        assert result.stats.decoded[row] == spent
        assert info.surplus_decoded[row] == all_lengths[row].sum() - spent
        assert np.all(np.isfinite(info.score[row]) == (np.arange(4) < used))
        assert info.chosen[row] == np.argmax(info.score[row]) < used
        for field in ("tokens", "log_prob", "length"):
            mine = getattr(info.candidates, field)[row]
            others = getattr(everything.candidates, field)[row]
            np.testing.assert_array_equal(mine[:used], others[:used])
            best = np.asarray(getattr(result.trace, field))[row]
            np.testing.assert_array_equal(best, mine[info.chosen[row]])
        # What was thrown away leaves no trace.
        assert np.all(info.candidates.length[row, used:] == toy_chains.NUM_PROMPT_TOKENS)
        assert np.all(info.candidates.log_prob[row, used:] == 0)


def test_rows_change_nothing_but_the_surplus():
    model = CASES[2].model()
    together, one_by_one = (run(model, Options(4, rows=rows), 20, budget=5) for rows in (None, 1))
    # Rounds that begin after a budget is met decode nothing.
    assert np.all(one_by_one.info.surplus_decoded == 0)
    assert np.any(together.info.surplus_decoded > 0)
    info = together.info._replace(surplus_decoded=one_by_one.info.surplus_decoded)
    jax.tree.map(
        lambda *both: np.testing.assert_allclose(*both, rtol=1e-5),
        together._replace(info=info),
        one_by_one,
    )


def test_candidates_are_the_low_temperature_draws_of_their_row_identities():
    model = CASES[0].model()
    result = run(model, Options(4, rows=2), 3, first_id=5)
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
    prompts, lengths = (np.repeat(array, 4, axis=0) for array in toy_chains.toy_prompts(3))
    plain = compiled.run(
        jax.random.key(0), params, prompts, lengths, np.full(12, 3, np.int32),
        np.arange(20, 32, dtype=np.int32), make_tuning(12, POWER, TEMPERATURE),
        model=language_model, config=toy_chains.toy_config(model, steps_per_stage=0),
    )  # fmt: skip
    candidates = jax.tree.map(
        lambda leaf: leaf.reshape(12, *leaf.shape[2:]), result.info.candidates
    )
    np.testing.assert_array_equal(candidates.tokens, plain.trace.tokens)
    jax.tree.map(
        lambda *both: np.testing.assert_allclose(*both, rtol=1e-5), candidates, plain.trace
    )


def test_a_result_does_not_depend_on_its_neighbours():
    model = CASES[2].model()
    together = run(model, Options(3), 7, budget=4)
    for row in (0, 3, 6):
        alone = run(model, Options(3), 1, budget=4, first_id=row)
        first = toy_chains.NUM_PROMPT_TOKENS
        np.testing.assert_array_equal(
            together.trace.tokens[row, first:], alone.trace.tokens[0, first:]
        )
        np.testing.assert_array_equal(together.info.score[row], alone.info.score[0])
        assert together.stats.decoded[row] == alone.stats.decoded[0]


@pytest.mark.slow
def test_runs_without_compilation():
    model = random_toy_model(np.random.default_rng(9), 3, 2)
    compiled_result = run(model, Options(2, rows=1), 2, budget=2)
    with jax.disable_jit():
        plain = run(model, Options(2, rows=1), 2, budget=2)
    np.testing.assert_array_equal(compiled_result.trace.tokens, plain.trace.tokens)
    np.testing.assert_array_equal(compiled_result.stats.decoded, plain.stats.decoded)


def test_a_candidate_without_finite_logits_wins_only_where_all_have_none():
    model = random_toy_model(np.random.default_rng(8), 3, 3)
    first = (model.eos_id + 1) % 3
    # The logits after one first token are missing.
    model.logits[first + 1] = np.nan
    result = run(model, Options(2), 200)
    first_tokens = np.asarray(result.info.candidates.tokens)[..., toy_chains.NUM_PROMPT_TOKENS]
    failed = first_tokens == first
    assert {0, 1, 2} == set(failed.sum(axis=1).tolist())
    np.testing.assert_array_equal(result.finite, ~failed.all(axis=1))
    np.testing.assert_array_equal(np.isfinite(result.info.score), ~failed)
    assert not failed[
        np.asarray(result.finite), np.asarray(result.info.chosen)[result.finite]
    ].any()
    assert np.all(np.isfinite(result.trace.log_prob))


def majority_info(answers, scores):
    """Candidates of one token, the answer, after a prompt of one."""
    answers, scores = np.asarray([answers]), np.asarray([scores], np.float32)
    num_candidates = answers.shape[1]
    tokens = np.stack([np.full_like(answers, 9), answers, np.full_like(answers, 9)], axis=-1)
    statistic = np.zeros(tokens.shape, np.float32)
    return best_of_n.Info(
        candidates=Trace(
            tokens, np.full((1, num_candidates), 2), statistic, statistic, statistic, statistic
        ),
        num_used=np.asarray([(scores > -np.inf).sum()]),
        score=scores,
        chosen=scores.argmax(axis=1),
        surplus_decoded=np.zeros(1, np.int32),
    )


NOTHING = 0  # the token that holds no answer


@pytest.mark.parametrize(
    ("answers", "scores", "chosen"),
    [
        ([1, 2, 2], [-1.0, -3.0, -2.0], 2),  # most frequent, then best-scored
        ([1, 2, 2, 1], [-1.0, -3.0, -2.0, -5.0], 2),  # a tie goes to the higher sum, not maximum
        ([NOTHING, NOTHING, 1], [-1.0, -2.0, -9.0], 2),  # no answer never wins
        ([NOTHING, NOTHING], [-2.0, -1.0], 1),  # unless there is none
        ([1, 2, 2, 2], [-1.0, -2.0, -np.inf, -np.inf], 0),  # the unused have no vote
        ([1, 1], [-np.inf, -np.inf], 0),
        ([1, 1, 2], [-1.0, -1.0, -0.5], 0),  # the first of equals
    ],
)
def test_majority_rule(answers, scores, chosen):
    def answer_of(tokens):
        (token,) = tokens
        return None if token == NOTHING else str(token)

    info = majority_info(answers, scores)
    assert best_of_n.choose_by_majority(info, [1], answer_of).tolist() == [chosen]


def test_majority_reads_completions_of_a_run():
    model = CASES[0].model()
    result = run(model, Options(5), 30, budget=6)
    lengths = np.full(30, toy_chains.NUM_PROMPT_TOKENS)
    seen = []

    def answer_of(tokens):
        seen.append(tuple(tokens))
        return len(tokens) % 2

    chosen = best_of_n.choose_by_majority(result.info, lengths, answer_of)
    assert set(seen) <= set(enumeration.state_space(model, model.horizon).states)
    assert len(seen) == result.info.num_used.sum()
    assert np.all(chosen < np.asarray(result.info.num_used))
    assert (chosen != np.asarray(result.info.chosen)).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(0), "num_candidates is 0; expected an integer of at least 1"),
        (Options(4, rows=0), "rows is 0; expected an integer of at least 1"),
        (Options(4, rows=3), "rows is 3; expected a divisor of num_candidates, which is 4"),
        (Options(4, score="length"), "score is 'length'; expected one of mean_log_prob"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        best_of_n.check_options(options)


def test_good_options_pass():
    best_of_n.check_options(Options())
    best_of_n.check_options(Options(6, "total_log_prob", 3))
    assert best_of_n.rows_per_chain(Options()) == 32
    assert best_of_n.rows_per_chain(Options(6, rows=3)) == 3
