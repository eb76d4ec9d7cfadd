"""The oracle itself: exact invariants on random toy models, and faulty kernels that break them."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from tests import exactness_table, oracle
from tests.oracle_mutants import MUTANTS, embed, mutant_transition_matrix
from tests.toy_models import ToyModel, prefix_index, random_toy_model, toy_language_model

EXACT = 1e-12

# (vocabulary_size, horizon, top_k); EOS stays within the top k of every row.
SHAPES = [
    (3, 4, None), (3, 5, 2), (3, 6, None), (4, 4, 2), (4, 5, None), (5, 4, 3), (4, 4, None),
    (3, 6, 2), (5, 4, None), (3, 5, None), (4, 6, 3), (3, 4, 2), (5, 5, 3), (4, 6, 2),
]  # fmt: skip
NUM_MODELS = 56
SETTINGS_PER_MODEL = 6

ENTROPY_GRID = [
    {
        "sampler": "entropy_cut",
        "power": power,
        "cut_power": cut_power,
        "uniform_mix": uniform_mix,
        "cut_first_token": cut_first_token,
        "proposal_temperature": proposal_temperature,
    }
    for power, cut_power, uniform_mix, cut_first_token, proposal_temperature in itertools.product(
        (1.0, 2.0, 4.0), (0.0, 1.0, 4.0), (0.0, 0.1), (True, False), (None, 0.7)
    )
]
UNIFORM_GRID = [
    {
        "sampler": "uniform_cut",
        "power": power,
        "cut_first_token": cut_first_token,
        "proposal_temperature": proposal_temperature,
    }
    for power, cut_first_token, proposal_temperature in itertools.product(
        (1.0, 2.0, 4.0), (True, False), (None, 0.7)
    )
]
GRID = ENTROPY_GRID + UNIFORM_GRID


def grid_model(index: int) -> tuple[ToyModel, int | None]:
    """The index-th random model of the grid and its top_k."""
    vocabulary_size, horizon, top_k = SHAPES[index % len(SHAPES)]
    eos_boost = (0.5, -1.0, -2.5)[index % 3]
    rng = np.random.default_rng(1000 + index)
    return random_toy_model(rng, vocabulary_size, horizon, eos_boost, eos_rank=top_k), top_k


def grid_settings(index: int) -> list[dict]:
    """The settings tried on the index-th model; the models go round the grid several times."""
    first = SETTINGS_PER_MODEL * index
    return [GRID[(first + offset) % len(GRID)] for offset in range(SETTINGS_PER_MODEL)]


def reaches_everything(linked: np.ndarray) -> bool:
    """Whether state 0 reaches every state of a directed graph [N, N] bool."""
    reached = np.arange(len(linked)) == 0
    while True:
        more = reached | linked[reached].any(axis=0)
        if (more == reached).all():
            return bool(reached.all())
        reached = more


def assert_exact(model: ToyModel, top_k: int | None, settings: dict) -> None:
    """Checks one transition matrix: stochastic, reversible, stationary, (ir)reducible."""
    step = oracle.transition_matrix(model, model.horizon, top_k=top_k, **settings)
    goal = oracle.target(model, model.horizon, settings["power"], top_k)
    flow = goal[:, None] * step
    assert step.min() >= 0.0
    np.testing.assert_allclose(step.sum(axis=1), 1.0, rtol=0, atol=EXACT)
    assert np.abs(flow - flow.T).max() <= EXACT
    # States of tiny probability are held to the same standard, relative to their own flow.
    np.testing.assert_allclose(flow, flow.T, rtol=1e-9, atol=0)
    assert np.abs(goal @ step - goal).max() <= EXACT
    if settings["cut_first_token"]:
        assert reaches_everything(step > 0.0)
        assert reaches_everything(step.T > 0.0)
    else:
        first_token = np.array([state[0] for state in oracle.states(model, model.horizon, top_k)])
        assert not step[first_token[:, None] != first_token[None, :]].any()


def test_grid_is_covered_and_eos_is_reachable_everywhere():
    tried = [settings for index in range(NUM_MODELS) for settings in grid_settings(index)]
    assert all(settings in tried for settings in GRID)
    for index in range(NUM_MODELS):
        model, top_k = grid_model(index)
        assert oracle.truncated_law(model.logits, top_k)[:, model.eos_id].min() > 0.0


@pytest.mark.parametrize("index", range(NUM_MODELS))
def test_kernel_is_exact(index):
    model, top_k = grid_model(index)
    for settings in grid_settings(index):
        assert_exact(model, top_k, settings)


@pytest.mark.parametrize(
    ("vocabulary_size", "horizon", "top_k", "settings"),
    [
        (5, 5, None, ENTROPY_GRID[-4]),
        (4, 6, None, UNIFORM_GRID[-4]),
        (5, 6, 3, ENTROPY_GRID[-8]),
        (5, 6, 1, ENTROPY_GRID[-4]),  # One state: every entropy is 0, cuts fall back to uniform.
    ],
)
def test_kernel_is_exact_at_the_corners(vocabulary_size, horizon, top_k, settings):
    # EOS may be truncated away in some rows here: then no completion ends there.
    model = random_toy_model(np.random.default_rng(5), vocabulary_size, horizon)
    assert_exact(model, top_k, settings)


@pytest.mark.parametrize("settings", [ENTROPY_GRID[-4], ENTROPY_GRID[-1], UNIFORM_GRID[4]])
def test_transition_matrix_against_joint_probabilities(settings):
    """The ratio as it is in a textbook, from pi and q of whole strings, without log-weights."""
    model = random_toy_model(np.random.default_rng(2), 3, 4, -1.0)
    temperature = settings["proposal_temperature"] or 1.0 / settings["power"]
    space = oracle.state_space(model, model.horizon)
    goal = oracle.target(model, model.horizon, settings["power"])
    laws_along = space.along(oracle.entropy(oracle.truncated_law(model.logits, None)))
    cuts = [
        oracle.cut_probabilities(
            laws_along[row, :length],
            settings.get("cut_power", 4.0),
            settings.get("uniform_mix", 0.0),
            settings["cut_first_token"],
            uniform=settings["sampler"] == "uniform_cut",
        )
        for row, length in enumerate(space.lengths)
    ]
    expected = np.zeros((len(goal), len(goal)))
    for x, state in enumerate(space.states):
        stays = 1.0
        for cut in range(len(state)):
            proposal = oracle.extension_law(model, state[:cut], model.horizon, temperature)
            for y in np.flatnonzero(proposal):
                forward = goal[x] * cuts[x][cut] * proposal[y]
                backward = goal[y] * cuts[y][cut] * proposal[x]
                if y != x and forward > 0.0:
                    moved = cuts[x][cut] * proposal[y] * min(1.0, backward / forward)
                    expected[x, y] += moved
                    stays -= moved
        expected[x, x] = stays
    step = oracle.transition_matrix(model, model.horizon, **settings)
    np.testing.assert_allclose(step, expected, rtol=0, atol=EXACT)


def test_laws_by_hand():
    logits = np.log([[0.2, 0.3, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4]])
    logits[0, 1] = logits[0, 2]  # An exact tie.
    logits[0, 0] = logits[0, 3]
    law = oracle.truncated_law(logits, 3)
    np.testing.assert_allclose(law[0], [2 / 8, 3 / 8, 3 / 8, 0.0], atol=EXACT)
    np.testing.assert_allclose(law[1], [0.0, 2 / 9, 3 / 9, 4 / 9], atol=EXACT)
    np.testing.assert_allclose(oracle.truncated_law(logits, 1)[0], [0.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(oracle.proposal_law(law[1], 0.5), np.array([0, 4, 9, 16]) / 29)
    assert oracle.entropy(np.array([0.5, 0.5, 0.0])) == pytest.approx(np.log(2.0), abs=EXACT)
    assert oracle.entropy(np.array([0.0, 1.0])) == 0.0


def test_states_and_target_by_definition():
    model = random_toy_model(np.random.default_rng(3), 4, 4)
    horizon = 3  # Shorter than the model's: an early stage.
    everything = itertools.chain.from_iterable(
        itertools.product(range(4), repeat=length) for length in range(1, horizon + 1)
    )
    expected = sorted(
        tokens
        for tokens in everything
        if model.eos_id not in tokens[:-1]
        and (tokens[-1] == model.eos_id or len(tokens) == horizon)
    )
    assert oracle.states(model, horizon) == expected
    law = oracle.truncated_law(model.logits, None)
    probability = np.array(
        [
            np.prod([law[prefix_index(tokens[:t], 4), tokens[t]] for t in range(len(tokens))])
            for tokens in expected
        ]
    )
    assert probability.sum() == pytest.approx(1.0, abs=EXACT)
    np.testing.assert_allclose(oracle.target(model, horizon, 1.0), probability, atol=EXACT)
    np.testing.assert_allclose(
        oracle.target(model, horizon, 3.0), probability**3 / (probability**3).sum(), atol=EXACT
    )


@pytest.mark.parametrize(
    ("entropies", "arguments", "expected"),
    [
        # Jumps 1, 0, 2, 0: squared 1, 0, 4, 0.
        ([1.0, 0.5, 2.5, 2.0], (2.0, 0.0), [0.2, 0.0, 0.8, 0.0]),
        ([1.0, 0.5, 2.5, 2.0], (2.0, 0.2), [0.21, 0.05, 0.69, 0.05]),
        ([1.0, 0.5, 2.5, 2.0], (2.0, 0.3, False), [0.0, 0.1, 0.8, 0.1]),
        ([1.0, 0.5, 2.5, 2.0], (2.0, 0.0, True, True), [0.25, 0.25, 0.25, 0.25]),
        ([1.0, 0.5, 2.5, 2.0], (2.0, 0.0, False, True), [0.0, 1 / 3, 1 / 3, 1 / 3]),
        # 0^0 is 1: cut_power 0 is the uniform law.
        ([1.0, 0.5, 2.5, 2.0], (0.0, 0.0), [0.25, 0.25, 0.25, 0.25]),
        ([1.0, 0.5, 2.5, 2.0], (0.0, 0.0, False), [0.0, 1 / 3, 1 / 3, 1 / 3]),
        # No jump anywhere: uniform.
        ([0.0, 0.0], (4.0, 0.0), [0.5, 0.5]),
        ([1.0, 0.9, 0.8], (4.0, 0.1, False), [0.0, 0.5, 0.5]),
        # One token: one cut, or none.
        ([0.7], (4.0, 0.1), [1.0]),
        ([0.7], (4.0, 0.1, False), [0.0]),
        ([0.7], (4.0, 0.1, False, True), [0.0]),
    ],
)
def test_cut_probabilities_by_hand(entropies, arguments, expected):
    cuts = oracle.cut_probabilities(np.array(entropies), *arguments)
    np.testing.assert_allclose(cuts, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("proposal_temperature", [0.25, 0.7])
def test_coupled_draws_have_exactly_the_law_of_q(top_k, proposal_temperature):
    for seed, (vocabulary_size, horizon) in enumerate([(3, 5), (4, 4), (5, 4)]):
        rng = np.random.default_rng(seed)
        model = random_toy_model(rng, vocabulary_size, horizon, -0.5, eos_rank=top_k)
        every_state = oracle.states(model, horizon, top_k)
        for state in every_state[:: max(1, len(every_state) // 20)]:
            for cut in range(len(state)):
                arguments = (horizon, proposal_temperature, top_k)
                coupled = oracle.coupled_suffix_law(model, state, cut, *arguments)
                drawn = oracle.extension_law(model, state[:cut], *arguments)
                np.testing.assert_allclose(coupled, drawn, rtol=0, atol=EXACT)
                np.testing.assert_allclose(coupled.sum(), 1.0, rtol=0, atol=EXACT)


def test_schedule_without_steps_is_a_rollout_and_with_one_stage_a_chain():
    model = random_toy_model(np.random.default_rng(4), 3, 6, -1.0)
    rollout = oracle.extension_law(model, (), 6, 0.25)
    for refine_finished in (False, True):
        law = oracle.final_law(model, 3, 2, 0, 4.0, refine_finished=refine_finished)
        np.testing.assert_allclose(law, rollout, rtol=0, atol=EXACT)
        law = oracle.final_law(model, 1, 6, 7, 4.0, refine_finished=refine_finished)
        step = oracle.transition_matrix(model, 6, 4.0)
        chain = rollout @ np.linalg.matrix_power(step, 7)
        np.testing.assert_allclose(law, chain, rtol=0, atol=EXACT)


@pytest.mark.parametrize("sampler", ["entropy_cut", "uniform_cut"])
def test_schedule_approaches_the_target_only_if_finished_chains_are_refined(sampler):
    model = random_toy_model(np.random.default_rng(4), 3, 6, -0.5)
    goal = oracle.target(model, 6, 4.0)

    def distances(refine_finished: bool) -> list[float]:
        finals = [
            oracle.final_law(
                model, 3, 2, steps, 4.0, sampler=sampler, refine_finished=refine_finished
            )
            for steps in (0, 1, 10, 100, 1000)
        ]
        return [oracle.total_variation(final, goal) for final in finals]

    refined, frozen = distances(True), distances(False)
    assert all(later < earlier for earlier, later in itertools.pairwise(refined))
    assert refined[-1] < 1e-3
    # The paper's schedule has a bias of its own, however many steps it makes.
    assert frozen[-1] > 0.05


def test_frozen_chains_keep_the_law_of_the_stage_they_ended_in():
    model = random_toy_model(np.random.default_rng(6), 3, 4, -1.0)
    step = oracle.transition_matrix(model, 2, 4.0)
    first_stage = oracle.extension_law(model, (), 2, 0.25) @ np.linalg.matrix_power(step, 3)
    final_law = oracle.final_law(model, 2, 2, 3, 4.0)
    final = dict(zip(oracle.states(model, 4), final_law, strict=True))
    ended = {
        state: chance
        for state, chance in zip(oracle.states(model, 2), first_stage, strict=True)
        if state[-1] == model.eos_id
    }
    assert all(final[state] >= chance - EXACT for state, chance in ended.items())
    assert sum(final.values()) == pytest.approx(1.0, abs=EXACT)
    # Chains of the second stage may still come back to an early EOS: that is extra mass.
    assert sum(final[state] for state in ended) > sum(ended.values())


@pytest.mark.parametrize("sampler", ["entropy_cut", "uniform_cut"])
def test_the_kernel_written_twice(sampler):
    for index in range(6):
        model, top_k = grid_model(index)
        settings = (4.0, 3.0, 0.1, None, top_k, sampler)
        _, again = mutant_transition_matrix(model, model.horizon, None, *settings)
        step = oracle.transition_matrix(model, model.horizon, *settings)
        np.testing.assert_allclose(step, again, rtol=0, atol=EXACT)


@pytest.mark.parametrize("seed", [1, 6])  # Models on which every fault shows.
@pytest.mark.parametrize("sampler", ["entropy_cut", "uniform_cut"])
@pytest.mark.parametrize("mutant", [None, *MUTANTS])
def test_every_mutant_is_killed(mutant, sampler, seed):
    """Started from exactly the target, a faulty chain leaves it; margins 0.001 and 0.01."""
    # With q = p^power hardly any mass is truncated, and an untruncated q would go unnoticed.
    top_k, temperature = (2, 1.0) if mutant == "untruncated_q" else (None, None)
    model = random_toy_model(np.random.default_rng(seed), 3, 5, -1.0, eos_rank=top_k)
    space, step = mutant_transition_matrix(
        model, 5, mutant, 2.0, proposal_temperature=temperature, top_k=top_k, sampler=sampler
    )
    goal = embed(oracle.target(model, 5, 2.0, top_k), oracle.state_space(model, 5, top_k), space)
    np.testing.assert_allclose(step.sum(axis=1), 1.0, rtol=0, atol=EXACT)
    assert step.min() >= -EXACT
    flow = goal[:, None] * step
    imbalance = np.abs(flow - flow.T).max()
    drift = oracle.total_variation(goal @ np.linalg.matrix_power(step, 100), goal)
    if mutant is None:
        assert imbalance <= EXACT
        assert drift <= EXACT
    else:
        assert imbalance > 0.001
        assert drift > 0.01


def test_exactness_table_tells_exact_from_published():
    for kind, eos_boost in exactness_table.EOS_BOOSTS.items():
        models = exactness_table.table_models(eos_boost)
        exact = exactness_table.measure(models, "entropy_cut", None)
        published = exactness_table.measure(models, "entropy_cut", "published")
        assert exact[2] < exact[1] < exact[0], kind
        assert exact[2] < 0.02
        assert exact[-2] == 0.0
        assert published[2] > 0.2
        assert published[-2] > 0.2
    table = exactness_table.exactness_table()
    assert "nan" not in table
    assert all(name in table for name in MUTANTS)


def test_language_model_adapter_reads_the_table():
    model = random_toy_model(np.random.default_rng(7), 4, 3)
    language_model, params = toy_language_model(model, num_prompt_tokens=2)
    cache = language_model.init_cache(3, 6)
    prompts = jnp.array([[1, 2, 0], [3, 3, 0], [0, 0, 0]], jnp.int32)  # One slot of padding.
    logits, cache = language_model.prefill(params, prompts, jnp.full(3, 2, jnp.int32), cache)
    np.testing.assert_array_equal(logits, np.tile(model.logits[0], (3, 1)))
    written = [[0], [2], [3]]
    positions = jnp.full(3, 2, jnp.int32)
    _, cache = language_model.decode(params, jnp.array([0, 2, 3], jnp.int32), positions, cache)
    # Ragged: row 0 goes on, row 1 decodes its prompt's end again, row 2 replaces its token.
    tokens, positions = jnp.array([1, 3, 2], jnp.int32), jnp.array([3, 1, 2], jnp.int32)
    logits, cache = language_model.decode(params, tokens, positions, cache)
    prefixes = [(*written[0], 1), (), (2,)]
    expected = [model.logits[prefix_index(prefix, 4)] for prefix in prefixes]
    np.testing.assert_array_equal(logits, expected)
    # Past the table's prefixes the first horizon - 1 tokens count.
    positions = jnp.array([5, 3, 3], jnp.int32)
    logits, cache = language_model.decode(params, tokens, positions, cache)
    expected = [model.logits[prefix_index(prefix, 4)] for prefix in [(0, 1), (2, 3), (2, 2)]]
    np.testing.assert_array_equal(logits, expected)
