"""The cut law against the oracle's formula, slot by slot, and as a trace grows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import cut
from tests import oracle

NUM_SLOTS = 11  # T
MAX_PROMPT = 3
MAX_TOKENS = NUM_SLOTS - MAX_PROMPT


@functools.partial(jax.jit, static_argnames="cut_first_token")
def log_cut_probabilities(entropy, prompt_length, length, cut_power, uniform_mix, cut_first_token):
    """[B, T] log c of traces [B, T], by the two functions that the kernel calls."""

    def one_chain(entropy, prompt_length, length, cut_power, uniform_mix):
        law = cut.cut_law(entropy, prompt_length, length, cut_power, cut_first_token)
        return cut.log_cut_probabilities(law, prompt_length, length, uniform_mix, cut_first_token)

    return jax.vmap(one_chain)(entropy, prompt_length, length, cut_power, uniform_mix)


def random_traces(rng, num_traces):
    """Entropies [B, T] of every kind, prompt lengths [B], lengths [B].

    Beyond a trace's length there is rubbish, which must not matter.
    """
    prompt_length = rng.integers(1, MAX_PROMPT + 1, num_traces)
    num_tokens = rng.integers(1, MAX_TOKENS + 1, num_traces)
    entropy = np.zeros((num_traces, NUM_SLOTS), np.float32)
    for row in range(num_traces):
        values = rng.gamma(0.7, size=NUM_SLOTS)
        kind = row % 6
        if kind == 1:
            values[:] = values[0]  # no jump but the first
        elif kind == 2:
            values = np.sort(values)[::-1]  # only falls after the first jump
        elif kind == 3:
            values *= 1e-3
        elif kind == 4:
            values = np.repeat(values[::2], 2)[:NUM_SLOTS]  # plateaus
        elif kind == 5:
            values[:] = 0.0
        entropy[row, prompt_length[row] :] = values[: NUM_SLOTS - prompt_length[row]]
    return entropy, prompt_length, prompt_length + num_tokens


def log_cuts(entropy, prompt_length, length, cut_power, uniform_mix, cut_first_token):
    rows = np.ones(len(entropy), np.float32)
    return np.asarray(
        log_cut_probabilities(
            entropy,
            np.asarray(prompt_length, np.int32),
            np.asarray(length, np.int32),
            cut_power * rows,
            uniform_mix * rows,
            cut_first_token=cut_first_token,
        )
    )


@pytest.mark.parametrize("cut_first_token", [True, False])
@pytest.mark.parametrize("uniform_mix", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("cut_power", [0.0, 1.0, 4.0])
def test_law_is_that_of_the_oracle(cut_power, uniform_mix, cut_first_token):
    rng = np.random.default_rng(1)
    entropy, prompt_length, length = random_traces(rng, 300)
    log_probability = log_cuts(
        entropy, prompt_length, length, cut_power, uniform_mix, cut_first_token
    )
    assert np.sum(length - prompt_length == 1) > 20
    expected = np.zeros(entropy.shape)
    for row, (first, end) in enumerate(zip(prompt_length, length, strict=True)):
        expected[row, first:end] = oracle.cut_probabilities(
            entropy[row, first:end].astype(np.float64), cut_power, uniform_mix, cut_first_token
        )
    np.testing.assert_allclose(np.exp(log_probability), expected, rtol=2e-5, atol=1e-7)
    has_cut = cut_first_token | (length - prompt_length > 1)
    np.testing.assert_allclose(np.exp(log_probability).sum(axis=-1), 1.0 * has_cut, rtol=1e-5)
    slots = np.arange(NUM_SLOTS)[None]
    first = prompt_length[:, None] + (0 if cut_first_token else 1)
    padding = (slots < first) | (slots >= length[:, None])
    assert np.all(np.isneginf(log_probability[padding]))


@pytest.mark.parametrize("cut_first_token", [True, False])
def test_a_single_token_is_cut_or_nothing_is(cut_first_token):
    entropy = np.zeros((3, NUM_SLOTS), np.float32)
    entropy[:, 2:] = [[0.7], [0.0], [1e-20]]
    log_probability = log_cuts(entropy, [2, 2, 2], [3, 3, 3], 4.0, 0.0, cut_first_token)
    expected = np.full((3, NUM_SLOTS), -np.inf)
    if cut_first_token:
        expected[:, 2] = 0.0
    np.testing.assert_array_equal(log_probability, expected)


def test_equal_entropies_cut_the_first_token_or_any_other():
    entropy = np.zeros((3, NUM_SLOTS), np.float32)
    entropy[:, 2:] = 0.6
    lengths = [3, 6, 9]
    first = np.exp(log_cuts(entropy, [2, 2, 2], lengths, 4.0, 0.0, True))
    np.testing.assert_array_equal(first, np.eye(NUM_SLOTS)[[2, 2, 2]])
    others = np.exp(log_cuts(entropy, [2, 2, 2], lengths, 4.0, 0.0, False))
    np.testing.assert_allclose(others[1, 3:6], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(others[2, 3:9], 1 / 6, rtol=1e-6)
    np.testing.assert_allclose(others.sum(axis=-1), [0.0, 1.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("cut_first_token", [True, False])
@pytest.mark.parametrize("uniform_mix", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("cut_power", [0.0, 1.0, 4.0])
def test_probability_of_a_cut_never_rises_as_the_trace_grows(
    cut_power, uniform_mix, cut_first_token
):
    rng = np.random.default_rng(2)
    entropy, prompt_length, _ = random_traces(rng, 120)
    by_length = [
        log_cuts(entropy, prompt_length, prompt_length + n, cut_power, uniform_mix, cut_first_token)
        for n in range(1, MAX_TOKENS + 1)
    ]
    falls = 0
    for shorter, longer, n in zip(by_length, by_length[1:], range(1, MAX_TOKENS), strict=False):
        slots = np.arange(NUM_SLOTS)[None]
        first = prompt_length[:, None] + (0 if cut_first_token else 1)
        present = (slots >= first) & (slots < prompt_length[:, None] + n)
        assert np.all(longer[present] <= shorter[present] + 1e-6)
        falls += np.sum(longer[present] < shorter[present] - 1e-3)
    assert falls > 100  # or the property would say nothing


def test_weight_of_a_jump():
    jumps = jnp.asarray([-0.5, 0.0, 0.5, 2.0])
    for cut_power, expected in (
        (0.0, [0.0, 0.0, 0.0, 0.0]),
        (1.0, [-np.inf, -np.inf, np.log(0.5), np.log(2.0)]),
        (4.0, [-np.inf, -np.inf, 4 * np.log(0.5), 4 * np.log(2.0)]),
    ):
        weight = cut.log_cut_weight(jumps, jnp.asarray(cut_power))
        np.testing.assert_allclose(weight, expected, rtol=1e-6)
