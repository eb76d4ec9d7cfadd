"""Statistics of an evaluation: intervals, votes, tests and means, clustered by problem.

The seeds of one problem have that problem in common: it is a cluster. So each problem counts once,
by the mean over its rows, and problems are what is resampled, what a test sums over and what
standard errors count. Rows are those of ``rows.jsonl``.

Intervals are of the bias-corrected and accelerated bootstrap (BCa; Efron 1987), since means near 0
or 1 are skewed: of 10,000 made-up evaluations of 30 problems, 8 seeds and a true accuracy of 0.1,
95 % percentile intervals lay below the truth in 6.7 % and above it in 1.3 %, BCa intervals in 4.2 %
and 2.2 % (a slow test prints it; 2.5 % each are promised).
"""

import collections
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

Row = Mapping[str, Any]

_DRAWS_AT_ONCE = 4_000_000  # bounds the memory of the bootstrap
_EPSILON = 1e-9
_NORMAL = NormalDist()


class Resampling(NamedTuple):
    """How intervals are drawn."""

    confidence: float = 0.95  # of a two-sided interval
    num_resamples: int = 10_000
    seed: int = 0  # equal numbers of problems are resampled alike


class Estimate(NamedTuple):
    """A mean over problems; the interval is None where the sample tells nothing of its width."""

    value: float
    low: float | None
    high: float | None


DEFAULT_RESAMPLING = Resampling()


class ClusteredMean(NamedTuple):
    """A mean over problems, its standard error (None below two problems) and their number."""

    mean: float
    standard_error: float | None
    problems: int


class TwoSidedTest(NamedTuple):
    """A two-sided test of no difference."""

    statistic: float
    p_value: float  # 0 to 1


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns the unbiased estimate of the chance that one of k samples is correct.

    1 - C(n - c, k) / C(n, k), in whole numbers until the last division (Chen et al. 2021, eq. 1).

    Args:
      num_samples: n, samples of the problem.
      num_correct: c, 0 to n.
      k: 1 to n.

    Raises:
      ValueError: the numbers do not belong together.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"pass@{k} of {num_correct} correct among {num_samples}; expected k from 1 to the "
            "number of samples, and at most as many correct"
        )
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_correct, k)) / subsets


def majority_vote(answers: Sequence[str | None], correct: Sequence[bool]) -> float:
    """Returns the expected correctness of the most frequent answer, ties split evenly.

    Args:
      answers: of each sample; equal answers are equal strings; None does not vote.
      correct: whether each is right. Where equal answers differ in that, their mean counts.

    Returns:
      0 to 1; 0 if nobody votes.
    """
    groups = collections.defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        if answer is not None:
            groups[answer].append(right)
    most = max(map(len, groups.values()), default=0)
    winners = [sum(group) / most for group in groups.values() if len(group) == most]
    return sum(winners) / len(winners) if winners else 0.0


def bootstrap(
    scores: np.ndarray,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> list[Estimate]:
    """Returns the mean over problems of each score with its BCa interval.

    Where all problems score the lowest or the highest possible value no resample differs, and an
    exact interval takes over: scores in [0, 1] of mean m are all 0 with probability at most
    (1 - m)^P, whatever their law. Where they are all equal otherwise there is no interval.

    Args:
      scores: [P, K], K scores of each of P >= 1 problems, already averaged over seeds.
      bounds: the lowest and highest possible score; None if there are none.
      resampling: how.
    """
    num_problems, num_scores = scores.shape
    rng = np.random.default_rng(resampling.seed)
    means = np.empty((resampling.num_resamples, num_scores))
    block = max(1, _DRAWS_AT_ONCE // num_problems)
    for start in range(0, resampling.num_resamples, block):
        size = min(block, resampling.num_resamples - start)
        drawn = rng.integers(0, num_problems, (size, num_problems))
        drawn += np.arange(size)[:, None] * num_problems
        counts = np.bincount(drawn.ravel(), minlength=size * num_problems)
        counts = counts.reshape(size, num_problems)
        means[start : start + size] = counts @ scores / num_problems
    tail = (1 - resampling.confidence) / 2
    return [
        _estimate(scores[:, index], means[:, index], bounds, tail) for index in range(num_scores)
    ]


def _estimate(
    scores: np.ndarray, means: np.ndarray, bounds: tuple[float, float] | None, tail: float
) -> Estimate:
    value = float(scores.mean())
    deviations = scores - value
    if np.ptp(scores) < _EPSILON:
        if bounds is None or min(abs(value - bound) for bound in bounds) > _EPSILON:
            return Estimate(value, None, None)
        lowest, highest = bounds
        reach = (highest - lowest) * (1 - tail ** (1 / len(scores)))
        if abs(value - lowest) <= _EPSILON:
            return Estimate(lowest, lowest, lowest + reach)
        return Estimate(highest, highest - reach, highest)
    # Ties count by half: the means of few problems take few values.
    below = np.mean(means < value - _EPSILON)
    not_above = np.mean(means <= value + _EPSILON)
    share = min(max(float(below + not_above) / 2, 0.5 / len(means)), 1 - 0.5 / len(means))
    bias = _NORMAL.inv_cdf(share)
    acceleration = np.sum(deviations**3) / 6 / np.sum(deviations**2) ** 1.5
    levels = []
    for level in (tail, 1 - tail):
        shifted = bias + _NORMAL.inv_cdf(level)
        levels.append(_NORMAL.cdf(bias + shifted / (1 - float(acceleration) * shifted)))
    low, high = np.quantile(means, levels)
    return Estimate(value, float(low), float(high))


def clustered_mean(means: Iterable[float]) -> ClusteredMean | None:
    """Returns the mean over problems with its standard error; None of none.

    Args:
      means: of each problem, the mean over its rows.
    """
    values = np.array(list(means), float)
    if not len(values):
        return None
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
    return ClusteredMean(float(values.mean()), error, len(values))


def clustered_ratio(
    numerators: Sequence[float], denominators: Sequence[float]
) -> ClusteredMean | None:
    """Returns sum over sum with the linearised standard error over problems.

    Args:
      numerators: a sum for each problem, such as its accepted steps.
      denominators: the same of what it is a share of; problems without any do not count.

    Returns:
      The ratio, or None where every denominator is 0.
    """
    above = np.asarray(numerators, float)
    below = np.asarray(denominators, float)
    above, below = above[below > 0], below[below > 0]
    count = len(below)
    if not count:
        return None
    ratio = above.sum() / below.sum()
    if count < 2:
        return ClusteredMean(float(ratio), None, count)
    squares = np.sum((above - ratio * below) ** 2) * count / (count - 1)
    return ClusteredMean(float(ratio), float(math.sqrt(squares) / below.sum()), count)


def clustered_mcnemar(differences: Sequence[int]) -> TwoSidedTest:
    """Returns the clustered McNemar test (Durkalski et al. 2003), z and its normal p-value.

    z = sum a_i / sqrt(sum a_i^2). The p-value is an approximation for many problems that differ;
    ``sign_flip_test`` is exact for any number.

    Args:
      differences: a_i of each problem: the sum over its seeds of (correct by one sampler) -
        (correct by the other).
    """
    squares = sum(difference**2 for difference in differences)
    statistic = sum(differences) / math.sqrt(squares) if squares else 0.0
    return TwoSidedTest(statistic, math.erfc(abs(statistic) / math.sqrt(2)))


def sign_flip_test(differences: Sequence[int]) -> TwoSidedTest:
    """Returns the sum of a_i and the exact share of sign flips whose sum is as far from 0.

    Under no difference between two samplers each a_i is as likely as -a_i. The law of the sum over
    all 2^P flips follows by adding one problem after the other.

    Args:
      differences: a_i, as for ``clustered_mcnemar``.
    """
    flipped = [abs(difference) for difference in differences if difference]
    reach = sum(flipped)
    law = np.ones(1)  # of the sum over the problems so far, from -their reach to it
    for size in flipped:
        longer = np.zeros(len(law) + 2 * size)
        longer[: len(law)] += law / 2
        longer[2 * size :] += law / 2
        law = longer
    statistic = sum(differences)
    far = np.abs(np.arange(-reach, reach + 1)) >= abs(statistic)
    return TwoSidedTest(float(statistic), min(1.0, float(law[far].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns p-values adjusted for the whole family by Holm's step-down method (1979)."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable").tolist()):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def group_by(rows: Iterable[Row], key: str) -> dict[Any, list[Row]]:
    """Returns the rows by their value of ``key``, in order of first appearance."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row[key], []).append(row)
    return groups


def problem_means(rows: Iterable[Row], quantity: Callable[[Row], float | None]) -> dict[str, float]:
    """Returns a quantity's mean over the rows of each problem.

    Rows where it is None or not finite do not count, nor do problems where it always is.
    """
    means = {}
    for problem, group in group_by(rows, "problem").items():
        values = [value for row in group if (value := quantity(row)) is not None]
        values = [value for value in values if math.isfinite(value)]
        if values:
            means[problem] = sum(values) / len(values)
    return means


def per_token(key: str) -> Callable[[Row], float | None]:
    """Returns the quantity ``key`` by token of the completion, None where it has no token."""

    def quantity(row: Row) -> float | None:
        return row[key] / row["num_tokens"] if row[key] is not None and row["num_tokens"] else None

    return quantity


QUANTITIES: dict[str, Callable[[Row], float | None]] = {
    "log_prob_per_token": per_token("log_prob"),
    "entropy_per_token": per_token("entropy"),
} | {
    name: operator.itemgetter(name)
    for name in (
        *("log_prob", "num_tokens", "decoded_tokens", "proposed_tokens"),
        *("replayed_tokens", "saved_tokens", "flops"),
    )
}


def describe_sampler(
    rows: Sequence[Row],
    sessions: Sequence[Row] = (),
    answer_key: Callable[[str], str] = str,
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, Any]:
    """Returns the figures of one sampler.

    pass@k is given for k up to the fewest rows that a problem has; "majority" is None below two of
    them and where no row has an answer. "seconds" are by row of the sessions, without compilation.

    Args:
      rows: its rows, at least one.
      sessions: its rows of ``sessions.jsonl``.
      answer_key: a normal form of answers: those that it makes equal vote together.
      resampling: of the intervals.
    """
    problems = list(group_by(rows, "problem").values())
    fewest = min(map(len, problems))
    has_votes = fewest > 1 and any(row["answer"] is not None for row in rows)
    scores = []
    for group in problems:
        correct = [bool(row["correct"]) for row in group]
        answers = [None if row["answer"] is None else answer_key(row["answer"]) for row in group]
        scores.append(
            [pass_at_k(len(group), sum(correct), k) for k in range(1, fewest + 1)]
            + [float(np.mean([answer is not None for answer in answers]))]
            + ([majority_vote(answers, correct)] if has_votes else [])
        )
    estimates = bootstrap(np.array(scores), resampling=resampling)
    sums = [
        [sum(row[key] for row in group) for group in problems] for key in ("accepted", "attempted")
    ]
    timed = sum(session["rows"] for session in sessions)
    return {
        "rows": len(rows),
        "problems": len(problems),
        "rows_per_problem": [fewest, max(map(len, problems))],
        "accuracy": estimates[0],
        "pass_at": dict(enumerate(estimates[:fewest], start=1)),
        "answered": estimates[fewest],
        "majority": estimates[fewest + 1] if has_votes else None,
        **{
            name: clustered_mean(problem_means(rows, quantity).values())
            for name, quantity in QUANTITIES.items()
        },
        "ended": dict(collections.Counter(row["ended"] for row in rows)),
        "attempted": sum(sums[1]),
        "null_moves": sum(row["null_moves"] for row in rows),
        "acceptance": clustered_ratio(*sums),
        "seconds": sum(session["seconds"] for session in sessions) / timed if timed else None,
        "compile_seconds": sum(session["compile_seconds"] for session in sessions),
    }


def compare(
    reference: Sequence[Row],
    other: Sequence[Row],
    resampling: Resampling = DEFAULT_RESAMPLING,
) -> dict[str, Any] | None:
    """Returns differences reference - other over the (problem, seed) pairs that both have.

    Args:
      reference: rows of a sampler.
      other: rows of another.
      resampling: of the interval of the difference in accuracy.

    Returns:
      The difference in accuracy, the clustered McNemar test, the exact sign-flip test, paired
      differences of other quantities, and the numbers of pairs and rows left unpaired; None
      without a pair.
    """
    theirs = {(row["problem"], row["seed"]): row for row in other}
    pairs = [
        (row, theirs[key]) for row in reference if (key := (row["problem"], row["seed"])) in theirs
    ]
    if not pairs:
        return None
    by_problem: dict[str, list[int]] = collections.defaultdict(list)
    for ours, other_row in pairs:
        by_problem[ours["problem"]].append(int(ours["correct"]) - int(other_row["correct"]))
    sums = [sum(group) for group in by_problem.values()]
    means = np.array([[np.mean(group)] for group in by_problem.values()])
    return {
        "pairs": len(pairs),
        "problems": len(by_problem),
        "unpaired_rows": len(reference) + len(other) - 2 * len(pairs),
        "accuracy": bootstrap(means, None, resampling)[0],
        "mcnemar": clustered_mcnemar(sums),
        "sign_flip": sign_flip_test(sums),
        **{
            name: clustered_mean(_paired_differences(pairs, quantity))
            for name, quantity in QUANTITIES.items()
        },
    }


def _paired_differences(
    pairs: Sequence[tuple[Row, Row]], quantity: Callable[[Row], float | None]
) -> list[float]:
    """Mean over the seeds of each problem of the difference within pairs where both have it."""
    differences = []
    for ours, theirs in pairs:
        above, below = quantity(ours), quantity(theirs)
        if above is not None and below is not None:
            differences.append({"problem": ours["problem"], "value": above - below})
    return list(problem_means(differences, operator.itemgetter("value")).values())
