"""Reinforcement learning: its gradient by enumeration, its cost, and runs that are interrupted."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import policy_gradient, train_rl, train_tiny, training
from experiments.equation_corpus import is_held_out
from experiments.policy_gradient import Completions
from experiments.summaries import count_flops
from experiments.train_rl import RlConfig
from experiments.train_tiny import TrainConfig
from experiments.training import TrainState
from models.config import TransformerConfig
from models.language_model import build_forward
from models.load import load_model

CONFIG = TransformerConfig(
    vocabulary_size=3,
    num_layers=1,
    embedding_size=8,
    num_heads=2,
    num_kv_heads=1,
    head_size=4,
    feed_forward_size=8,
    context_length=8,
)


def test_advantages_compare_with_the_others():
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 0.0, 0.0]])
    found = policy_gradient.leave_one_out(rewards)
    for row, column in np.ndindex(3, 4):
        others = np.delete(rewards[row], column).mean()
        assert found[row, column] == pytest.approx(rewards[row, column] - others)


def test_the_gradient_is_that_of_the_expected_reward():
    forward = build_forward(CONFIG)
    params = jax.tree.map(lambda leaf: 3.0 * leaf, training.init_params(CONFIG, 1))
    # Every completion of two tokens after the prompt 1, and what each earns.
    completions = list(itertools.product(range(3), repeat=2))
    tokens = jnp.array([[1, *completion] for completion in completions])
    rewards = np.random.default_rng(0).normal(size=9)

    def log_probs(params):
        found = jax.nn.log_softmax(forward(params, tokens[:, :-1]))
        return jnp.take_along_axis(found, tokens[:, 1:, None], axis=-1)[..., 0].sum(axis=1)

    def expected_reward(params):
        return jnp.sum(jnp.exp(log_probs(params)) * rewards)

    probabilities = np.exp(np.asarray(log_probs(params), np.float64))
    assert probabilities.sum() == pytest.approx(1, abs=1e-5)
    optimiser = optax.sgd(1.0)
    update = policy_gradient.build_update(CONFIG, optimiser)
    ascent = jax.tree.map(lambda leaf: np.zeros(leaf.shape), params)
    for pair in itertools.product(range(9), repeat=2):
        chosen = list(pair)
        advantages = policy_gradient.leave_one_out(rewards[None, chosen])[0]
        batch = Completions(
            tokens[jnp.array(chosen)],
            jnp.ones(2, jnp.int32),
            jnp.full(2, 3),
            jnp.asarray(advantages, jnp.float32),
        )
        state = TrainState(jax.tree.map(jnp.array, params), optimiser.init(params))
        moved = update(state, batch).params
        weight = probabilities[chosen].prod()
        ascent = jax.tree.map(
            lambda total, new, old, weight=weight: total + weight * np.asarray(new - old, float),
            ascent,
            moved,
            params,
        )
    exact = jax.grad(expected_reward)(params)
    assert max(float(abs(leaf).max()) for leaf in jax.tree.leaves(exact)) > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ascent, exact)


def test_problems_differ_by_update_and_are_not_held_out():
    first, again = train_rl.draw_problems(0, 3, 50), train_rl.draw_problems(0, 3, 50)
    assert first == again != train_rl.draw_problems(0, 4, 50)
    assert first != train_rl.draw_problems(1, 3, 50)
    assert not any(is_held_out(problem) for problem in first)


def test_right_answers_that_ended_earn_one():
    problem = train_rl.draw_problems(0, 0, 1)[0]
    texts = [f"x = {problem.solution}.", f"x = {problem.solution}.", "x = 99.", ""]
    found = train_rl.reward(texts, [problem] * 4, np.array([True, False, True, True]))
    assert found.tolist() == [1, 0, 0, 0]
    assert found.dtype == np.float32


def test_cost_counts_each_token_drawn_and_learned():
    prompt_lengths, lengths = np.array([3, 2]), np.array([5, 6])
    # Token n of a text attends to n slots.
    drawn = 2, 4 + 5, 4, 3 + 4 + 5 + 6
    expected = count_flops(CONFIG, drawn[0] + drawn[2], drawn[1] + drawn[3])
    expected += 3 * count_flops(CONFIG, 11, sum(range(1, 6)) + sum(range(1, 7)))
    assert train_rl.count_update(CONFIG, prompt_lengths, lengths) == expected


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("base") / "model")
    train_tiny.run_train_tiny(
        TrainConfig(
            output_dir=folder,
            num_examples=200,
            num_steps=3,
            batch_size=8,
            num_layers=1,
            width=32,
            checkpoint_every=2,
        )
    )
    return folder


SMALL = RlConfig(num_updates=4, num_prompts=2, group_size=2, max_new_tokens=12, checkpoint_every=2)


@pytest.mark.slow
def test_an_interrupted_run_ends_like_a_whole_one(base, tmp_path, monkeypatch):
    # Untrained, the policy solves nothing: any reward will do to make it move.
    monkeypatch.setattr(
        train_rl, "reward", lambda texts, *_: np.array([len(text) % 2 for text in texts], float)
    )
    whole = dataclasses.replace(SMALL, model=base, output_dir=str(tmp_path / "whole"))
    summary = train_rl.run_train_rl(whole)
    rows = [json.loads(row) for row in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    assert summary["flops"] == sum(row["flops"] for row in rows)
    assert any(0 < row["reward"] < 1 for row in rows)

    stopped = dataclasses.replace(whole, output_dir=str(tmp_path / "stopped"))
    improve = train_rl.Policy.improve

    def stop_in_the_third(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return improve(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(train_rl.Policy, "improve", stop_in_the_third)
        with pytest.raises(KeyboardInterrupt):
            train_rl.run_train_rl(stopped)
    assert train_rl.run_train_rl(stopped) | {"seconds": 0} == summary | {"seconds": 0}
    found = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert found[0] == found[1]
    again = (tmp_path / "stopped/metrics.jsonl").read_text().splitlines()
    for row, other in zip(rows, map(json.loads, again), strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    trained, start = (load_model(name, "float32").params for name in (whole.output_dir, base))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), trained, start)
    assert max(jax.tree.leaves(moved)) > 1e-5


def test_other_settings_do_not_mix(base, tmp_path):
    config = dataclasses.replace(SMALL, model=base, output_dir=str(tmp_path), num_updates=1)
    train_rl.run_train_rl(config)
    with pytest.raises(ValueError, match="holds a run with another seed"):
        train_rl.run_train_rl(dataclasses.replace(config, seed=1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dir": None}, "--output_dir is missing"),
        ({"group_size": 1}, "--group_size=1; expected >= 2"),
        ({"num_updates": 0}, "--num_updates=0; expected >= 1"),
        ({"learning_rate": 0.0}, "--learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "--learning_rate=nan"),
        ({"seed": -1}, "--seed=-1"),
    ],
)
def test_bad_flags_are_named(tmp_path, change, message):
    config = dataclasses.replace(SMALL, **({"output_dir": str(tmp_path)} | change))
    with pytest.raises(ValueError, match=message):
        train_rl.run_train_rl(config)
    assert not list(tmp_path.iterdir())
