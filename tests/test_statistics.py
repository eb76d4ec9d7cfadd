"""Statistics of an evaluation against hand-made numbers, enumeration and SciPy."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats

from experiments import statistics
from experiments.statistics import Estimate, Resampling
from tests import evaluation_rows

QUICK = Resampling(num_resamples=2000)


def make_rows(correct_by_problem, sampler="entropy_cut", **fields):
    """Rows that hold no more than the statistics read."""
    plain = {
        **{"answer": "1", "ended": "eos", "log_prob": -6.0, "entropy": 3.0, "num_tokens": 3},
        **{"attempted": 0, "accepted": 0, "null_moves": 0, "decoded_tokens": 3, "flops": 30},
        **{"proposed_tokens": 3, "replayed_tokens": 0, "saved_tokens": 0},
    }
    return [
        {"problem": problem, "sampler": sampler, "seed": seed, "correct": right} | plain | fields
        for problem, group in correct_by_problem.items()
        for seed, right in enumerate(group)
    ]


@pytest.mark.parametrize("num_samples", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(num_samples):
    for num_correct in range(num_samples + 1):
        samples = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            hits = [any(subset) for subset in itertools.combinations(samples, k)]
            expected = float(Fraction(sum(hits), len(hits)))
            assert statistics.pass_at_k(num_samples, num_correct, k) == expected


def test_pass_at_k_is_unbiased():
    num_samples, chance = 9, 0.3
    for k in range(1, num_samples + 1):
        mean = sum(
            scipy.stats.binom.pmf(correct, num_samples, chance)
            * statistics.pass_at_k(num_samples, correct, k)
            for correct in range(num_samples + 1)
        )
        assert mean == pytest.approx(1 - (1 - chance) ** k, abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow():
    assert statistics.pass_at_k(5000, 1, 2500) == 0.5


@pytest.mark.parametrize("numbers", [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4), (0, 0, 1)])
def test_pass_at_k_refuses_numbers_that_do_not_belong_together(numbers):
    with pytest.raises(ValueError, match="expected k from 1"):
        statistics.pass_at_k(*numbers)


@pytest.mark.parametrize(
    ("answers", "correct", "expected"),
    [
        ("aab", (1, 1, 0), 1),
        ("abb", (1, 0, 0), 0),
        ("ab", (1, 0), Fraction(1, 2)),
        ("aabbc", (1, 1, 0, 0, 0), Fraction(1, 2)),
        ("abc", (0, 1, 0), Fraction(1, 3)),
        ("a--", (1, 0, 0), 1),  # those without an answer do not vote
        ("--", (0, 0), 0),
        ("", (), 0),
        ("aab", (1, 0, 0), Fraction(1, 2)),  # equal answers graded differently
    ],
)
def test_majority_vote(answers, correct, expected):
    votes = [None if answer == "-" else answer for answer in answers]
    for order in itertools.permutations(range(len(votes))):
        value = statistics.majority_vote(
            [votes[index] for index in order], [bool(correct[index]) for index in order]
        )
        assert value == float(expected)


@pytest.mark.parametrize("num_problems", [3, 11, 40])
def test_bootstrap_is_scipys(num_problems, monkeypatch):
    rng = np.random.default_rng(num_problems)
    # Quarters add up exactly, so that SciPy sees every tie of two means.
    scores = rng.binomial(4, rng.beta(0.5, 1.5, (num_problems, 1)), (num_problems, 2)) / 4
    estimates = statistics.bootstrap(scores, resampling=QUICK._replace(confidence=0.9, seed=7))
    for column, estimate in zip(scores.T, estimates, strict=True):
        expected = scipy.stats.bootstrap(
            (column,),
            np.mean,
            confidence_level=0.9,
            n_resamples=2000,
            method="BCa",
            rng=np.random.default_rng(7),
        ).confidence_interval
        assert estimate.value == pytest.approx(column.mean())
        assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
    monkeypatch.setattr(statistics, "_DRAWS_AT_ONCE", 7 * num_problems)
    in_blocks = statistics.bootstrap(scores, resampling=QUICK._replace(confidence=0.9, seed=7))
    assert in_blocks == estimates


@pytest.mark.parametrize("seed", range(8))
def test_bootstrap_sees_ties_in_spite_of_rounding(seed):
    # Few resamples: the median's share of ties moves the interval.
    resampling = Resampling(num_resamples=200, seed=seed)
    correct = np.random.default_rng(seed).binomial(5, 0.3, (5, 1))
    (counted,) = statistics.bootstrap(correct.astype(float), (0.0, 5.0), resampling)
    (shared,) = statistics.bootstrap(correct / 5, resampling=resampling)
    assert np.array(counted) / 5 == pytest.approx(np.array(shared), abs=1e-12)


@pytest.mark.parametrize("num_problems", [1, 2, 30])
def test_bootstrap_of_none_or_all_correct_is_the_exact_interval(num_problems):
    none, every = statistics.bootstrap(
        np.repeat([[0.0, 1.0]], num_problems, axis=0), resampling=QUICK
    )
    exact = scipy.stats.binomtest(0, num_problems).proportion_ci(method="exact")
    assert none == pytest.approx((0, exact.low, exact.high))
    assert every == pytest.approx((1, 1 - exact.high, 1 - exact.low))


def test_bootstrap_knows_no_interval_of_equal_scores():
    half, *_ = statistics.bootstrap(np.full((5, 1), 0.5), resampling=QUICK)
    assert half == Estimate(0.5, None, None)
    # Differences have no bounds that would tell anything.
    assert statistics.bootstrap(np.zeros((5, 1)), None, QUICK) == [Estimate(0.0, None, None)]


def test_more_seeds_of_the_same_outcome_tell_nothing_new():
    once = {str(problem): [problem % 3 == 0] for problem in range(30)}
    often = {problem: group * 8 for problem, group in once.items()}
    few = statistics.describe_sampler(make_rows(once), resampling=QUICK)
    many = statistics.describe_sampler(make_rows(often), resampling=QUICK)
    assert few["accuracy"] == many["accuracy"] == many["pass_at"][8]
    assert few["decoded_tokens"] == many["decoded_tokens"]


@pytest.mark.slow
def test_intervals_cover_what_the_docstring_says():
    """10,000 evaluations of 30 problems, 8 seeds, accuracy 0.1; percentile intervals are worse."""
    rng = np.random.default_rng(0)
    missed = np.zeros((2, 2))  # BCa and percentile; below and above the truth
    for _ in range(10_000):
        scores = rng.binomial(8, rng.beta(0.3, 2.7, 30)) / 8
        seed = int(rng.integers(2**31))
        _, low, high = statistics.bootstrap(
            scores[:, None], resampling=Resampling(num_resamples=1000, seed=seed)
        )[0]
        assert low is not None
        assert high is not None
        drawn = np.random.default_rng(seed).integers(0, 30, (1000, 30))
        quantiles = np.quantile(scores[drawn].mean(1), [0.025, 0.975])
        for row, (below, above) in enumerate([(low, high), quantiles]):
            missed[row] += (above < 0.1, below > 0.1)
    missed /= 10_000
    print("BCa and percentile intervals below and above the truth:", missed)
    standard_error = math.sqrt(0.05 * 0.95 / 10_000)
    assert missed[0, 0] < missed[1, 0] - 3 * standard_error
    assert missed[0].sum() < 0.075


def test_clustered_mean_by_hand():
    assert statistics.clustered_mean([1, 2, 6]) == pytest.approx((3, math.sqrt(7 / 3), 3))
    assert statistics.clustered_mean([4]) == (4, None, 1)
    assert statistics.clustered_mean([]) is None


def test_clustered_ratio_by_hand():
    # Residuals 1 - 2/2 = 0, 2 - 4/2 = 0 and 0: no error; then 3 of 4 and 1 of 4 about 1/2.
    assert statistics.clustered_ratio([1, 2, 0], [2, 4, 0]) == (0.5, 0, 2)
    expected = math.sqrt((1 + 1) * 2 / 1) / 8
    assert statistics.clustered_ratio([3, 1], [4, 4]) == pytest.approx((0.5, expected, 2))
    assert statistics.clustered_ratio([3], [4]) == (0.75, None, 1)
    assert statistics.clustered_ratio([0], [0]) is None


def test_clustered_ratio_of_equal_denominators_is_the_clustered_mean():
    accepted = np.random.default_rng(0).integers(0, 9, 13)
    ratio = statistics.clustered_ratio(accepted.tolist(), [9] * 13)
    assert ratio == pytest.approx(statistics.clustered_mean(accepted / 9))


def test_clustered_mcnemar_by_hand():
    statistic, p_value = statistics.clustered_mcnemar([2, -1, 0, 3])
    assert statistic == pytest.approx(4 / math.sqrt(14))
    assert p_value == pytest.approx(2 * scipy.stats.norm.sf(4 / math.sqrt(14)))
    assert statistics.clustered_mcnemar([-2, 1, 0, -3]) == pytest.approx((-statistic, p_value))
    assert statistics.clustered_mcnemar([0, 0]) == statistics.clustered_mcnemar([]) == (0, 1)


def test_one_seed_a_problem_is_mcnemars_test():
    for first, second in itertools.product(range(8), repeat=2):
        if first + second:
            differences = [1] * first + [-1] * second + [0] * 5
            expected = scipy.stats.chi2.sf((first - second) ** 2 / (first + second), 1)
            assert statistics.clustered_mcnemar(differences).p_value == pytest.approx(expected)
            exact = scipy.stats.binomtest(first, first + second).pvalue
            assert statistics.sign_flip_test(differences).p_value == pytest.approx(exact)


def test_sign_flip_test_is_the_enumeration_of_all_flips():
    for differences in itertools.product(range(-2, 4), repeat=4):
        sums = [
            sum(sign * difference for sign, difference in zip(signs, differences, strict=True))
            for signs in itertools.product((1, -1), repeat=4)
        ]
        share = Fraction(sum(abs(flipped) >= abs(sum(differences)) for flipped in sums), 16)
        assert statistics.sign_flip_test(differences) == (sum(differences), float(share))


def test_clustered_mcnemar_agrees_with_flips_of_many_problems():
    rng = np.random.default_rng(3)
    differences = (rng.binomial(8, 0.53, 300) - rng.binomial(8, 0.5, 300)).tolist()
    approximate = statistics.clustered_mcnemar(differences).p_value
    exact = statistics.sign_flip_test(differences).p_value
    flips = rng.choice([-1, 1], (20_000, 300)) @ differences
    drawn = np.mean(np.abs(flips) >= abs(sum(differences)))
    error = math.sqrt(exact * (1 - exact) / 20_000)
    assert abs(drawn - exact) < 5 * error
    assert 0.001 < exact < 0.2
    assert approximate == pytest.approx(exact, rel=0.1)


def test_sign_flip_test_of_a_large_evaluation_is_tiny_and_finite():
    p_value = statistics.sign_flip_test([8] * 1319).p_value
    assert 0 <= p_value < 1e-300
    assert statistics.sign_flip_test([8, -8] * 600).p_value == 1


def test_holm_is_the_closure_of_bonferroni():
    rng = np.random.default_rng(0)
    for p_values in [*rng.random((30, 4)).tolist(), [0.01, 0.01, 0.5, 0.04], [0.2]]:
        expected = []
        for tested in range(len(p_values)):
            rest = [index for index in range(len(p_values)) if index != tested]
            families = itertools.chain.from_iterable(
                itertools.combinations(rest, size) for size in range(len(p_values))
            )
            bounds = [
                (1 + len(family)) * min(p_values[index] for index in (tested, *family))
                for family in families
            ]
            expected.append(min(1.0, max(bounds)))
        assert statistics.holm(p_values) == pytest.approx(expected)
    assert statistics.holm([]) == []


def test_problem_means_leave_out_what_is_unknown():
    values = [("a", 1.0), ("a", None), ("a", 3.0), ("b", math.nan), ("c", -math.inf), ("c", 5.0)]
    rows = [{"problem": problem, "value": value} for problem, value in values]
    assert statistics.problem_means(rows, lambda row: row["value"]) == {"a": 2.0, "c": 5.0}


def test_figures_of_a_sampler_by_hand():
    rows = make_rows({"p": [True, False], "q": [True, True]})
    for row, answer, tokens in zip(rows, ("1", "2", None, "3"), (4, 8, 2, 0), strict=True):
        row |= {"answer": answer, "num_tokens": tokens, "decoded_tokens": 10 * tokens}
    rows[0] |= {"attempted": 4, "accepted": 3, "null_moves": 1}
    rows[2] |= {"attempted": 4, "accepted": 1, "log_prob": None, "ended": "not_finite"}
    sessions = [
        {"sampler": "entropy_cut", "seconds": 5.0, "compile_seconds": 2.0, "rows": 3},
        {"sampler": "entropy_cut", "seconds": 3.0, "compile_seconds": 1.0, "rows": 1},
    ]
    figures = statistics.describe_sampler(rows, sessions, resampling=QUICK)
    assert (figures["rows"], figures["problems"], figures["rows_per_problem"]) == (4, 2, [2, 2])
    assert figures["accuracy"].value == figures["pass_at"][1].value == 0.75
    assert figures["pass_at"][2].value == 1
    assert figures["answered"].value == 0.75
    assert figures["majority"].value == 0.75  # 1 against 2 in p, 3 alone in q
    assert figures["log_prob"] == (-6, 0, 2)  # -6, -6 in p; the finite -6 in q
    # p: -6/4 and -6/8; q: one row has no log p, the other no token.
    assert figures["log_prob_per_token"] == (-1.125, None, 1)
    assert figures["num_tokens"] == pytest.approx((3.5, 2.5, 2))
    assert figures["decoded_tokens"].mean == 35
    assert figures["acceptance"].mean == 0.5
    assert (figures["attempted"], figures["null_moves"]) == (8, 1)
    assert figures["ended"] == {"eos": 3, "not_finite": 1}
    assert (figures["seconds"], figures["compile_seconds"]) == (2, 3)


def test_problems_count_once_whatever_their_rows():
    figures = statistics.describe_sampler(
        make_rows({"p": [True] * 6, "q": [False, False]}), resampling=QUICK
    )
    assert figures["accuracy"].value == 0.5
    assert list(figures["pass_at"]) == [1, 2]
    assert figures["rows_per_problem"] == [2, 6]


def test_answers_vote_by_their_normal_form():
    rows = make_rows({"p": [True, True, False], "q": [False] * 3})
    for row, answer in zip(rows, ("72", "72.0", "5", "1", "2", "3"), strict=True):
        row["answer"] = answer
    for row in rows[1:3]:
        row["answer"] = {"72.0": "72.0", "5": "5"}[row["answer"]]
    plain = statistics.describe_sampler(rows, resampling=QUICK)
    assert plain["majority"].value == pytest.approx((2 / 3 + 0) / 2)
    by_number = statistics.describe_sampler(
        rows, answer_key=lambda answer: str(float(answer)), resampling=QUICK
    )
    assert by_number["majority"].value == 0.5


def test_nobody_votes_with_one_row_or_without_answers():
    one = statistics.describe_sampler(make_rows({"p": [True], "q": [False]}), resampling=QUICK)
    programs = make_rows({"p": [True, True]}, answer=None)
    assert one["majority"] is None
    assert statistics.describe_sampler(programs, resampling=QUICK)["majority"] is None


def test_comparison_by_hand():
    ours = make_rows({"p": [True, True, False], "q": [True], "r": [True]}, log_prob=-4.0)
    theirs = make_rows({"p": [False, True], "q": [False], "s": [True]}, "standard")
    theirs[0]["log_prob"], theirs[1]["log_prob"] = -7.0, None
    compared = statistics.compare(ours, theirs, QUICK)
    assert compared is not None
    assert (compared["pairs"], compared["problems"], compared["unpaired_rows"]) == (3, 2, 3)
    assert compared["accuracy"].value == 0.75  # p: (1 + 0) / 2, q: 1
    assert compared["mcnemar"].statistic == pytest.approx(2 / math.sqrt(2))
    assert compared["sign_flip"] == (2, 0.5)
    assert compared["log_prob"] == pytest.approx((2.5, 0.5, 2))  # p: 3, q: 2
    assert statistics.compare(ours, make_rows({"z": [True]}), QUICK) is None


def test_seeds_are_summed_within_their_problem_before_they_are_squared():
    ours = make_rows({"p": [True] * 3, "q": [False, True]})
    theirs = make_rows({"p": [False] * 3, "q": [True, False]}, "standard")
    compared = statistics.compare(ours, theirs, QUICK)
    assert compared is not None
    # a = (3, 0): z = 3 / 3, and one problem can only flip as a whole. By rows z = 3 / sqrt(5).
    assert compared["mcnemar"].statistic == 1
    assert compared["sign_flip"] == (3, 1)


def test_comparisons_are_antisymmetric_and_blind_to_the_order_of_rows():
    ours, theirs = (
        evaluation_rows.make_rows(1, 12, 3, (sampler,)) for sampler in ("entropy_cut", "standard")
    )
    forward = statistics.compare(ours, theirs, QUICK)
    backward = statistics.compare(theirs, ours, QUICK)
    shuffled = statistics.compare(ours, theirs[::-1], QUICK)
    assert forward is not None
    assert backward is not None
    assert forward == shuffled
    for name in ("mcnemar", "sign_flip", "accuracy", "log_prob", "decoded_tokens"):
        assert forward[name][0] == pytest.approx(-backward[name][0])
    assert forward["mcnemar"].p_value == backward["mcnemar"].p_value
    low, high = forward["accuracy"][1:]
    assert low < forward["accuracy"].value < high
