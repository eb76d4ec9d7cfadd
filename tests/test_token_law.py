"""The fused token law against NumPy in float64: statistics, truncation, and the law of the draw."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import token_law
from tests import enumeration

draw_token = jax.jit(token_law.draw_token, static_argnames="top_k")
top_k_logits = jax.jit(token_law.top_k_logits, static_argnames="top_k")
whole_top_k = jax.jit(jax.lax.top_k, static_argnums=1)

POWERS = np.array([4.0, 2.0, 1.0], np.float32)
INVERSE_TEMPERATURES = np.array([4.0, 0.7, 1.0], np.float32)


def draw(logits, uniforms, power=4.0, inverse_temperature=4.0, excluded=-1, top_k=None):
    """``draw_token`` of NumPy arrays, with scalars spread over the rows."""
    rows = np.ones(len(logits), np.float32)
    drawn = draw_token(
        logits,
        np.asarray(uniforms, np.float32),
        power * rows,
        inverse_temperature * rows,
        (excluded * rows).astype(np.int32),
        top_k=top_k,
    )
    return jax.tree.map(np.asarray, drawn)


def random_uniforms(rng, num_rows):
    return rng.random((num_rows, 2), np.float32)


def even_uniforms(num_draws):
    """Midpoints of a line, and a golden-ratio lattice over the square of both, [num_draws, 2]."""
    index = np.arange(num_draws)
    return np.stack([(index + 0.5) / num_draws, index * (np.sqrt(5) - 1) / 2 % 1.0], axis=-1)


def reference(logits, power, inverse_temperature, top_k):
    """Tables [B, V] of p, q and log-weights and the entropies [B], one row after the other."""
    p = enumeration.truncated_law(np.asarray(logits, np.float64), top_k)
    q = np.stack(
        [
            enumeration.proposal_law(row, 1.0 / float(inverse))
            for row, inverse in zip(p, inverse_temperature, strict=True)
        ]
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        log_weight = np.asarray(power, np.float64)[:, None] * np.log(p) - np.log(q)
    return p, q, log_weight, enumeration.entropy(p)


@pytest.mark.parametrize(
    ("vocabulary_size", "top_k"),
    [(11, None), (11, 4), (11, 11), (200, None), (200, 3), (200, 90), (4096, None), (4096, 50)],
)
def test_statistics_are_those_of_the_reference(vocabulary_size, top_k):
    rng = np.random.default_rng(vocabulary_size)
    for scale in (0.1, 1.0, 4.0):
        logits = (scale * rng.normal(size=(3, vocabulary_size)) - 20.0).astype(np.float32)
        drawn = draw(logits, random_uniforms(rng, 3), POWERS, INVERSE_TEMPERATURES, -1, top_k)
        p, q, log_weight, entropy = reference(logits, POWERS, INVERSE_TEMPERATURES, top_k)
        assert drawn.token.dtype == jnp.int32
        for name in ("log_prob", "log_q", "log_weight", "entropy"):
            assert getattr(drawn, name).dtype == jnp.float32
        at_token = (np.arange(3), drawn.token)
        assert np.all(p[at_token] > 0)
        np.testing.assert_allclose(drawn.log_prob, np.log(p[at_token]), rtol=2e-6, atol=2e-5)
        np.testing.assert_allclose(drawn.log_q, np.log(q[at_token]), rtol=2e-6, atol=4e-5)
        np.testing.assert_allclose(drawn.log_weight, log_weight[at_token], rtol=2e-6, atol=4e-5)
        np.testing.assert_allclose(drawn.entropy, entropy, rtol=2e-5, atol=2e-6)
        assert drawn.finite.all()


@pytest.mark.parametrize("top_k", [None, 7])
def test_weight_is_the_normaliser_whatever_token_is_drawn(top_k):
    rng = np.random.default_rng(1)
    logits = np.tile(rng.normal(size=(1, 200)).astype(np.float32), (512, 1))
    for power in (1.5, 4.0):
        drawn = draw(logits, random_uniforms(rng, 512), power, power, -1, top_k)
        p = enumeration.truncated_law(logits[:1].astype(np.float64), top_k)[0]
        assert len(np.unique(drawn.token)) > 4
        assert len(np.unique(drawn.log_weight)) == 1
        np.testing.assert_allclose(drawn.log_weight[0], np.log(np.sum(p**power)), rtol=1e-5)


@pytest.mark.parametrize("vocabulary_size", [11, 64, 200, 449, 1024])
def test_top_k_is_that_of_the_whole_vocabulary_ties_included(vocabulary_size):
    rng = np.random.default_rng(vocabulary_size)
    num_groups = -(-vocabulary_size // 64)
    for top_k in sorted({1, 2, max(num_groups - 1, 1), num_groups, num_groups + 1,
                         vocabulary_size}):  # fmt: skip
        for _ in range(8):
            levels = np.array([-np.inf, -1.0, 0.0, 0.25, 3.0], np.float32)
            logits = np.stack(
                [
                    rng.choice(levels, vocabulary_size),
                    rng.choice(levels, vocabulary_size, p=[0.97, 0.01, 0.01, 0.005, 0.005]),
                    rng.choice(levels[:3], vocabulary_size, p=[0.1, 0.899, 0.001]),
                ]
            )
            kept, token_ids, maximum = map(np.asarray, top_k_logits(logits, top_k=top_k))
            expected, expected_ids = map(np.asarray, whole_top_k(logits, top_k))
            np.testing.assert_array_equal(kept, expected)
            np.testing.assert_array_equal(token_ids, expected_ids)
            np.testing.assert_array_equal(maximum, logits.max(axis=-1))
        assert (kept.dtype, token_ids.dtype) == (jnp.float32, jnp.int32)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("top_k", [None, 3, 90])
def test_half_precision_logits_are_computed_in_float32(dtype, top_k):
    rng = np.random.default_rng(2)
    logits = jnp.asarray(rng.normal(size=(3, 200)) * 3, dtype)
    uniforms = random_uniforms(rng, 3)
    drawn = draw(logits, uniforms, top_k=top_k)
    expected = draw(logits.astype(jnp.float32), uniforms, top_k=top_k)
    np.testing.assert_array_equal(drawn.token, expected.token)
    for name in ("log_prob", "log_q", "log_weight", "entropy"):
        assert getattr(drawn, name).dtype == jnp.float32
        np.testing.assert_allclose(getattr(drawn, name), getattr(expected, name), rtol=1e-6)


@pytest.mark.parametrize("inverse_temperature", [0.5, 4.0, 50.0])
@pytest.mark.parametrize("top_k", [None, 4])
def test_law_of_a_draw_is_q_without_the_excluded_token(top_k, inverse_temperature):
    num_draws = 4096
    rng = np.random.default_rng(3)
    # At a low temperature a law has to be flat to be more than one token.
    row = (rng.normal(size=11) * min(1.0, 1.5 / inverse_temperature)).astype(np.float32)
    row[[2, 8]] = -np.inf
    logits = np.tile(row, (num_draws, 1))
    _, q, _, _ = reference(logits[:1], [1.0], [inverse_temperature], top_k)
    for excluded in (-1, int(np.argmax(row)), int(np.argsort(row)[-3]), 2):
        expected = q[0].copy()
        if excluded >= 0:
            expected[excluded] = 0.0
        expected /= expected.sum()
        uniforms = even_uniforms(num_draws)
        drawn = draw(logits, uniforms, 4.0, inverse_temperature, excluded, top_k)
        frequency = np.bincount(drawn.token, minlength=11) / num_draws
        # An interval holds the midpoints of its length to within one.
        np.testing.assert_allclose(frequency, expected, atol=1.01 / num_draws)
        assert not frequency[expected == 0].any()
        assert np.isfinite(drawn.entropy).all()
        np.testing.assert_allclose(drawn.log_q, np.log(q[0, drawn.token]), atol=1e-4)


@pytest.mark.parametrize("top_k", [None, 130])
def test_law_of_a_draw_from_several_groups_of_tokens(top_k):
    num_draws = 40_000
    rng = np.random.default_rng(4)
    row = (0.8 * rng.normal(size=150)).astype(np.float32)
    row[:20] -= 4.0  # groups of unequal mass
    logits = np.tile(row, (num_draws, 1))
    _, q, _, _ = reference(logits[:1], [1.0], [1.0], top_k)
    excluded = int(np.argsort(row)[-2])
    expected = q[0].copy()
    expected[excluded] = 0.0
    expected /= expected.sum()
    drawn = draw(logits, even_uniforms(num_draws), 1.0, 1.0, excluded, top_k)
    frequency = np.bincount(drawn.token, minlength=150) / num_draws
    # A token is a box in the square of the uniforms; the lattice hits it to within a few points.
    np.testing.assert_allclose(frequency, expected, atol=6 / num_draws)
    assert not frequency[expected == 0].any()


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("vocabulary_size", [11, 200])
def test_excluded_token_is_drawn_where_there_is_no_other(vocabulary_size, top_k):
    logits = np.full((3, vocabulary_size), -np.inf, np.float32)
    only = np.array([0, 6, vocabulary_size - 1])
    logits[np.arange(3), only] = 1.5
    drawn = draw(logits, np.full((3, 2), 0.3), excluded=only, top_k=top_k)
    np.testing.assert_array_equal(drawn.token, only)
    for name in ("log_prob", "log_q", "log_weight", "entropy"):
        np.testing.assert_array_equal(getattr(drawn, name), np.zeros(3))


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-23, 1.0 - 2.0**-24])
@pytest.mark.parametrize("vocabulary_size", [11, 200])
def test_extreme_uniforms_draw_the_first_and_the_last_possible_token(uniform, vocabulary_size):
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(64, vocabulary_size)).astype(np.float32)
    logits[:, :3] = -np.inf
    logits[:, -3:] = -np.inf
    drawn = draw(logits, np.full((64, 2), uniform), 1.0, 1.0)
    np.testing.assert_array_equal(drawn.token, 3 if uniform == 0 else vocabulary_size - 4)
    drawn = draw(logits, np.full((64, 2), uniform), 1.0, 1.0, top_k=vocabulary_size)
    by_rank = np.argsort(-logits, axis=-1)
    np.testing.assert_array_equal(drawn.token, by_rank[:, 0 if uniform == 0 else -7])


@pytest.mark.parametrize("top_k", [None, 2, 90])
def test_a_row_that_is_not_finite_leaves_the_others_alone(top_k):
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(7, 200)).astype(np.float32)
    uniforms = random_uniforms(rng, 7)
    clean = draw(logits, uniforms, top_k=top_k)
    faulty = logits.copy()
    faulty[1, 150] = np.nan
    faulty[3, 20] = np.inf
    faulty[4] = -np.inf
    faulty[6] = np.nan
    drawn = draw(faulty, uniforms, top_k=top_k)
    fine = np.array([True, False, True, False, False, True, False])
    np.testing.assert_array_equal(clean.finite, np.ones(7, bool))
    np.testing.assert_array_equal(drawn.finite, fine)
    assert 0 <= int(drawn.token.min()) <= int(drawn.token.max()) < 200
    for value, expected in zip(drawn, clean, strict=True):
        np.testing.assert_array_equal(value[fine], expected[fine])


def test_bounded_weights_are_never_positive():
    rng = np.random.default_rng(7)
    num_rows = 4096
    for scale in (0.01, 1.0, 30.0, 300.0):
        logits = (scale * rng.normal(size=(num_rows, 11))).astype(np.float32)
        logits[::2, 5] += rng.choice([8.0, 16.0, 20.0, 100.0], num_rows // 2)  # nearly certain
        power = (1.0 + 9.0 * rng.choice([0.0, 1.0], num_rows) * rng.random(num_rows)).astype(
            np.float32
        )
        share = rng.choice([0.0, 0.5, 1.0], num_rows).astype(np.float32)
        inverse_temperature = np.minimum(1.0 + share * (power - 1.0), power)
        assert token_law.weights_are_bounded(power, inverse_temperature).all()
        drawn = draw(logits, random_uniforms(rng, num_rows), power, inverse_temperature)
        assert float(drawn.log_weight.max()) <= 0.0
        assert np.isfinite(drawn.log_weight).all()


def test_weights_outside_of_the_bounded_range_are_not_clamped():
    logits = np.tile(np.log([0.9, 0.1]).astype(np.float32), (3, 1))
    power = np.array([1.0, 2.0, 2.0], np.float32)
    inverse_temperature = np.array([2.0, 0.5, 2.5], np.float32)
    assert not token_law.weights_are_bounded(power, inverse_temperature).any()
    drawn = draw(logits, [[0.0, 0.0], [0.0, 0.0], [0.9999, 0.0]], power, inverse_temperature)
    log_weight = reference(logits, power, inverse_temperature, None)[2]
    expected = log_weight[np.arange(3), drawn.token]
    np.testing.assert_allclose(drawn.log_weight, expected, atol=1e-5)
    assert (expected > 0.1).any()
