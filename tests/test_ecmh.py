"""The kernel and the schedule against the enumerated law, and mutants that must fail it."""

import dataclasses

import jax
import numpy as np
import pytest

from ecmh_jax import (
    compiled,
    ecmh,
    make_tuning,
    sampling,
)
from tests import enumeration, kernel_mutants, oracle, toy_chains
from tests.toy_models import random_toy_model, toy_language_model

DRAWS = 4096  # chains started from every state


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel on one toy model."""

    seed: int
    vocabulary_size: int = 3
    horizon: int = 4
    power: float = 4.0
    cut_power: float = 1.0
    uniform_mix: float = 0.1
    proposal_temperature: float | None = None
    top_k: int | None = None
    cut_first_token: bool = True
    replay: bool = True
    early_rejection: bool = True
    eos_boost: float = 0.0

    def model(self):
        rng = np.random.default_rng(self.seed)
        return random_toy_model(
            rng, self.vocabulary_size, self.horizon, self.eos_boost, eos_rank=self.top_k
        )


CASES = [
    Case(seed=1),
    Case(seed=2, power=1.0, cut_power=0.0, uniform_mix=0.0),
    Case(seed=3, power=2.0, cut_power=4.0),
    Case(seed=4, vocabulary_size=4, horizon=3, top_k=2, power=2.0),
    Case(seed=5, uniform_mix=1.0),  # uniform cut
    Case(seed=6, power=2.0, proposal_temperature=0.4),  # outside of certain rejection's range
    Case(seed=7, power=4.0, proposal_temperature=0.5),
    Case(seed=8, cut_first_token=False, power=2.0),
    Case(seed=9, replay=False, early_rejection=False, power=2.0),
    Case(seed=10, vocabulary_size=5, horizon=3, top_k=3, cut_power=4.0, uniform_mix=0.0),
]


def excess(case: Case, seed: int = 0) -> float:
    """Largest |frequency - probability| beyond 7 standard errors + 0.003.

    After one step, and after three, because what a step leaves behind must serve the next.
    """
    model = case.model()
    config = toy_chains.toy_config(
        model,
        top_k=case.top_k,
        cut_first_token=case.cut_first_token,
        replay=case.replay,
        early_rejection=case.early_rejection,
    )
    space = enumeration.state_space(model, model.horizon, case.top_k)
    num_states = len(space.states)
    starts = np.repeat(np.arange(num_states), DRAWS)
    tuning = make_tuning(
        len(starts), case.power, case.proposal_temperature, case.cut_power, case.uniform_mix
    )
    transitions = oracle.transition_matrix(
        model,
        model.horizon,
        case.power,
        case.cut_power,
        case.uniform_mix,
        case.proposal_temperature,
        case.top_k,
        cut_first_token=case.cut_first_token,
    )
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
    kernel = jax.jit(ecmh.build_kernel(language_model, config))
    state = toy_chains.state_on(model, space, starts, config, tuning)
    largest = -np.inf
    for step in (1, 2, 3):
        state, _ = kernel(jax.random.key(seed), state, params, tuning)
        ends = toy_chains.rows_of(state.trace, space)
        if (ends < 0).any():  # a trace that no stage target knows
            return np.inf
        counts = np.zeros((num_states, num_states))
        np.add.at(counts, (starts, ends), 1)
        expected = np.linalg.matrix_power(transitions, step)
        standard_error = np.sqrt(expected * (1 - expected) / DRAWS)
        beyond = np.abs(counts / DRAWS - expected) - 7 * standard_error - 0.003
        largest = max(largest, float(beyond.max()))
    return largest


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"model{case.seed}")
def test_kernel_has_the_enumerated_transitions(case):
    assert excess(case) < 0


# Completions of many lengths, and a proposal law for which the ratio is not decided early: here
# every fault shows.
TELLING = Case(seed=6, power=2.0, proposal_temperature=0.4, eos_boost=-1.0)


MUTANTS = {
    kernel_mutants.capped_at_current_length: TELLING,
    kernel_mutants.sliced_suffix: TELLING,
    kernel_mutants.eos_masked_at_the_cut: TELLING,
    kernel_mutants.cut_term_left_out: TELLING,
    kernel_mutants.untruncated_q: dataclasses.replace(
        CASES[3], power=2.0, proposal_temperature=1.0
    ),
    kernel_mutants.reused_key: TELLING,
    kernel_mutants.off_by_one_at_eos: TELLING,
    kernel_mutants.stale_cache_row: TELLING,
    kernel_mutants.excluded_token_forgotten: TELLING,
    kernel_mutants.bound_used_outside_its_range: dataclasses.replace(
        TELLING, power=1.0, proposal_temperature=0.25
    ),
    kernel_mutants.bound_without_the_cut_term: dataclasses.replace(TELLING, uniform_mix=0.0),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(mutant, monkeypatch):
    mutant(monkeypatch)
    case = MUTANTS[mutant]
    assert excess(case) > 0


def run_lockstep(seed, model, tuning, config):
    """The whole schedule in lockstep; a chain for each number of the tuning."""
    num_chains = len(tuning.power)
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
    identity = np.arange(num_chains, dtype=np.int32)
    return compiled.run(
        jax.random.key(seed),
        params,
        *toy_chains.toy_prompts(num_chains),
        np.zeros_like(identity),
        identity,
        tuning,
        model=language_model,
        config=config,
    )


@pytest.mark.parametrize("refine_finished", [False, True])
@pytest.mark.parametrize("sampler", ["entropy_cut", "uniform_cut"])
def test_schedule_has_the_enumerated_final_law(sampler, refine_finished):
    model = random_toy_model(np.random.default_rng(11), 3, 4)
    num_chains = 40_000
    config = toy_chains.toy_config(
        model, num_stages=2, steps_per_stage=2, top_k=2, refine_finished=refine_finished
    )
    tuning = make_tuning(num_chains, power=2.0, cut_power=1.0)
    result = run_lockstep(3, model, *sampling.specialise(sampler, tuning, config))
    expected = oracle.final_law(
        model,
        2,
        2,
        2,
        power=2.0,
        cut_power=1.0,
        top_k=2,
        sampler=sampler,
        refine_finished=refine_finished,
    )
    space = enumeration.state_space(model, model.horizon, 2)
    rows = toy_chains.rows_of(result.trace, space)
    frequency = np.bincount(rows, minlength=len(space.states)) / num_chains
    standard_error = np.sqrt(expected * (1 - expected) / num_chains)
    assert np.all(np.abs(frequency - expected) < 6 * standard_error + 1e-4)


def test_total_variation_falls_to_the_noise_floor():
    model = random_toy_model(np.random.default_rng(33), 3, 5, eos_boost=-2.0)
    num_chains = 10_000
    space = enumeration.state_space(model, model.horizon)
    expected = oracle.target(model, model.horizon, power=4.0)
    distances = []
    for steps in (0, 2, 8, 64):
        config = toy_chains.toy_config(model, steps_per_stage=steps, refine_finished=True)
        result = run_lockstep(4, model, make_tuning(num_chains, power=4.0), config)
        rows = toy_chains.rows_of(result.trace, space)
        frequency = np.bincount(rows, minlength=len(space.states)) / num_chains
        distances.append(oracle.total_variation(frequency, expected))
    standard_error = np.sqrt(expected * (1 - expected) / num_chains)
    # The expected distance of num_chains independent draws of the target from the target.
    floor = 0.5 * np.sqrt(2 / np.pi) * standard_error.sum()
    exact = [
        oracle.total_variation(oracle.final_law(model, 1, 5, steps, 4.0), expected)
        for steps in (0, 2, 8)
    ]
    np.testing.assert_allclose(distances[:3], exact, atol=0.02)
    assert exact[0] > exact[1] > exact[2] > 5 * floor
    assert np.all(np.abs(frequency - expected) < 6 * standard_error + 1e-4)
