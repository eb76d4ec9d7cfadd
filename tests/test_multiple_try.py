"""Multiple-try steps: reversible by enumeration, and the kernel against the enumerated matrix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import make_tuning, multiple_try, rounds, transition
from tests import enumeration, kernel_mutants, oracle, toy_chains
from tests.multiple_try_oracle import multiple_try_matrix
from tests.toy_models import random_toy_model, toy_language_model

EXACT = 1e-12
DRAWS = 4096  # chains started from every state
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes far longer than running


_SETTING_NAMES = ("power", "cut_power", "uniform_mix", "cut_first_token", "sampler")
SETTINGS = [
    dict(zip(_SETTING_NAMES, values, strict=True))
    for values in [
        (4.0, 4.0, 0.0, True, "entropy_cut"),
        (2.0, 1.0, 0.1, True, "entropy_cut"),
        (1.0, 0.0, 0.0, False, "entropy_cut"),
        (2.0, 4.0, 0.0, False, "entropy_cut"),
        (4.0, 4.0, 0.0, True, "uniform_cut"),
    ]
]


@pytest.mark.parametrize("num_tries", [1, 2, 3])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_step_is_reversible_by_enumeration(settings, num_tries):
    shapes = [(3, 4, None, 0.5), (4, 3, 2, -1.0), (3, 3, None, -2.5)]
    for seed, (vocabulary_size, horizon, top_k, eos_boost) in enumerate(shapes):
        for temperature in (None, 0.7):
            model = random_toy_model(
                np.random.default_rng(seed), vocabulary_size, horizon, eos_boost, eos_rank=top_k
            )
            common = settings | {"proposal_temperature": temperature, "top_k": top_k}
            step = multiple_try_matrix(model, horizon, num_tries, **common)
            goal = oracle.target(model, horizon, settings["power"], top_k)
            flow = goal[:, None] * step
            np.testing.assert_allclose(step.sum(axis=1), 1.0, rtol=0, atol=EXACT)
            assert np.abs(flow - flow.T).max() <= EXACT
            np.testing.assert_allclose(flow, flow.T, rtol=1e-9, atol=0)
            assert np.abs(goal @ step - goal).max() <= EXACT
            if num_tries == 1:
                single = oracle.transition_matrix(model, horizon, **common)
                np.testing.assert_allclose(step, single, rtol=0, atol=EXACT)


def test_more_tries_bring_a_step_closer_to_the_target():
    model = random_toy_model(np.random.default_rng(1), 3, 4, -1.0)
    goal = oracle.target(model, 4, 4.0)
    start = oracle.extension_law(model, (), 4, 0.25)
    distances = [
        oracle.total_variation(
            start @ np.linalg.matrix_power(multiple_try_matrix(model, 4, tries, 4.0), 3), goal
        )
        for tries in (1, 2, 3)
    ]
    assert distances[0] > distances[1] > distances[2]


@dataclasses.dataclass(frozen=True)
class Case:
    """One multiple-try kernel on one toy model."""

    seed: int
    num_tries: int = 2
    vocabulary_size: int = 3
    horizon: int = 3
    power: float = 4.0
    cut_power: float = 1.0
    uniform_mix: float = 0.1
    proposal_temperature: float | None = None
    top_k: int | None = None
    cut_first_token: bool = True
    replay: bool = True
    early_rejection: bool = True
    eos_boost: float = -1.0


CASES = [
    Case(seed=1),
    Case(seed=2, num_tries=3, power=2.0, proposal_temperature=0.4),  # weights without a bound
    Case(seed=3, num_tries=3, power=2.0, cut_power=4.0, uniform_mix=0.0),
    Case(seed=4, num_tries=2, vocabulary_size=4, top_k=2, power=2.0, replay=False),
    Case(seed=8, num_tries=3, cut_first_token=False, power=2.0, uniform_mix=1.0),
]


@functools.cache
def prepared(case):
    """What mutants of one case share: model, states, chains on each state, the matrix."""
    model = random_toy_model(
        np.random.default_rng(case.seed),
        case.vocabulary_size,
        case.horizon,
        case.eos_boost,
        eos_rank=case.top_k,
    )
    config = toy_chains.toy_config(
        model,
        top_k=case.top_k,
        cut_first_token=case.cut_first_token,
        replay=case.replay,
        early_rejection=case.early_rejection,
    )
    space = enumeration.state_space(model, model.horizon, case.top_k)
    starts = np.repeat(np.arange(len(space.states)), DRAWS)
    settings = (case.power, case.proposal_temperature, case.cut_power, case.uniform_mix)
    tuning = make_tuning(len(starts), *settings)
    transitions = multiple_try_matrix(
        model,
        model.horizon,
        case.num_tries,
        case.power,
        case.cut_power,
        case.uniform_mix,
        case.proposal_temperature,
        case.top_k,
        cut_first_token=case.cut_first_token,
    )
    state = toy_chains.state_on(model, space, starts, config, tuning)
    return model, config, space, starts, tuning, transitions, state


def excess(case, seed=0):
    """Largest |frequency - probability| beyond 6 standard errors + 0.002, after 1 and 2 steps."""
    model, config, space, starts, tuning, transitions, state = prepared(case)
    num_states = len(space.states)
    language_model, params = toy_language_model(model, toy_chains.NUM_PROMPT_TOKENS)
    options = multiple_try.Options(case.num_tries)
    kernel = jax.jit(
        multiple_try.build_kernel(language_model, config, options), compiler_options=QUICK
    )
    largest = -np.inf
    for step in (1, 2):
        state, _ = kernel(jax.random.key(seed), state, params, tuning)
        ends = toy_chains.rows_of(state.trace, space)
        if (ends < 0).any():
            return np.inf
        counts = np.zeros((num_states, num_states))
        np.add.at(counts, (starts, ends), 1)
        expected = np.linalg.matrix_power(transitions, step)
        standard_error = np.sqrt(expected * (1 - expected) / DRAWS)
        beyond = np.abs(counts / DRAWS - expected) - 6 * standard_error - 0.002
        largest = max(largest, float(beyond.max()))
    return largest


@pytest.mark.parametrize(
    "case",
    [*CASES[:2], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[2:])],
    ids=lambda case: f"model{case.seed}",
)
def test_kernel_has_the_enumerated_transitions(case):
    assert excess(case) < 0


def accepts_every_pick(patch):
    patch.setattr(multiple_try, "log_acceptance", lambda ratios, chosen: 0.0 * ratios[:, 0])


def accepts_by_the_picked_try_alone(patch):
    def log_acceptance(log_ratios, chosen):
        return jnp.take_along_axis(log_ratios, chosen[:, None], axis=1)[:, 0]

    patch.setattr(multiple_try, "log_acceptance", log_acceptance)


def reverse_keeps_the_picked_try(patch):
    def log_acceptance(log_ratios, chosen):
        total = jax.nn.logsumexp(log_ratios, axis=1)
        return total - jnp.logaddexp(total, 0.0)

    patch.setattr(multiple_try, "log_acceptance", log_acceptance)


def picks_the_best_try(patch):
    original = multiple_try.pick

    def pick(log_ratios, uniform):
        return log_ratios.argmax(axis=1), original(log_ratios, uniform)[1]

    patch.setattr(multiple_try, "pick", pick)


def picks_uniformly(patch):
    original = multiple_try.pick
    patch.setattr(multiple_try, "pick", lambda ratios, uniform: original(0.0 * ratios, uniform))


def tries_share_their_draws(patch):
    def try_keys(rng_key, state, num_tries):
        return rounds.repeat(transition.step_keys(rng_key, state), num_tries)

    patch.setattr(multiple_try, "_try_keys", try_keys)


def null_tries_have_no_weight(patch):
    original = multiple_try._log_weights

    def log_weights(tries):
        unmoved = tries.decoded == 0
        return jnp.where(unmoved, -jnp.inf, original(tries))

    patch.setattr(multiple_try, "_log_weights", log_weights)


TELLING = Case(seed=6, num_tries=3, power=2.0, proposal_temperature=1.0)
MANY_CUTS = Case(seed=12)
MUTANTS = {
    accepts_every_pick: TELLING,
    accepts_by_the_picked_try_alone: TELLING,
    reverse_keeps_the_picked_try: TELLING,
    picks_the_best_try: TELLING,
    picks_uniformly: TELLING,
    tries_share_their_draws: TELLING,
    null_tries_have_no_weight: TELLING,
    kernel_mutants.cut_term_left_out: MANY_CUTS,
    kernel_mutants.off_by_one_at_eos: TELLING,
    kernel_mutants.stale_cache_row: MANY_CUTS,
    kernel_mutants.excluded_token_forgotten: TELLING,
    kernel_mutants.bound_used_outside_its_range: Case(seed=2, power=1.0, proposal_temperature=0.25),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_mutant_is_killed(mutant, monkeypatch):
    mutant(monkeypatch)
    assert excess(MUTANTS[mutant]) > 0
