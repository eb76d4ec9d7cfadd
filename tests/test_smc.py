"""Stagewise sequential Monte Carlo against enumeration, and mutants that must fail it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import smc
from tests import particle_runs, toy_chains
from tests.particle_runs import Case

LIMIT = 5.0  # standard errors

CASES = [
    dataclasses.replace(particle_runs.TELLING, num_results=4096),
    Case(seed=3, num_particles=1, num_stages=4, proposal_temperature=0.5),
    Case(seed=4, num_particles=3, power=4.0, proposal_temperature=None, top_k=2, num_stages=4),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"model{case.seed}")
def test_weighted_with_the_evidence_traces_are_unbiased(case):
    result = particle_runs.run_compiled(smc, case)
    assert particle_runs.errors(case, result).max() < LIMIT
    resampled = np.asarray(result.info.resampled)
    assert resampled[:-1].any() == (case.num_particles > 1)
    assert not resampled[-1].any()
    ess = np.asarray(result.info.ess)
    assert ess.shape == (case.num_stages, case.num_results)
    assert ess.min() > 1 - 1e-5
    assert ess.max() < case.num_particles + 1e-4
    assert not resampled[ess >= case.resample_below * case.num_particles].any()
    ancestors = np.asarray(result.info.num_ancestors)
    assert ancestors.max() <= case.num_particles
    assert (ancestors[~resampled.any(axis=0)] == case.num_particles).all()
    weights = np.exp(np.asarray(result.info.log_weights))
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mutant", particle_runs.LAW_MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(mutant, monkeypatch):
    case = particle_runs.LAW_MUTANTS[mutant]
    mutant(monkeypatch)
    assert particle_runs.errors(case, particle_runs.run_compiled(smc, case)).max() > LIMIT


@pytest.mark.slow
def test_total_variation_falls_to_the_noise_floor():
    distances = []
    for num_particles in (4, 16, 64):
        case = Case(
            seed=1, num_particles=num_particles, resample_below=0.5, eos_boost=-1.0,
            power=4.0, num_results=1600,
        )  # fmt: skip
        distance, floor = particle_runs.total_variation(case, particle_runs.run_compiled(smc, case))
        distances.append(distance)
    assert distances[0] > 1.5 * distances[1]
    assert distances[1] > 1.5 * distances[2]
    assert distances[0] > 5 * floor
    # The law at N particles is off by a constant over N, which comes on top of the floor.
    assert distances[2] < floor + distances[0] * 4 / 64 + 0.02


def beside_and_turned():
    """Six results, and the same with their rows turned round; the program that made them."""
    case = dataclasses.replace(particle_runs.TELLING, num_results=6)
    run = jax.jit(particle_runs.build_run(smc, case), static_argnums=0)
    identity = jnp.arange(6, dtype=jnp.int32)
    beside = run(5, identity % 2, identity)
    assert np.asarray(beside.info.resampled).any(axis=0).sum() > 1
    return beside, run(5, jnp.flip(identity % 2), jnp.flip(identity)), run


def test_a_result_does_not_depend_on_its_neighbours():
    beside, turned, run = beside_and_turned()
    assert particle_runs.same_results(beside, turned, {row: 5 - row for row in range(6)})
    identity = jnp.array([3], jnp.int32)
    assert particle_runs.same_results(beside, run(5, identity % 2, identity), {3: 0})


@pytest.mark.slow
def test_a_uniform_shared_by_groups_is_killed(monkeypatch):
    particle_runs.uniform_shared_by_groups(monkeypatch)
    beside, turned, _ = beside_and_turned()
    assert not particle_runs.same_results(beside, turned, {row: 5 - row for row in range(6)})


@pytest.mark.slow
def test_runs_without_jit():
    case = Case(seed=1, num_particles=2, horizon=2, num_results=2)
    run = particle_runs.build_run(smc, case)
    identity = jnp.arange(2, dtype=jnp.int32)
    expected = jax.jit(run, static_argnums=0)(0, identity, identity)
    with jax.disable_jit():
        result = run(0, identity, identity)
    np.testing.assert_array_equal(result.trace.tokens, expected.trace.tokens)
    np.testing.assert_allclose(result.info.log_evidence, expected.info.log_evidence, rtol=1e-5)


@pytest.mark.parametrize(("eos_boost", "tokens"), [(60.0, 1), (-60.0, 4)])
def test_decoded_tokens_of_all_particles_are_counted(eos_boost, tokens):
    case = Case(seed=1, num_particles=3, num_stages=4, eos_boost=eos_boost, num_results=2)
    result = particle_runs.run_compiled(smc, case)
    assert (np.asarray(result.trace.length) - toy_chains.NUM_PROMPT_TOKENS == tokens).all()
    assert result.stats.decoded.tolist() == [3 * tokens] * 2
    assert all(
        not getattr(result.stats, name).any()
        for name in ("attempted", "accepted", "null_moves", "replayed", "saved")
    )


def test_a_particle_that_failed_is_never_chosen():
    case = Case(seed=1, num_results=300)
    model = particle_runs.failing_model(case, lambda tokens: tokens != 1)
    result = particle_runs.run_compiled(smc, case, model=model)
    finite = np.asarray(result.finite)
    first = np.asarray(result.trace.tokens)[:, toy_chains.NUM_PROMPT_TOKENS]
    assert finite.any()
    assert not finite.all()  # all four particles may have drawn the failing token
    assert np.isin(first[finite], (1, case.model().eos_id)).all()
    np.testing.assert_array_equal(np.isfinite(result.info.log_evidence), finite)
    assert not np.isnan(result.info.ess).any()


def test_options_are_checked():
    assert smc.rows_per_chain(smc.Options()) == 64
    smc.check_options(smc.Options())
    with pytest.raises(ValueError, match="num_particles is 0; expected"):
        smc.check_options(smc.Options(num_particles=0))
