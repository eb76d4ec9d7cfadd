"""REINFORCE with a leave-one-out baseline (RLOO, arXiv:2402.14740), a reward a completion.

Several completions of each prompt are drawn from the policy itself; each one's reward is compared
with the mean of the others', which depends on nothing of its own, so the gradient is unbiased:

    advantage_i = reward_i - mean of reward_j over j != i
    loss = - sum_i advantage_i log p(completion_i) / number of completions

One update a batch: the policy that drew is the policy that learns, and no ratio needs clipping.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.training import TrainState, completion_log_probs
from models.config import TransformerConfig
from models.language_model import build_forward


class Completions(NamedTuple):
    """Completions of one update, those of a prompt side by side.

    Attributes:
      tokens: [B, S] int32: prompt, completion, padding.
      prompt_lengths: [B] int32.
      lengths: [B] int32, prompt and completion.
      advantages: [B] float32.
    """

    tokens: jax.Array
    prompt_lengths: jax.Array
    lengths: jax.Array
    advantages: jax.Array


def leave_one_out(rewards: np.ndarray) -> np.ndarray:
    """Returns advantages [num_prompts, group_size] of such rewards; group_size >= 2."""
    group_size = rewards.shape[1]
    return (rewards - rewards.mean(axis=1, keepdims=True)) * group_size / (group_size - 1)


def build_update(
    config: TransformerConfig, optimiser: optax.GradientTransformation
) -> Callable[[TrainState, Completions], TrainState]:
    """Returns the jitted update of a policy by its own completions."""
    forward = build_forward(config)

    def loss(params: Any, completions: Completions) -> jax.Array:
        tokens, prompt_lengths, lengths, advantages = completions
        found = completion_log_probs(forward, params, tokens, prompt_lengths, lengths)
        return -jnp.mean(advantages * jnp.sum(found, axis=1))

    def update(state: TrainState, completions: Completions) -> TrainState:
        gradient = jax.grad(loss)(state.params, completions)
        change, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
        params: Any = optax.apply_updates(state.params, change)
        return TrainState(params, optimiser_state)

    return jax.jit(update, donate_argnums=0)
