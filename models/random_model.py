"""``--model=random:NAME``: the shape of a published model with random weights, for benchmarks.

Its text means nothing; its speed and its memory are those of the model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from models import checkpoint, named_shapes
from models.checkpoint import Checkpoint, Place
from models.config import TransformerConfig
from models.huggingface_config import parse_config
from models.tokenizer import Tokenizer, build_tokenizer

Rule = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding] | None
PREFIX = "random:"
NAMES = tuple(named_shapes.CONFIGS)
_STANDARD_DEVIATION = 0.02  # what such models are initialised with


def make(
    name: str, dtype: np.dtype, place: Place, sharding: Rule = None, seed: int = 0
) -> Checkpoint:
    """Makes a model; its weights are drawn on the device and never pass through the host.

    Args:
      name: ``random:`` and one of ``NAMES``.
      dtype: dtype of the parameters.
      place: keeps a parameter, as in ``checkpoint.read_parameters``.
      sharding: where each parameter goes, as in ``load.load_model``.
      seed: of the weights.

    Raises:
      ValueError: the name is unknown.
    """
    values = find_shape(name)
    config = parse_config(values, f"--model={name}")
    params = _draw_parameters(config, dtype, place, sharding, seed)
    return Checkpoint(
        config, params, _byte_tokenizer(config, name), None, named_shapes.eos_ids(values)
    )


def find_shape(name: str) -> dict[str, Any]:
    """Returns the shape of ``random:NAME`` in the terms of config.json.

    Raises:
      ValueError: the name is unknown.
    """
    values = named_shapes.CONFIGS.get(name.removeprefix(PREFIX))
    if values is None:
        raise ValueError(
            f"--model={name} is unknown; expected {PREFIX} and one of {', '.join(NAMES)}"
        )
    return values


def _draw_parameters(
    config: TransformerConfig, dtype: np.dtype, place: Place, sharding: Rule, seed: int
) -> dict[str, Any]:
    """Draws the tree of weights: normal matrices, norms of one, no biases."""

    def draw(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return _STANDARD_DEVIATION * jax.random.normal(key, shape, dtype)

    def fill(value: float, shape: tuple[int, ...]) -> jax.Array:
        return jnp.full(shape, value, dtype)

    params: dict[str, Any] = {}
    for index, (path, shape) in enumerate(checkpoint.leaf_shapes(config)):
        # Made where it belongs: no device ever holds more than its share.
        where = None if sharding is None else sharding(path, shape)
        if len(shape) == 2:
            key = jax.random.fold_in(jax.random.key(seed), index)
            leaf = jax.jit(draw, static_argnums=1, out_shardings=where)(key, shape)
        else:
            value = 1.0 - config.norm_offset if path[-1].endswith("norm") else 0.0
            leaf = jax.jit(fill, static_argnums=1, out_shardings=where)(value, shape)
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = place(path, leaf)
    return params


def _byte_tokenizer(config: TransformerConfig, name: str) -> Tokenizer:
    """A token a byte: enough to encode any prompt."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return build_tokenizer(backend, (), config.vocabulary_size, Path(name))
