"""What a checkpoint reader returns, and how named tensors become the parameter tree.

Every format stores the same matrices under other names. A reader gives its table of names, the
shapes it found and a function that reads one tensor; the checks and the fusing happen here, once.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from models.chat_template import ChatTemplate
from models.config import TransformerConfig
from models.tokenizer import Tokenizer


class Checkpoint(NamedTuple):
    """A model as its files describe it, still on the host.

    Attributes:
      config: the network's shape.
      params: nested dict of NumPy arrays, the tree of ``models.transformer.Transformer``.
      tokenizer: text to token ids and back.
      chat_template: None when the files hold none.
      eos_ids: token ids that end a completion; may be empty.
    """

    config: TransformerConfig
    params: dict[str, Any]
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    eos_ids: tuple[int, ...]


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


# leaf of the tree -> the stored tensors whose outputs are put side by side to make it
_LAYER_LEAVES = {
    "attention_norm": ("attention_norm",),
    "query_key_value": ("query", "key", "value"),
    "attention_output": ("attention_output",),
    "feed_forward_norm": ("feed_forward_norm",),
    "gate_up": ("gate", "up"),
    "down": ("down",),
}


def _shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """The stored shape of every role, ``[outputs, inputs]``."""
    width, inner = config.embedding_size, config.feed_forward_size
    query_rows = config.num_heads * config.head_size
    key_rows = config.num_kv_heads * config.head_size
    return {
        "embedding": (config.vocabulary_size, width),
        "final_norm": (width,),
        "head": (config.vocabulary_size, width),
        "attention_norm": (width,),
        "query": (query_rows, width),
        "key": (key_rows, width),
        "value": (key_rows, width),
        "attention_output": (width, query_rows),
        "feed_forward_norm": (width,),
        "gate": (inner, width),
        "up": (inner, width),
        "down": (width, inner),
    }


def _leaves(
    config: TransformerConfig, names: Mapping[str, str]
) -> Iterator[tuple[tuple[str, ...], list[Piece]]]:
    """Yields every leaf of the tree, as its path of keys, with the tensors it is made of."""
    shapes = _shapes(config)
    for leaf in ("embedding", "final_norm") + (() if config.tied_head else ("head",)):
        yield (leaf,), [Piece(leaf, names[leaf], shapes[leaf])]
    for layer in range(config.num_layers):
        for leaf, roles in _LAYER_LEAVES.items():
            pieces = [Piece(role, names[role].format(layer=layer), shapes[role]) for role in roles]
            yield (f"layer_{layer}", leaf), pieces


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
    for _, pieces in _leaves(config, names):
        for piece in pieces:
            if piece.name not in stored:
                raise ValueError(
                    f"{source}: tensor {piece.name!r} is missing; expected {piece.shape}"
                )
            if tuple(stored[piece.name]) != piece.shape:
                raise ValueError(
                    f"{source}: tensor {piece.name!r} has shape {tuple(stored[piece.name])}; "
                    f"expected {piece.shape} from the model's configuration"
                )
            expected.add(piece.name)
    unknown = sorted(set(stored) - expected)
    if unknown:
        raise ValueError(
            f"{source}: {len(unknown)} tensors have no place in a Llama-family decoder, such as "
            f"{unknown[0]!r}; this architecture is not supported"
        )


def read_parameters(
    config: TransformerConfig,
    names: Mapping[str, str],
    read: Callable[[Piece], np.ndarray],
    dtype: np.dtype,
) -> dict[str, Any]:
    """Reads the tree, one stored tensor at a time, into arrays of ``dtype``.

    Args:
      config: the network's shape; call ``check_tensors`` first.
      names: as in ``check_tensors``.
      read: returns one tensor in its stored or a wider dtype; it is not kept.
      dtype: dtype of every leaf.

    Returns:
      Nested dict of NumPy arrays that own their memory. A layer's projections are turned to
      ``[inputs, outputs]``; embedding and head keep a row a token.
    """
    params: dict[str, Any] = {}
    for path, pieces in _leaves(config, names):
        outputs = sum(piece.shape[0] for piece in pieces)
        is_projection = len(path) == 2 and len(pieces[0].shape) == 2
        rest = pieces[0].shape[1:]
        leaf = np.empty((*rest, outputs) if is_projection else (outputs, *rest), dtype)
        by_output = leaf.T if is_projection else leaf
        start = 0
        for piece in pieces:
            by_output[start : start + piece.shape[0]] = read(piece)
            start += piece.shape[0]
        branch = params
        for key in path[:-1]:
            branch = branch.setdefault(key, {})
        branch[path[-1]] = leaf
    return params


def make_config(source: object, **fields: Any) -> TransformerConfig:
    """Builds the configuration; an error of its own checks names the file as well."""
    try:
        return TransformerConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_number(
    values: Mapping[str, Any], key: str, kind: type, source: object, default: Any = None
) -> Any:
    """Reads one finite number of a file's settings.

    Args:
      values: the settings; None stands for a missing one.
      key: its name.
      kind: ``int``, or ``float``, which takes integers too.
      source: the file, for the message.
      default: what a missing setting means; None where it must be given.

    Raises:
      ValueError: naming the file and the key, for anything else, such as a value per layer.
    """
    value = values.get(key)
    value = default if value is None else value
    number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not number or (isinstance(value, float) and not math.isfinite(value)):
        found = "missing" if value is None else repr(value)
        raise ValueError(f"{source}: {key} is {found}; expected one number ({kind.__name__})")
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
                f"{source}: end-of-sequence id {value!r}; expected token ids in "
                f"0..{vocabulary_size - 1}"
            )
    return tuple(dict.fromkeys(values))
