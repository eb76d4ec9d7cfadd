"""``python -m models.inspect MODEL``: what a model is, and what would refuse to load.

Reads settings and the tables of tensors, never a weight.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from models import (
    gguf_header,
    gguf_reader,
    huggingface_config,
    huggingface_reader,
    locate,
    named_shapes,
    random_model,
)
from models.checkpoint import leaf_shapes
from models.config import TransformerConfig
from models.gguf_tokenizer import tokenizer_from_gguf
from models.tokenizer import Tokenizer, read_tokenizer

_DTYPES = ("float32", "bfloat16")


class Inspection(NamedTuple):
    """What was found; None for what could not be read.

    Attributes:
      source: what was inspected, exactly.
      config: the network's shape.
      tokenizer: its tokenizer.
      eos_ids: token ids that end a completion.
      has_chat_template: whether there is one.
      stored_bytes: bytes of the weights' files; None where they were not looked at.
      problems: why it would not load; empty if it would.
    """

    source: str
    config: TransformerConfig | None
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...] | None
    has_chat_template: bool | None
    stored_bytes: int | None
    problems: tuple[str, ...]


def inspect(name: str, revision: str | None = None) -> Inspection:
    """Inspects a model.

    Args:
      name: as in ``load.load_model``; of a hub id only the settings are fetched.
      revision: branch, tag or commit of a hub id.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: the name is none.
    """
    located = locate.locate(name, revision, settings_only=True)
    if located.kind == locate.RANDOM:
        return _inspect_random(located)
    problems: list[str] = []

    def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a reader; what it refuses is noted, and all else goes on."""
        try:
            return function(*arguments)
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
            return None

    inspect_kind = _inspect_gguf if located.kind == locate.GGUF else _inspect_folder
    found = inspect_kind(located, attempt)
    return found._replace(problems=tuple(dict.fromkeys(problems)))


def _inspect_folder(located: locate.Located, attempt: Callable[..., Any]) -> Inspection:
    folder = located.path
    config = attempt(huggingface_config.read_config, folder)
    template = attempt(huggingface_reader.read_chat_template, folder)
    tokenizer = eos_ids = weights = None
    if config is not None:
        tokenizer = attempt(read_tokenizer, folder / "tokenizer.json", config.vocabulary_size)
        eos_ids = attempt(huggingface_reader.read_eos_ids, folder, config)
        if located.is_whole:
            weights = attempt(huggingface_reader.list_weights, folder, config)
    shards = {tensor.shard for tensor in (weights or {}).values()}
    return Inspection(
        located.source,
        config,
        tokenizer,
        eos_ids,
        template is not None,
        sum(shard.stat().st_size for shard in shards) if shards else None,
        (),
    )


def _inspect_gguf(located: locate.Located, attempt: Callable[..., Any]) -> Inspection:
    size = located.path.stat().st_size
    nothing = Inspection(located.source, None, None, None, None, size, ())
    header = attempt(gguf_header.read_header, located.path)
    if header is None:
        return nothing
    attempt(gguf_header.check_kinds, header)
    config = attempt(gguf_reader.read_config, header)
    if config is None:
        return nothing
    tokenizer = attempt(tokenizer_from_gguf, header.metadata, config.vocabulary_size, located.path)
    template = attempt(gguf_reader.read_chat_template, header)
    attempt(gguf_reader.check_weights, header, config)
    eos_ids = attempt(gguf_reader.read_eos_ids, header, config)
    return Inspection(located.source, config, tokenizer, eos_ids, template is not None, size, ())


def _inspect_random(located: locate.Located) -> Inspection:
    name = str(located.path)
    values = random_model.find_shape(name)
    config = huggingface_config.parse_config(values, f"--model={name}")
    eos_ids = named_shapes.eos_ids(values)
    return Inspection(located.source, config, None, eos_ids, False, 0, ())


def describe(found: Inspection) -> str:
    """Returns the inspection as lines of text."""
    lines = [("model", found.source)]
    if found.config is not None:
        lines += _describe_config(found.config)
    if found.stored_bytes:
        lines.append(("stored", _quantity(found.stored_bytes, "B")))
    if found.tokenizer is not None:
        lines.append(("tokenizer", f"{found.tokenizer.vocabulary_size} ids"))
        if found.tokenizer.bos_ids:
            lines.append(("begins with", _tokens(found.tokenizer.bos_ids, found.tokenizer)))
    if found.eos_ids is not None:
        lines.append(("ends with", _tokens(found.eos_ids, found.tokenizer) or "no token"))
    if found.has_chat_template is not None:
        lines.append(("chat template", "yes" if found.has_chat_template else "none"))
    lines.append(("would load", "no" if found.problems else "yes"))
    if found.stored_bytes is None and not found.problems:
        lines[-1] = ("would load", "yes, as far as its settings tell; weights are not downloaded")
    lines += [("", problem) for problem in found.problems]
    return "\n".join(f"{name:<16}{value}".rstrip() for name, value in lines)


def _describe_config(config: TransformerConfig) -> list[tuple[str, str]]:
    count = sum(math.prod(shape) for _, shape in leaf_shapes(config))
    token = 2 * config.num_layers * config.key_size
    sizes = {
        dtype: (
            _quantity(jnp.dtype(dtype).itemsize * count, "B"),
            _quantity(jnp.dtype(dtype).itemsize * token, "B"),
        )
        for dtype in _DTYPES
    }
    context = f"{config.context_length} tokens"
    if config.longest_length > config.context_length:
        context += ", longer ones by YaRN"
    if any(config.sliding_layers):
        sliding = sum(config.sliding_layers)
        context += f"; {sliding} layers see the last {config.sliding_window}"
    return [
        ("family", config.family),
        ("parameters", _quantity(count, "")),
        ("weights", ", ".join(f"{weights} in {dtype}" for dtype, (weights, _) in sizes.items())),
        (
            "layers",
            f"{config.num_layers} of width {config.embedding_size}, {config.num_heads} query and "
            f"{config.num_kv_heads} key/value heads of {config.head_size}",
        ),
        ("vocabulary", f"{config.vocabulary_size} rows, head {_head(config)}"),
        ("context", context),
        ("cache", ", ".join(f"{cache} a token in {dtype}" for dtype, (_, cache) in sizes.items())),
    ]


def _head(config: TransformerConfig) -> str:
    return "tied to the embedding" if config.tied_head else "of its own"


def _tokens(ids: tuple[int, ...], tokenizer: Tokenizer | None) -> str:
    def name(index: int) -> str:
        text = "" if tokenizer is None else tokenizer.decode([index], skip_special_tokens=False)
        return f"{index} {text}".strip()

    return ", ".join(name(index) for index in ids)


def _quantity(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    return f"{value:.3g} T{unit}"


def main(arguments: list[str]) -> int:
    """Prints the inspection; returns 1 if the model would not load, 2 if there is none."""
    parser = argparse.ArgumentParser(
        prog="python -m models.inspect", description="What a model is, without loading it."
    )
    parser.add_argument("model", help="as --model of experiments.sample")
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    chosen = parser.parse_args(arguments)
    try:
        found = inspect(chosen.model, chosen.revision)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(describe(found))
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
