"""The running ratio against the formula over whole suffixes, and as a bound on its final value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import acceptance, cut, token_law
from tests import enumeration, oracle

NUM_SLOTS = 11  # T
PROMPT_LENGTH = 2
MAX_TOKENS = NUM_SLOTS - PROMPT_LENGTH
VOCABULARY_SIZE = 5
NUM_PAIRS = 300


@functools.partial(jax.jit, static_argnames="cut_first_token")
def running_ratios(
    current, proposal, cut_slot, divergence, cut_power, uniform_mix, *, cut_first_token
):
    """[B, T] log A of the proposal after each of its slots; NaN where none was drawn.

    ``current`` and ``proposal`` are (log_weight [B, T], entropy [B, T], length [B]).
    """

    def one_chain(current, proposal, cut_slot, divergence, cut_power, uniform_mix):
        log_weight, entropy, length = current
        law = cut.cut_law(entropy, PROMPT_LENGTH, length, cut_power, cut_first_token)
        log_cut = cut.log_cut_probabilities(
            law, PROMPT_LENGTH, length, uniform_mix, cut_first_token
        )
        ratio = acceptance.begin(
            log_weight, entropy, law, log_cut[cut_slot], cut_slot, divergence, length
        )

        def add_token(ratio, slot_and_token):
            slot, log_weight, entropy = slot_and_token
            drawn = (slot >= divergence) & (slot < proposal[2])
            extended = acceptance.extend(
                ratio,
                log_weight,
                entropy,
                cut_power,
            )
            ratio = jax.tree.map(functools.partial(jnp.where, drawn), extended, ratio)
            num_cuts = cut.num_uniform_cuts(PROMPT_LENGTH, slot + 1, cut_first_token)
            value = acceptance.log_ratio(ratio, num_cuts, uniform_mix)
            return ratio, jnp.where(drawn, value, jnp.nan)

        slots = jnp.arange(NUM_SLOTS)
        return jax.lax.scan(add_token, ratio, (slots, proposal[0], proposal[1]))[1]

    return jax.vmap(one_chain)(current, proposal, cut_slot, divergence, cut_power, uniform_mix)


def draw_trace(rng, power, inverse_temperature, shared=None, num_shared=0):
    """A completion's log-weights and entropies [T], float64, its laws drawn at random.

    The first ``num_shared`` slots are those of ``shared``; the slot after them keeps its entropy,
    because that belongs to the prefix.
    """
    log_weight, entropy = np.zeros(NUM_SLOTS), np.zeros(NUM_SLOTS)
    concentration = rng.choice([0.05, 0.4, 5.0], size=NUM_SLOTS)
    for slot in range(PROMPT_LENGTH, NUM_SLOTS):
        p = rng.dirichlet(np.full(VOCABULARY_SIZE, concentration[slot])) + 1e-9
        p /= p.sum()
        q = enumeration.proposal_law(p, 1.0 / inverse_temperature)
        token = rng.choice(VOCABULARY_SIZE, p=q)
        log_weight[slot] = power * np.log(p[token]) - np.log(q[token])
        entropy[slot] = enumeration.entropy(p)
    if shared is not None:
        log_weight[:num_shared] = shared[0][:num_shared]
        entropy[: num_shared + 1] = shared[1][: num_shared + 1]
    return log_weight, entropy


@functools.cache
def random_pairs(power, inverse_temperature, cut_first_token):
    """Pairs of traces that differ from ``divergence`` on, and the cut before it."""
    rng = np.random.default_rng(1)
    currents, proposals, cut_slots, divergences = [], [], [], []
    first = PROMPT_LENGTH + (0 if cut_first_token else 1)
    for _ in range(NUM_PAIRS):
        length = rng.integers(first + 1, NUM_SLOTS + 1)
        divergence = rng.integers(first, length)
        current = draw_trace(rng, power, inverse_temperature)
        proposal = draw_trace(rng, power, inverse_temperature, current, divergence)
        currents.append((*current, length))
        proposals.append((*proposal, rng.integers(divergence + 1, NUM_SLOTS + 1)))
        cut_slots.append(rng.integers(first, divergence + 1))
        divergences.append(divergence)
    stacked = [tuple(map(np.stack, zip(*traces, strict=True))) for traces in (currents, proposals)]
    return *stacked, np.array(cut_slots), np.array(divergences)


def run_pairs(pairs, cut_power, uniform_mix, cut_first_token):
    current, proposal, cut_slot, divergence = pairs

    def cast(trace):
        log_weight, entropy, length = trace
        return log_weight.astype(np.float32), entropy.astype(np.float32), length.astype(np.int32)

    return np.asarray(
        running_ratios(
            cast(current),
            cast(proposal),
            cut_slot.astype(np.int32),
            divergence.astype(np.int32),
            np.full(NUM_PAIRS, cut_power, np.float32),
            np.full(NUM_PAIRS, uniform_mix, np.float32),
            cut_first_token=cut_first_token,
        )
    )


def formula(log_weight, entropy, length, cut_slot, cut_power, uniform_mix, cut_first_token):
    """Sum of a trace's log-weights from the cut on, plus log c of the cut; NumPy float64."""
    cuts = oracle.cut_probabilities(
        entropy[PROMPT_LENGTH:length], cut_power, uniform_mix, cut_first_token
    )
    with np.errstate(divide="ignore"):
        return log_weight[cut_slot:length].sum() + np.log(cuts[cut_slot - PROMPT_LENGTH])


@pytest.mark.parametrize("cut_first_token", [True, False])
@pytest.mark.parametrize(
    ("power", "inverse_temperature", "cut_power", "uniform_mix"),
    [(2.0, 0.7, 0.0, 0.0), (2.0, 3.0, 1.0, 0.1), (4.0, 4.0, 4.0, 1.0), (4.0, 4.0, 4.0, 0.0)],
)
def test_running_ratio_is_the_formula_over_whole_suffixes(
    power, inverse_temperature, cut_power, uniform_mix, cut_first_token
):
    pairs = random_pairs(power, inverse_temperature, cut_first_token)
    ratios = run_pairs(pairs, cut_power, uniform_mix, cut_first_token)
    settings = (cut_power, uniform_mix, cut_first_token)
    expected = np.full(ratios.shape, np.nan)
    for row, (cut_slot, divergence) in enumerate(zip(*pairs[2:], strict=True)):
        current, proposal = ([part[row] for part in trace] for trace in pairs[:2])
        before = formula(*current, cut_slot, *settings)
        if np.isneginf(before):  # a cut that has no chance, so the kernel never draws it
            continue
        # Every prefix of the proposal is a whole proposal that ended there.
        for end in range(divergence + 1, proposal[2] + 1):
            expected[row, end - 1] = formula(*proposal[:2], end, cut_slot, *settings) - before
    compared = ~np.isnan(expected)
    assert compared.sum() > NUM_PAIRS
    np.testing.assert_allclose(ratios[compared], expected[compared], rtol=1e-5, atol=2e-4)


def largest_rise(power, inverse_temperature, cut_power, uniform_mix):
    """The most that any running ratio rises when a token is added."""
    pairs = random_pairs(power, inverse_temperature, True)
    ratios = run_pairs(pairs, cut_power, uniform_mix, True)
    rises = np.diff(np.where(np.isfinite(ratios), ratios, np.nan), axis=1)
    assert np.isfinite(rises).sum() > NUM_PAIRS
    return np.nanmax(rises)


@pytest.mark.parametrize(("cut_power", "uniform_mix"), [(0.0, 0.0), (1.0, 0.1), (4.0, 0.0)])
@pytest.mark.parametrize(
    ("power", "inverse_temperature"), [(4.0, 4.0), (4.0, 2.0), (2.0, 1.0), (1.0, 1.0)]
)
def test_running_ratio_never_rises_in_the_bounded_range(
    power, inverse_temperature, cut_power, uniform_mix
):
    assert token_law.weights_are_bounded(np.float32(power), np.float32(inverse_temperature))
    assert largest_rise(power, inverse_temperature, cut_power, uniform_mix) <= 2e-5


@pytest.mark.parametrize(("power", "inverse_temperature"), [(1.0, 4.0), (2.0, 0.5), (2.0, 3.0)])
def test_running_ratio_rises_outside_of_the_bounded_range(power, inverse_temperature):
    assert not token_law.weights_are_bounded(np.float32(power), np.float32(inverse_temperature))
    assert largest_rise(power, inverse_temperature, 1.0, 0.1) > 0.05
