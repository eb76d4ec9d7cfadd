"""Weights, resampling and evidence of particles against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import particles, random_keys

WEIGHTS = np.array([[0.5, 0.0, 0.3, 0.15, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]])


def log_of(weights):
    with np.errstate(divide="ignore"):
        return jnp.asarray(np.log(weights), jnp.float32)


def test_effective_sample_size():
    expected = 1 / np.square(WEIGHTS).sum(axis=1)
    np.testing.assert_allclose(
        particles.effective_sample_size(log_of(WEIGHTS)), expected, rtol=1e-5
    )
    none_left = jnp.full((1, 4), -jnp.inf)
    assert particles.effective_sample_size(none_left).tolist() == [0.0]


def test_systematic_copies_are_right_on_average_and_never_far_off():
    uniforms = (np.arange(400) + 0.5) / 400
    counts = np.zeros((len(uniforms), 2, 5))
    for row, uniform in enumerate(uniforms):
        ancestors = particles.systematic_ancestors(
            log_of(WEIGHTS), jnp.full((2,), uniform, jnp.float32)
        )
        assert (np.diff(ancestors, axis=1) >= 0).all()
        for group in range(2):
            counts[row, group] = np.bincount(ancestors[group], minlength=5)
    np.testing.assert_allclose(counts.mean(axis=0), 5 * WEIGHTS, atol=0.01)
    assert np.abs(counts - 5 * WEIGHTS).max() < 1 + 1e-5
    assert (counts[:, 0, 1] == 0).all()


def test_largest_uniform_finds_a_particle_with_weight():
    log_weights = jnp.full((1, 64), -jnp.inf).at[:, :40].set(-jnp.log(40.0))
    ancestors = particles.systematic_ancestors(log_weights, jnp.full((1,), 1 - 2.0**-24))
    assert ancestors.max() < 40


def test_resampling_resets_the_weights_of_those_that_are_due():
    population = particles.start(2, 5)._replace(log_weights=log_of(WEIGHTS[:, ::-1]))
    population, rows = particles.resample(
        population, jnp.array([True, False]), jnp.array([0.4, 0.4])
    )
    np.testing.assert_allclose(jnp.exp(population.log_weights), np.full((2, 5), 0.2), rtol=1e-6)
    assert rows.tolist() == [1, 2, 2, 4, 4, 5, 6, 7, 8, 9]
    assert population.ancestor.tolist() == [[1, 2, 2, 4, 4], [0, 1, 2, 3, 4]]


def test_reweighting_moves_the_weighted_mean_into_the_evidence():
    population = particles.start(2, 5)._replace(log_weights=log_of(WEIGHTS))
    increments = np.array([[0.1, 7.0, 2.0, 1.0, 0.0], [1.0, 2.0, 3.0, 4.0, 0.0]])
    population = particles.reweight(population, log_of(increments).reshape(-1))
    means = (WEIGHTS * increments).sum(axis=1)
    np.testing.assert_allclose(jnp.exp(population.log_evidence), means, rtol=1e-5)
    np.testing.assert_allclose(
        jnp.exp(population.log_weights), WEIGHTS * increments / means[:, None], rtol=1e-5
    )


def test_no_particle_left():
    population = particles.reweight(particles.start(1, 3), jnp.full((3,), -jnp.inf))
    population = particles.reweight(population, jnp.zeros((3,)))
    assert np.isneginf(population.log_evidence).all()
    assert np.isneginf(population.log_weights).all()


def test_group_draws_are_told_apart():
    keys = random_keys.chain_keys(jax.random.key(0), jnp.zeros(500, int), jnp.arange(500))
    stages, step = jnp.ones(500, int), jnp.zeros(500, int)
    draws = [
        random_keys.group_uniform(random_keys.step_keys(keys, stages * stage, step), position)
        for stage in (1, 2)
        for position in (0, 1)
    ]
    correlation = np.corrcoef(np.stack(draws)) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(500)
    assert len(np.unique(np.concatenate(draws))) > 1990
    assert np.concatenate(draws).min() >= 0
    assert np.concatenate(draws).max() < 1


@pytest.mark.parametrize(
    ("num_particles", "resample_below"), [(0, 0.5), (2.0, 0.5), (4, -0.1), (4, 1.5)]
)
def test_bad_options_are_named(num_particles, resample_below):
    with pytest.raises(ValueError, match=r"(num_particles|resample_below) is .*expected"):
        particles.check_options(num_particles, resample_below)
