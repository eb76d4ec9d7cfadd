"""Training a small network by next-token prediction, with optax."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.equation_corpus import Corpus
from models import checkpoint
from models.config import TransformerConfig
from models.language_model import build_forward


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
      num_steps: updates of the weights.
      batch_size: rows of an update, B.
      learning_rate: the highest, after a linear rise over ``warmup_share`` of the steps; a cosine
        falls from there to 0.
      warmup_share: of the steps.
      weight_decay: of AdamW.
      clip_norm: largest norm of the gradient.
    """

    num_steps: int
    batch_size: int
    learning_rate: float
    warmup_share: float = 0.05
    weight_decay: float = 0.01
    clip_norm: float = 1.0


class TrainState(NamedTuple):
    """What an update needs from the one before."""

    params: Any
    optimiser: optax.OptState


def init_params(config: TransformerConfig, seed: int) -> dict[str, Any]:
    """Draws weights: normal matrices of the usual width for their inputs, norms of one.

    The two matrices of a layer that write to the residual stream are smaller by the square root of
    the number of such writes, so that the stream's size does not grow with depth.
    """
    params: dict[str, Any] = {}
    for index, (path, shape) in enumerate(checkpoint.leaf_shapes(config)):
        key = jax.random.fold_in(jax.random.key(seed), index)
        if len(shape) == 1:
            leaf = jnp.full(shape, 1.0 if path[-1].endswith("norm") else 0.0)
        elif len(path) == 1:
            leaf = 0.02 * jax.random.normal(key, shape)
        else:
            width = shape[0] ** -0.5
            if path[-1] in ("attention_output", "down"):
                width *= (2 * config.num_layers) ** -0.5
            leaf = width * jax.random.normal(key, shape)
        branch = params
        for part in path[:-1]:
            branch = branch.setdefault(part, {})
        branch[path[-1]] = leaf
    return params


def completion_log_probs(
    forward: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    tokens: jax.Array,
    prompt_lengths: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Log-probabilities of the completions' tokens in nats, [B, S - 1], 0 for all others.

    Args:
      forward: as ``build_forward`` returns it.
      params: the weights.
      tokens: [B, S] int32.
      prompt_lengths: [B] int32.
      lengths: [B] int32, prompt and completion.
    """
    log_probs = jax.nn.log_softmax(forward(params, tokens[:, :-1]))
    found = jnp.take_along_axis(log_probs, tokens[:, 1:, None], axis=-1)[..., 0]
    index = jnp.arange(1, tokens.shape[1])[None]
    inside = (index >= prompt_lengths[:, None]) & (index < lengths[:, None])
    return jnp.where(inside, found, 0.0)


def build_optimiser(schedule: Schedule) -> optax.GradientTransformation:
    """AdamW with a clipped gradient; vectors do not decay."""
    rate = optax.warmup_cosine_decay_schedule(
        0.0,
        schedule.learning_rate,
        int(schedule.warmup_share * schedule.num_steps),
        schedule.num_steps,
    )
    return optax.chain(
        optax.clip_by_global_norm(schedule.clip_norm),
        optax.adamw(
            rate,
            b2=0.98,
            weight_decay=schedule.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def build_update(
    config: TransformerConfig, optimiser: optax.GradientTransformation
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """Returns the jitted ``update(state, tokens, prompt_lengths, lengths) -> (state, loss)``.

    The loss is the mean negative log-likelihood of the completions' tokens; prompts are given.
    """
    forward = build_forward(config)

    def update(state, tokens, prompt_lengths, lengths):
        def loss_of(params):
            found = completion_log_probs(forward, params, tokens, prompt_lengths, lengths)
            return -jnp.sum(found) / jnp.sum(lengths - prompt_lengths)

        loss, gradient = jax.value_and_grad(loss_of)(state.params)
        change, optimiser_state = optimiser.update(gradient, state.optimiser, state.params)
        params: Any = optax.apply_updates(state.params, change)
        return TrainState(params, optimiser_state), loss

    return jax.jit(update, donate_argnums=0)


_PADDED_TO = 16


def pad_length(longest: int) -> int:
    """Rounds the length of a batch up, so that few programs are compiled."""
    return -(-longest // _PADDED_TO) * _PADDED_TO


def draw_batches(corpus: Corpus, batch_size: int, seed: int) -> Iterator[Corpus]:
    """Yields batches of rows of about one length, in random order, epoch after epoch."""
    rng = np.random.default_rng(seed)
    num_batches = len(corpus.lengths) // batch_size
    while True:
        # Which of equally long rows come together changes from epoch to epoch.
        order = np.lexsort((rng.random(len(corpus.lengths)), corpus.lengths))
        for batch in rng.permutation(num_batches):
            rows = order[batch * batch_size : (batch + 1) * batch_size]
            longest = int(corpus.lengths[rows].max())
            yield Corpus(
                corpus.tokens[rows, : pad_length(longest)],
                corpus.prompt_lengths[rows],
                corpus.lengths[rows],
            )
