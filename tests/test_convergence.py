"""Effective sample sizes, R-hat and autocorrelation: against ArviZ's own numbers, and by hand.

Every mutant is the module with one line changed; it must differ from ArviZ where the module agrees.
"""

import inspect
import logging
import types
import warnings

import numpy as np
import pytest

from ecmh_jax import convergence

TOLERANCE = 1e-10  # relative, to ArviZ's numbers
# Functions that return one number, with ArviZ's call for the same.
SCALARS = {
    "effective_sample_size": lambda arviz, draws: arviz.ess(draws, method="mean"),
    "bulk_effective_sample_size": lambda arviz, draws: arviz.ess(draws, method="bulk"),
    "tail_effective_sample_size": lambda arviz, draws: arviz.ess(
        draws, method="tail", prob=(0.05, 0.95)
    ),
    "split_r_hat": lambda arviz, draws: arviz.rhat(draws, method="rank"),
}
# name: (the line as it is, the line as it is not, a function that must notice).
MUTANTS = {
    "no split": (
        "return np.concatenate([draws[:, :half], draws[:, -half:]])",
        "return draws + 0 * half",
        "split_r_hat",
    ),
    "no split, sample size": (
        "return np.concatenate([draws[:, :half], draws[:, -half:]])",
        "return draws + 0 * half",
        "effective_sample_size",
    ),
    "the middle draw kept": ("draws[:, -half:]", "draws[:, half:2 * half]", "split_r_hat"),
    "no rank normalisation": (
        "return np.asarray(scores)[inverse].reshape(draws.shape)",
        "return draws",
        "bulk_effective_sample_size",
    ),
    "no rank normalisation, R-hat": (
        "return np.asarray(scores)[inverse].reshape(draws.shape)",
        "return draws",
        "split_r_hat",
    ),
    "another fractional rank": ("(ranks - 3 / 8)", "(ranks - 1 / 2)", "split_r_hat"),
    "ties by their last rank": (
        "np.cumsum(counts) - (counts - 1) / 2",
        "np.cumsum(counts)",
        "bulk_effective_sample_size",
    ),
    "no fold": ("folded = np.abs(halves - np.median(halves))", "folded = halves", "split_r_hat"),
    "all lags instead of Geyer's pairs": (
        "int(np.argmax(pairs <= 0)) if (pairs <= 0).any() else num_pairs - 1",
        "num_pairs - 1",
        "effective_sample_size",
    ),
    "pairs need not fall": (
        "np.minimum.accumulate(pairs[:stop]).sum()",
        "pairs[:stop].sum()",
        "effective_sample_size",
    ),
    "the last even lag dropped": (
        "time += correlation[2 * stop]",
        "time += 0",
        "effective_sample_size",
    ),
    "the last even lag twice": (
        "time += correlation[2 * stop]",
        "time += 2 * correlation[2 * stop]",
        "effective_sample_size",
    ),
    "no upper limit": ("max(time, 1 / np.log10(halves.size))", "time", "effective_sample_size"),
    "unbiased autocovariance": (
        "[:, :num_draws] / num_draws",
        "[:, :num_draws] / np.arange(num_draws, 0, -1)[None]",
        "effective_sample_size",
    ),
    "unbiased autocorrelation": (
        "[:, :num_draws] / num_draws",
        "[:, :num_draws] / np.arange(num_draws, 0, -1)[None]",
        "autocorrelation",
    ),
    "off by one lag": ("[:, :num_draws] / num", "[:, 1 : num_draws + 1] / num", "autocorrelation"),
    "off by one lag, sample size": (
        "[:, :num_draws] / num_draws",
        "[:, 1 : num_draws + 1] / num_draws",
        "effective_sample_size",
    ),
    "no padding": ("n=2 * num_draws", "n=num_draws", "autocorrelation"),
    "chains pooled": (
        "checked = np.asarray(draws, np.float64)",
        "checked = np.asarray(draws, np.float64).reshape(1, -1)",
        "effective_sample_size",
    ),
    "means of the chains ignored": (
        "covariance[0] + halves.mean(axis=1).var(ddof=1)",
        "within",
        "effective_sample_size",
    ),
    "other quantiles": ("(0.05, 0.95)", "(0.1, 0.9)", "tail_effective_sample_size"),
    "one tail": ("(0.05, 0.95)", "(0.05,)", "tail_effective_sample_size"),
    "population variance": ("halves.var(axis=1, ddof=1)", "halves.var(axis=1)", "split_r_hat"),
}


@pytest.fixture(scope="module")
def arviz():
    """ArviZ's functions of arrays; tests that need them skip without the extra."""
    module = pytest.importorskip("arviz_stats.base")
    logging.getLogger("arviz_stats").setLevel(logging.ERROR)
    return module.array_stats


def autoregressive(seed: int, num_chains: int, num_draws: int, correlation: float) -> np.ndarray:
    """Stationary chains x_i = correlation * x_{i-1} + noise with unit variance, [C, N]."""
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(num_chains, num_draws)) * np.sqrt(1 - correlation**2)
    draws = np.empty_like(noise)
    draws[:, 0] = rng.normal(size=num_chains)
    for step in range(1, num_draws):
        draws[:, step] = correlation * draws[:, step - 1] + noise[:, step]
    return draws


def cases() -> dict[str, np.ndarray]:
    """Draws of every kind that a run returns, and the edges."""
    found = {
        f"{num_chains} chains of {num_draws} draws, correlation {correlation}": autoregressive(
            number, num_chains, num_draws, correlation
        )
        for number, (num_chains, num_draws, correlation) in enumerate(
            (num_chains, num_draws, correlation)
            for num_chains in (1, 2, 3, 5)
            for num_draws in (4, 5, 6, 7, 8, 11, 50, 101, 400)
            for correlation in (-0.6, 0.0, 0.5, 0.95)
        )
    }
    smooth = autoregressive(1, 4, 151, 0.7)
    found["as good as independent"] = np.random.default_rng(2).normal(size=(4, 1000))
    found["alternating"] = autoregressive(3, 2, 500, -0.98)
    found["whole numbers"] = np.round(3 * smooth)
    found["an indicator"] = (smooth > 0.3).astype(np.float64)
    found["an even coin"] = np.tile([[0.0, 1.0, 1.0, 0.0]], (2, 5))
    found["a rare indicator"] = (smooth > 2.2).astype(np.float64)
    found["stays"] = np.repeat(smooth, 7, axis=1)
    found["chains in other places"] = smooth + np.array([[0.0], [1.0], [2.0], [5.0]])
    found["chains of other spread"] = smooth * np.array([[1.0], [1.0], [0.1], [5.0]])
    found["a trend"] = smooth + np.linspace(0, 3, 151)[None]
    found["heavy tails"] = np.random.default_rng(4).standard_cauchy(size=(4, 77))
    found["far from zero"] = smooth - 3000.0
    found["one chain never moves"] = np.where(np.arange(4)[:, None] == 2, 0.1, smooth)
    found["constant"] = np.full((3, 9), 0.1)
    found["one constant chain"] = np.full((1, 8), -2.0)
    found["three draws"] = smooth[:, :3]
    found["one draw"] = smooth[:, :1]
    found["not a number"] = np.where(smooth > 2.0, np.nan, smooth)
    return found


CASES = cases()


def disagreements(module, arviz, function: str) -> list[str]:
    """Names of the cases in which a function of ``module`` does not give ArviZ's number."""
    differ = []
    for name, draws in CASES.items():
        with np.errstate(all="ignore"):  # of ArviZ's 0/0, and of whatever a mutant does
            if function == "autocorrelation":
                value = module.autocorrelation(draws)
                expected = arviz.autocorr(draws)
                # Constant 0.1's differ from their rounded mean, and ArviZ divides by that.
                constant = np.ptp(draws, axis=1) == 0
                expected[constant] = np.nan
                # Correlations pass through 0 on the way, so theirs is an error of 1.
                same = np.allclose(value, expected, rtol=0, atol=TOLERANCE, equal_nan=True)
            else:
                value = getattr(module, function)(draws)
                expected = SCALARS[function](arviz, draws)
                same = np.isclose(value, expected, rtol=TOLERANCE, atol=0, equal_nan=True)
        if not same:
            differ.append(name)
    return differ


@pytest.mark.parametrize("function", [*SCALARS, "autocorrelation"])
def test_numbers_are_those_of_arviz(function, arviz):
    assert disagreements(convergence, arviz, function) == []


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant_is_killed(mutant, arviz):
    line, other_line, function = MUTANTS[mutant]
    source = inspect.getsource(convergence)
    assert source.count(line) >= 1
    module = types.ModuleType("mutant")
    exec(compile(source.replace(line, other_line), "mutant", "exec"), module.__dict__)
    with warnings.catch_warnings(action="ignore"):
        assert disagreements(module, arviz, function)


def test_summary_is_that_of_arviz(arviz):
    draws = CASES["chains of other spread"]
    summary = convergence.summarise(draws)
    np.testing.assert_allclose(
        summary,
        [
            draws.mean(),
            arviz.mcse(draws, method="mean"),
            *(expected(arviz, draws) for expected in SCALARS.values()),
        ],
        rtol=TOLERANCE,
    )


@pytest.mark.parametrize("case", ["not a number", "three draws"])
def test_summary_of_unusable_draws_is_nan(case):
    assert np.isnan(convergence.summarise(CASES[case])).all()


def test_no_number_hides_infinite_draws():
    draws = CASES["whole numbers"].copy()
    draws[1, 3] = np.inf
    assert np.isnan(convergence.summarise(draws)).all()
    correlation = convergence.autocorrelation(draws)
    np.testing.assert_array_equal(np.isnan(correlation).all(axis=1), [False, True, False, False])


def test_constant_draws():
    summary = convergence.summarise(np.full((3, 9), 0.1))
    # Of 9 draws the middle one belongs to neither half.
    assert summary[2:5] == (24.0, 24.0, 24.0)
    assert summary.standard_error < 1e-16
    assert np.isnan(summary.r_hat)
    assert np.isnan(convergence.autocorrelation(np.full((3, 9), 0.1))).all()


def test_chains_stuck_at_different_constants():
    stuck = np.array([[0.1], [0.7], [0.7]]) * np.ones((1, 301))
    assert convergence.split_r_hat(stuck) == np.inf
    assert convergence.effective_sample_size(stuck) < 6


@pytest.mark.parametrize("correlation", [-0.4, 0.0, 0.8])
def test_effective_sample_size_estimates_what_it_should(correlation):
    draws = autoregressive(5, 8, 20_000, correlation)
    # The autocorrelation time of such a chain is (1 + correlation) / (1 - correlation).
    expected = draws.size * (1 - correlation) / (1 + correlation)
    assert convergence.effective_sample_size(draws) == pytest.approx(expected, rel=0.1)
    assert convergence.bulk_effective_sample_size(draws) == pytest.approx(expected, rel=0.1)
    assert convergence.split_r_hat(draws) == pytest.approx(1, abs=2e-3)


def test_autocorrelation_by_its_definition():
    draws = autoregressive(6, 3, 13, 0.5)
    centred = draws - draws.mean(axis=1, keepdims=True)
    lags = [(centred[:, : 13 - lag] * centred[:, lag:]).sum(axis=1) for lag in range(13)]
    expected = np.stack(lags, axis=1) / lags[0][:, None]
    np.testing.assert_allclose(convergence.autocorrelation(draws), expected, atol=1e-14)
    np.testing.assert_allclose(convergence.autocorrelation(draws, 4), expected[:, :5], atol=1e-14)
    np.testing.assert_array_equal(convergence.autocorrelation(draws, 0), np.ones((3, 1)))


@pytest.mark.parametrize("function", [*SCALARS, "summarise", "autocorrelation"])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 4), (0, 5)])
def test_draws_of_another_shape_are_refused(function, shape):
    with pytest.raises(ValueError, match=r"draws have shape .*; expected \[C, N\]"):
        getattr(convergence, function)(np.zeros(shape))


@pytest.mark.parametrize("max_lag", [-1, 5])
def test_lags_that_do_not_exist_are_refused(max_lag):
    with pytest.raises(ValueError, match=rf"max_lag is {max_lag}; expected 0\.\.4"):
        convergence.autocorrelation(np.zeros((2, 5)), max_lag)
