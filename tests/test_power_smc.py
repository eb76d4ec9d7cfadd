"""Token-level sequential Monte Carlo against enumeration, and mutants that must fail it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import power_smc
from tests import particle_runs, toy_chains
from tests.particle_runs import Case

LIMIT = 5.0  # standard errors
TELLING = dataclasses.replace(particle_runs.TELLING, num_stages=1)
# Longer than any completion: the ramp is always cut short, by particles that all end or by a
# resampling that leaves no unfinished one.
LONG_RAMP = Case(
    seed=4, num_particles=3, resample_below=0.9, options=(10,), proposal_temperature=0.7
)
SHORT_RAMP = dataclasses.replace(TELLING, eos_boost=0.0, options=(3,), num_results=4096)


@pytest.mark.parametrize("case", [TELLING, SHORT_RAMP, LONG_RAMP], ids=["none", "short", "long"])
def test_weighted_with_the_evidence_traces_are_unbiased(case):
    result = particle_runs.run_compiled(power_smc, case)
    assert particle_runs.errors(case, result).max() < LIMIT
    resampled, ess = np.asarray(result.info.resampled), np.asarray(result.info.ess)
    assert ess.shape == resampled.shape == (case.horizon, case.num_results)
    assert resampled.any()
    assert not resampled[-1].any()
    assert ess[0].min() > 1 - 1e-5
    assert not resampled[ess >= case.resample_below * case.num_particles].any()
    weights = np.exp(np.asarray(result.info.log_weights))
    np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-4)


MUTANTS = {
    particle_runs.weights_not_reset: TELLING,
    particle_runs.cache_left_behind: TELLING,
    particle_runs.finished_reweighted: dataclasses.replace(TELLING, eos_boost=0.0),
    particle_runs.ramp_left_unfinished: LONG_RAMP,
    particle_runs.ramp_without_earlier_tokens: SHORT_RAMP,
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(mutant, monkeypatch):
    mutant(monkeypatch)
    case = MUTANTS[mutant]
    assert particle_runs.errors(case, particle_runs.run_compiled(power_smc, case)).max() > LIMIT


@pytest.mark.slow
def test_total_variation_falls_with_the_particles():
    distances = []
    for num_particles in (4, 64):
        case = Case(
            seed=1, num_particles=num_particles, resample_below=0.5, eos_boost=-1.0,
            power=4.0, num_results=1600, options=(2,),
        )  # fmt: skip
        distance, floor = particle_runs.total_variation(
            case, particle_runs.run_compiled(power_smc, case)
        )
        distances.append(distance)
    assert distances[0] > 3 * floor
    # The law at N particles is off by a constant over N, which comes on top of the floor.
    assert distances[1] < floor + distances[0] * 4 / 64 + 0.02


def test_exponent_rises_linearly_to_the_power():
    power = jnp.array([4.0, 2.0, 0.5])
    exponents = [power_smc.ramped_power(power, tokens, 4) for tokens in (0, 1, 4, 9)]
    expected = [[1, 1, 1], [1.75, 1.25, 0.875], [4, 2, 0.5], [4, 2, 0.5]]
    np.testing.assert_allclose(exponents, expected)
    np.testing.assert_array_equal(power_smc.ramped_power(power, 0, 0), power)


def test_a_result_does_not_depend_on_its_neighbours():
    case = dataclasses.replace(SHORT_RAMP, num_results=6)
    run = jax.jit(particle_runs.build_run(power_smc, case), static_argnums=0)
    identity = jnp.arange(6, dtype=jnp.int32)
    beside = run(5, identity % 2, identity)
    assert np.asarray(beside.info.resampled).any(axis=0).sum() > 1
    turned = run(5, jnp.flip(identity % 2), jnp.flip(identity))
    assert particle_runs.same_results(beside, turned, {row: 5 - row for row in range(6)})
    # The particles of the one that ends first wait for those of the others.
    shortest = int(np.asarray(beside.stats.decoded).argmin())
    assert beside.stats.decoded[shortest] < beside.stats.decoded.max()
    identity = jnp.array([shortest], jnp.int32)
    alone = run(5, identity % 2, identity)
    assert particle_runs.same_results(beside, alone, {shortest: 0})


@pytest.mark.slow
def test_runs_without_jit():
    case = Case(seed=1, num_particles=2, horizon=2, num_results=2, options=(1,))
    run = particle_runs.build_run(power_smc, case)
    identity = jnp.arange(2, dtype=jnp.int32)
    expected = jax.jit(run, static_argnums=0)(0, identity, identity)
    with jax.disable_jit():
        result = run(0, identity, identity)
    np.testing.assert_array_equal(result.trace.tokens, expected.trace.tokens)
    np.testing.assert_allclose(result.info.log_evidence, expected.info.log_evidence, rtol=1e-5)


@pytest.mark.parametrize(("eos_boost", "tokens"), [(60.0, 1), (-60.0, 4)])
def test_decoded_tokens_of_all_particles_are_counted(eos_boost, tokens):
    case = Case(seed=1, num_particles=3, eos_boost=eos_boost, num_results=2)
    result = particle_runs.run_compiled(power_smc, case)
    assert (np.asarray(result.trace.length) - toy_chains.NUM_PROMPT_TOKENS == tokens).all()
    assert result.stats.decoded.tolist() == [3 * tokens] * 2
    assert ((np.asarray(result.info.ess) > 0).sum(axis=0) == tokens).all()


def test_a_particle_that_failed_is_never_chosen():
    case = Case(seed=1, num_results=300)
    model = particle_runs.failing_model(case, lambda tokens: tokens != 1)
    result = particle_runs.run_compiled(power_smc, case, model=model)
    finite = np.asarray(result.finite)
    first = np.asarray(result.trace.tokens)[:, toy_chains.NUM_PROMPT_TOKENS]
    assert finite.any()
    assert not finite.all()  # all four particles may have drawn failing tokens
    assert np.isin(first[finite], (1, case.model().eos_id)).all()
    np.testing.assert_array_equal(np.isfinite(result.info.log_evidence), finite)
    assert not np.isnan(result.info.ess).any()


def test_options_are_checked():
    assert power_smc.rows_per_chain(power_smc.Options()) == 64
    power_smc.check_options(power_smc.Options())
    with pytest.raises(ValueError, match="ramp_tokens is -1; expected"):
        power_smc.check_options(power_smc.Options(ramp_tokens=-1))
