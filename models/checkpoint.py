"""What a checkpoint reader returns, and how named tensors become the parameter tree.

Every format stores the same matrices under other names. A reader gives its table of names, the
shapes it found and a function that reads one tensor; the checks and the fusing happen here, once.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from models.chat_template import ChatTemplate
from models.config import TransformerConfig
from models.json_file import brief
from models.tokenizer import Tokenizer


class Checkpoint(NamedTuple):
    """A model as its files describe it.

    Attributes:
      config: the network's shape.
      params: nested dict, the tree of ``models.transformer.Transformer``, already in its place.
      tokenizer: text to token ids and back.
      chat_template: None when the files hold none.
      eos_ids: token ids that end a completion; may be empty.
    """

    config: TransformerConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    eos_ids: tuple[int, ...]


# Takes a leaf's path of keys and the leaf, in the host's memory; returns it where it is used.
Place = Callable[[tuple[str, ...], np.ndarray], Any]


class Piece(NamedTuple):
    """One stored tensor and the place it takes in a leaf.

    Attributes:
      role: key of the reader's table of names, such as ``query``.
      name: the tensor's name in the file.
      shape: what the configuration says its shape must be.
    """

    role: str
    name: str
    shape: tuple[int, ...]


_LARGEST_FLOAT = 1 << 53
_LARGEST_INT = (1 << 31) - 1  # positions are int32 on the device

# leaf of the tree -> the stored tensors whose outputs are put side by side to make it
_PARTS = {
    "query_key_value": ("query", "key", "value"),
    "query_key_value_bias": ("query_bias", "key_bias", "value_bias"),
    "gate_up": ("gate", "up"),
}


def _layer_leaves(config: TransformerConfig) -> list[str]:
    """The leaves of a layer, in the order in which the network uses them."""
    leaves = ["attention_norm", "query_key_value"]
    if config.query_key_value_bias:
        leaves.append("query_key_value_bias")
    if config.query_key_norm:
        leaves += ["query_norm", "key_norm"]
    leaves.append("attention_output")
    if config.post_norms:
        leaves.append("post_attention_norm")
    leaves += ["feed_forward_norm", "gate_up", "down"]
    if config.post_norms:
        leaves.append("post_feed_forward_norm")
    return leaves


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The stored shape of every role, ``[outputs, inputs]``."""
    width, inner = config.embedding_size, config.feed_forward_size
    queries, keys = config.query_size, config.key_size
    return {
        "embedding": (config.vocabulary_size, width),
        "final_norm": (width,),
        "head": (config.vocabulary_size, width),
        "attention_norm": (width,),
        "query": (queries, width),
        "key": (keys, width),
        "value": (keys, width),
        "query_key_value": (queries + 2 * keys, width),
        "query_bias": (queries,),
        "key_bias": (keys,),
        "value_bias": (keys,),
        "query_key_value_bias": (queries + 2 * keys,),
        "query_norm": (config.head_size,),
        "key_norm": (config.head_size,),
        "attention_output": (width, queries),
        "post_attention_norm": (width,),
        "feed_forward_norm": (width,),
        "gate": (inner, width),
        "up": (inner, width),
        "gate_up": (2 * inner, width),
        "down": (width, inner),
        "post_feed_forward_norm": (width,),
    }


def leaf_shapes(config: TransformerConfig) -> Iterator[tuple[tuple[str, ...], tuple[int, ...]]]:
    """Yields the path of keys of every leaf of the tree, and the shape that it has there."""
    shapes = _shapes(config)
    for path in _leaf_paths(config):
        shape = shapes[path[-1]]
        yield path, shape[::-1] if is_projection(path, shape) else shape


def _leaf_paths(config: TransformerConfig) -> Iterator[tuple[str, ...]]:
    for leaf in ("embedding", "final_norm") + (() if config.tied_head else ("head",)):
        yield (leaf,)
    for layer in range(config.num_layers):
        for leaf in _layer_leaves(config):
            yield f"layer_{layer}", leaf


def is_projection(path: tuple[str, ...], shape: tuple[int, ...]) -> bool:
    """Whether a leaf is a layer's matrix, which the tree holds as ``[inputs, outputs]``."""
    return len(path) == 2 and len(shape) == 2


def leaves(
    config: TransformerConfig, names: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], list[Piece]]]:
    """Yields every leaf of the tree, as its path of keys, with the tensors it is made of."""
    shapes = _shapes(config)
    for path in _leaf_paths(config):
        leaf = path[-1]
        # A file that stores a matrix in one piece has a name for the whole.
        roles = (leaf,) if leaf in names else _PARTS[leaf]
        layer = path[0].removeprefix("layer_")
        yield path, [Piece(role, names[role].format(layer=layer), shapes[role]) for role in roles]


def check_tensors(
    config: TransformerConfig,
    names: Mapping[str, str],
    stored: Mapping[str, tuple[int, ...]],
    source: object,
) -> None:
    """Checks that a file holds exactly the tensors of ``config``, before any of them is read.

    A tensor that the network has no place for is refused as well: a bias that is left out changes
    the model without a word.

    Args:
      config: the network's shape.
      names: role -> name in the file; ``{layer}`` stands for the layer's index.
      stored: name -> shape, all that the file holds and that may not be ignored.
      source: the file or folder, for the message.

    Raises:
      ValueError: naming the file and the first tensor that is missing, misshapen or unknown.
    """
    # An absurd layer count must not make us build its list of names first.
    if config.num_layers > len(stored):
        raise ValueError(
            f"{source}: the configuration names {config.num_layers} layers, but only {len(stored)} "
            "tensors are stored; the configuration and the weights do not belong together"
        )
    expected = set()
    for _, pieces in leaves(config, names):
        for piece in pieces:
            if piece.name not in stored:
                raise ValueError(
                    f"{source}: tensor {piece.name!r} is missing; expected {piece.shape}"
                )
            if tuple(stored[piece.name]) != piece.shape:
                raise ValueError(
                    f"{source}: tensor {piece.name!r} has shape {brief(stored[piece.name])}; "
                    f"expected {piece.shape} from the model's configuration"
                )
            expected.add(piece.name)
    unknown = sorted(set(stored) - expected)
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} tensors have no place in a {config.family} decoder, such as "
            f"{brief(unknown[0])}; this architecture is not supported"
        )


def read_parameters(
    config: TransformerConfig,
    names: Mapping[str, str],
    read: Callable[[Piece], np.ndarray],
    dtype: np.dtype,
    place: Place,
) -> dict[str, Any]:
    """Reads the tree leaf by leaf, each placed before the next is read.

    The host never holds more than one leaf and one stored tensor besides what ``place`` keeps.

    Args:
      config: the network's shape; call ``check_tensors`` first.
      names: as in ``check_tensors``.
      read: returns one tensor in its stored or a wider dtype; it is not kept.
      dtype: dtype of every leaf.
      place: puts a leaf where it is used; what it returns becomes the leaf.

    Returns:
      Nested dict of what ``place`` returned. A layer's projections are turned to
      ``[inputs, outputs]``; embedding and head keep a row a token.
    """
    params: dict[str, Any] = {}
    for path, pieces in leaves(config, names):
        outputs = sum(piece.shape[0] for piece in pieces)
        turned = is_projection(path, pieces[0].shape)
        rest = pieces[0].shape[1:]
        leaf = np.empty((*rest, outputs) if turned else (outputs, *rest), dtype)
        by_output = leaf.T if turned else leaf
        start = 0
        for piece in pieces:
            by_output[start : start + piece.shape[0]] = read(piece)
            start += piece.shape[0]
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = place(path, leaf)
    return params


def make_config(source: object, **fields: Any) -> TransformerConfig:
    """Builds the configuration; an error of its own checks names the file as well.

    A window as long as the context, such as Phi's, is none.
    """
    try:
        config = TransformerConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    window, longest = config.sliding_window, config.longest_length
    if window is not None and window >= longest and config.sliding_rotary is None:
        return dataclasses.replace(config, sliding_window=None, sliding_layers=())
    return config


def read_number(
    values: Mapping[str, Any],
    key: str,
    kind: type,
    source: object,
    default: Any = None,
    positive: bool = False,
) -> Any:
    """Reads one finite number of a file's settings.

    Args:
      values: the settings; None stands for a missing one.
      key: its name.
      kind: ``int``, or ``float``, which takes integers too.
      source: the file, for the message.
      default: what a missing setting means; None where it must be given.
      positive: whether it must be > 0.

    Raises:
      ValueError: naming the file and the key, for anything else, such as a value per layer.
    """
    value = values.get(key)
    value = default if value is None else value
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    # Larger ones would overflow somewhere in a library.
    largest = _LARGEST_INT if kind is int else _LARGEST_FLOAT
    if not number or abs(value) > largest or not math.isfinite(value):
        found = "missing" if value is None else brief(value)
        raise ValueError(
            f"{source}: {key} is {found}; expected one number ({kind.__name__}, at most {largest})"
        )
    if positive and not value > 0:
        raise ValueError(f"{source}: {key} is {value}; expected > 0")
    return value


def check_eos_ids(eos_ids: object, vocabulary_size: int, source: object) -> tuple[int, ...]:
    """Checks the end-of-sequence ids of a file: an int, a list of them, or None.

    Args:
      eos_ids: the value as it was found.
      vocabulary_size: V.
      source: the file, for the message.

    Returns:
      The ids without repeats, in their order; empty for None.

    Raises:
      ValueError: naming the file, for anything that is not a token id.
    """
    values: list[Any] = list(eos_ids) if isinstance(eos_ids, (list, tuple)) else [eos_ids]
    values = [] if eos_ids is None else values
    for value in values:
        if (
            isinstance(value, bool)
            or not isinstance(value, int)
            or not 0 <= value < vocabulary_size
        ):
            raise ValueError(
                f"{source}: end-of-sequence id {brief(value)}; expected token ids in "
                f"0..{vocabulary_size - 1}"
            )
    return tuple(dict.fromkeys(values))
