"""Whether chains have mixed: effective sample sizes, R-hat and autocorrelation of a quantity.

A *quantity* is a scalar of the current trace after each Metropolis-Hastings step (log p, length,
mean entropy, an answer indicator), as ``draws`` [C, N]: C chains of one prompt, N steps of one
stage; other prompts and stages have other targets. ``diagnostics.chain_draws`` makes draws of a
run's records. All is computed on the host, in NumPy float64.

R-hat and the effective sample sizes are those of Vehtari, Gelman, Simpson, Carpenter and Buerkner
(2021, arXiv:1903.08008), with ArviZ's conventions, so that the numbers are ArviZ's:

* every chain is split into its first and its last N // 2 draws (an odd middle draw is left out);
* fewer than 4 draws, or for R-hat fewer than 2 chains, give NaN;
* constant draws give an R-hat of NaN (0/0) and an effective sample size of their number after the
  split, as if independent: chains that never moved look perfect, so read the number of distinct
  traces and the acceptance beside it;
* chains stuck at different constants give an R-hat of inf (ArviZ: inf, or 1e15 by rounding);
* draws that are not all finite give NaN (ArviZ lets infinite ones pass where ranks hide them).
"""

import statistics
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

_FEWEST_DRAWS = 4  # two in each half of a chain
_TAIL_PROBABILITIES = (0.05, 0.95)


class Summary(NamedTuple):
    """What C chains of N draws say about one quantity, in the quantity's own unit.

    Attributes:
      mean: over all draws.
      standard_error: Monte Carlo standard error of the mean, deviation / sqrt(sample size).
      effective_sample_size: for the mean.
      bulk_effective_sample_size: of the rank-normalised draws.
      tail_effective_sample_size: the smaller of those of the 5 % and 95 % quantiles.
      r_hat: rank-normalised split R-hat; above 1.01 the chains have not mixed.
    """

    mean: float
    standard_error: float
    effective_sample_size: float
    bulk_effective_sample_size: float
    tail_effective_sample_size: float
    r_hat: float


def summarise(draws: ArrayLike) -> Summary:
    """Returns mean, error, effective sample sizes and R-hat of one quantity.

    All are NaN for fewer than 4 draws and for draws that are not all finite.

    Args:
      draws: [C, N] numbers.

    Raises:
      ValueError: draws are not of shape [C, N].
    """
    checked = _check_draws(draws)
    size, usable = effective_sample_size(checked), _is_usable(checked)
    return Summary(
        mean=float(checked.mean()) if usable else np.nan,
        standard_error=float(checked.std(ddof=1) / np.sqrt(size)) if usable else np.nan,
        effective_sample_size=size,
        bulk_effective_sample_size=bulk_effective_sample_size(checked),
        tail_effective_sample_size=tail_effective_sample_size(checked),
        r_hat=split_r_hat(checked),
    )


def effective_sample_size(draws: ArrayLike) -> float:
    """Independent draws that would estimate the mean as well; ArviZ's method "mean".

    C N / tau of the split chains, with tau = 1 + 2 sum_t rho_t the autocorrelation time, summed
    by Geyer's initial positive and monotone sequences (arXiv:1903.08008, section 3.2). At most
    C N log10(C N), which only anticorrelated draws reach.

    Args:
      draws: [C, N] numbers.

    Raises:
      ValueError: draws are not of shape [C, N].
    """
    checked = _check_draws(draws)
    return _size_of(_split(checked)) if _is_usable(checked) else np.nan


def bulk_effective_sample_size(draws: ArrayLike) -> float:
    """The effective sample size of rank-normalised draws [C, N]; ArviZ's method "bulk".

    Ranks of all chains together become normal quantiles first (arXiv:1903.08008, section 4.1), so
    that it exists without moments and does not depend on the quantity's scale.

    Raises:
      ValueError: draws are not of shape [C, N].
    """
    checked = _check_draws(draws)
    return _size_of(_rank_normalise(_split(checked))) if _is_usable(checked) else np.nan


def tail_effective_sample_size(draws: ArrayLike) -> float:
    """The smaller effective sample size of the 5 % and 95 % quantiles.

    That of a quantile is that of the indicators ``draws <= quantile`` (arXiv:1903.08008, section
    4.3). Of a discrete quantity an indicator may be constant, and then counts as independent.
    ArviZ's method "tail" with ``prob=(0.05, 0.95)``; left alone, ArviZ takes other quantiles.

    Args:
      draws: [C, N] numbers.

    Raises:
      ValueError: draws are not of shape [C, N].
    """
    checked = _check_draws(draws)
    if not _is_usable(checked):
        return np.nan
    return min(
        _size_of(_split((checked <= np.quantile(checked, probability)).astype(np.float64)))
        for probability in _TAIL_PROBABILITIES
    )


def split_r_hat(draws: ArrayLike) -> float:
    """Rank-normalised split R-hat; ArviZ's method "rank".

    The larger of the R-hat of the rank-normalised draws, which sees chains that differ in place,
    and that of |draws - median|, which sees chains that differ in spread (arXiv:1903.08008,
    section 4.2). A fold without spread, as of a coin that fell evenly, is left out.

    Args:
      draws: [C, N] numbers.

    Raises:
      ValueError: draws are not of shape [C, N].
    """
    checked = _check_draws(draws)
    if not _is_usable(checked) or len(checked) < 2:
        return np.nan
    halves = _split(checked)
    folded = np.abs(halves - np.median(halves))
    return float(np.fmax(_r_hat_of(_rank_normalise(halves)), _r_hat_of(_rank_normalise(folded))))


def autocorrelation(draws: ArrayLike, max_lag: int | None = None) -> np.ndarray:
    """Autocorrelation of each chain by itself, [C, max_lag + 1] float64, 1 at lag 0.

    rho_t = sum_i (x_i - m)(x_{i+t} - m) / sum_i (x_i - m)^2 with the chain's own mean m: the biased
    estimate, as ArviZ has it. A chain that is constant or not finite has none: NaN at every lag.

    Args:
      draws: [C, N] numbers, N >= 1.
      max_lag: the last lag, 0..N-1; default N-1.

    Raises:
      ValueError: draws are not of shape [C, N], or max_lag is out of range.
    """
    checked = _check_draws(draws)
    num_draws = checked.shape[1]
    last_lag = num_draws - 1 if max_lag is None else max_lag
    if not 0 <= last_lag < num_draws:
        raise ValueError(f"max_lag is {max_lag}; expected 0..{num_draws - 1} for {num_draws} draws")
    # Asked of the draws: a rounded mean leaves a constant chain a variance of rounding errors.
    varies = (checked != checked[:, :1]).any(axis=1) & np.isfinite(checked).all(axis=1)
    correlation = np.full((len(checked), last_lag + 1), np.nan)
    covariance = _autocovariance(checked[varies])
    correlation[varies] = covariance[:, : last_lag + 1] / covariance[:, :1]
    return correlation


def _check_draws(draws: ArrayLike) -> np.ndarray:
    """Returns draws as float64 [C, N]."""
    checked = np.asarray(draws, np.float64)
    if checked.ndim != 2 or not len(checked):
        raise ValueError(f"draws have shape {checked.shape}; expected [C, N], C at least 1")
    return checked


def _is_usable(draws) -> bool:
    return draws.shape[1] >= _FEWEST_DRAWS and bool(np.isfinite(draws).all())


def _split(draws):
    """The first and the last half of each chain as chains of their own, [2 C, N // 2]."""
    half = draws.shape[1] // 2
    return np.concatenate([draws[:, :half], draws[:, -half:]])


def _rank_normalise(draws):
    """Normal quantiles of (rank - 3/8) / (S + 1/4); equal draws share their mean rank."""
    _, inverse, counts = np.unique(draws, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    normal = statistics.NormalDist()
    scores = [normal.inv_cdf(share) for share in (ranks - 3 / 8) / (draws.size + 1 / 4)]
    return np.asarray(scores)[inverse].reshape(draws.shape)


def _autocovariance(draws):
    """Biased autocovariance of each chain at lags 0..N-1, by a padded Fourier transform."""
    num_draws = draws.shape[1]
    centred = draws - draws.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(centred, n=2 * num_draws, axis=1)
    power = spectrum * np.conjugate(spectrum)
    return np.fft.irfft(power, n=2 * num_draws, axis=1)[:, :num_draws] / num_draws


def _size_of(halves) -> float:
    """Effective sample size of chains that are split already."""
    num_draws = halves.shape[1]
    if np.ptp(halves) < np.finfo(np.float64).resolution:
        return float(halves.size)
    covariance = _autocovariance(halves).mean(axis=0)
    within = covariance[0] * num_draws / (num_draws - 1)
    variance = covariance[0] + halves.mean(axis=1).var(ddof=1)
    correlation = 1 - (within - covariance) / variance
    correlation[0] = 1.0
    num_pairs = max(1, (num_draws - 1) // 2)
    pairs = correlation[: 2 * num_pairs].reshape(num_pairs, 2).sum(axis=1)
    # Geyer: the true sums of neighbours are positive and fall; what does not is noise.
    stop = int(np.argmax(pairs <= 0)) if (pairs <= 0).any() else num_pairs - 1
    time = -1 + 2 * np.minimum.accumulate(pairs[:stop]).sum()
    # Half of the first pair left out: its even lag, if positive, counts once (section 3.2).
    if correlation[2 * stop] > 0 or pairs[stop] >= 0:
        time += correlation[2 * stop]
    return float(halves.size / max(time, 1 / np.log10(halves.size)))


def _r_hat_of(halves) -> float:
    """sqrt((between / within + n - 1) / n) of chains that are split already."""
    num_draws = halves.shape[1]
    between = num_draws * halves.mean(axis=1).var(ddof=1)
    # A rounded mean would leave constant halves a variance of rounding errors.
    within = np.where(np.ptp(halves, axis=1) > 0, halves.var(axis=1, ddof=1), 0.0).mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.sqrt((between / within + num_draws - 1) / num_draws))
