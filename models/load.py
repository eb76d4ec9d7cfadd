"""``--model``: a name, a folder, a file or a hub id to a model that is ready to sample."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax.base import LanguageModel
from models import gguf_reader, huggingface_reader, locate, quantisation, random_model, rotary
from models.chat_template import ChatTemplate
from models.checkpoint import Checkpoint, Place
from models.config import TransformerConfig
from models.language_model import build_language_model
from models.locate import Located
from models.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16")


class LoadedModel(NamedTuple):
    """A model and everything that goes with it.

    Attributes:
      name: what was asked for.
      source: what it is, exactly: with the pinned revision or hash where there is one.
      language_model: the network as pure functions.
      params: its weights, JAX arrays of ``dtype``.
      config: its shape.
      tokenizer: text to token ids and back.
      chat_template: None for a model that has none.
      eos_ids: token ids that end a completion; may be empty.
      dtype: dtype of the weights and of the KV cache.
      needed_length: positions for which rotary positions that depend on the length are set.
      quantised: what matrices are kept in on the device, where it is not ``dtype``.
      decode_attention: the implementation that was asked for.
    """

    name: str
    source: str
    language_model: LanguageModel
    params: dict[str, Any]
    config: TransformerConfig
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    eos_ids: tuple[int, ...]
    dtype: np.dtype
    needed_length: int
    quantised: str | None
    decode_attention: str | None


# Takes a parameter's path of keys and its shape; returns where on the devices it goes.
ShardingRule = Callable[[tuple[str, ...], tuple[int, ...]], jax.sharding.Sharding]


def load_model(
    name: str | os.PathLike[str],
    dtype: str | None = None,
    revision: str | None = None,
    sharding: ShardingRule | None = None,
    quantise: str | None = None,
    decode_attention: str | None = None,
) -> LoadedModel:
    """Loads a model, each parameter into its place before the next is read.

    Args:
      name: ``smollm2-135m``, a Hugging Face folder, a .gguf file, a hub id ``owner/name`` or
        ``owner/name@revision``, or ``random:NAME``, a shape of ``random_model.NAMES`` with random
        weights.
      dtype: one of ``DTYPES``; None is float32 on a CPU, whose bfloat16 is slow, and bfloat16
        elsewhere.
      revision: branch, tag or commit of a hub id.
      sharding: where each parameter goes; None for the default device.
      quantise: one of ``quantisation.KINDS``, in which matrices are kept on the device; None for
        ``dtype``.
      decode_attention: one of ``attention.IMPLEMENTATIONS``, for measurements; None for the best
        known for the devices.

    Returns:
      The model; ``fit_length`` fits it to the length that a run needs.

    Raises:
      FileNotFoundError: naming the file, folder or hub id that is not there.
      ValueError: naming the flag or file, for an unknown model, a corrupt or an unsupported one.
    """
    name = os.fspath(name)
    chosen = _resolve_dtype(dtype)
    if quantise not in (None, *quantisation.KINDS):
        raise ValueError(f"--quantise={quantise}; expected one of {', '.join(quantisation.KINDS)}")

    def place(path: tuple[str, ...], leaf: np.ndarray | jax.Array) -> Any:
        where = None if sharding is None else sharding(path, leaf.shape)
        placed: Any = jax.device_put(leaf, where)
        if quantise is not None:
            placed = quantisation.quantise(path, placed, quantise)
        # Waiting keeps the copies in flight, and so the host's memory, to one.
        return jax.block_until_ready(placed)

    located = locate.locate(name, revision)
    checkpoint = _read(located, chosen, place, sharding)
    config = checkpoint.config
    return LoadedModel(
        name=name,
        source=located.source,
        language_model=build_language_model(config, chosen, decode_attention),
        params=checkpoint.params,
        config=config,
        tokenizer=checkpoint.tokenizer,
        chat_template=checkpoint.chat_template,
        eos_ids=checkpoint.eos_ids,
        dtype=chosen,
        needed_length=config.context_length,
        quantised=quantise,
        decode_attention=decode_attention,
    )


def fit_length(model: LoadedModel, needed_length: int) -> LoadedModel:
    """Sets rotary positions that depend on the length for a run of ``needed_length`` positions.

    Which length a run needs is part of its law for such models (LongRoPE, YaRN beyond the
    context); for all others this changes nothing.

    Args:
      model: the model.
      needed_length: prompt and completion together, in tokens.

    Returns:
      The model with the same weights.
    """

    def law(length: int) -> list[tuple[bytes, float]]:
        config = model.config
        kinds = (config.rotary, config.sliding_rotary or config.rotary)
        found = (rotary.compute_frequencies(kind, config.head_size, length) for kind in kinds)
        return [(radians.tobytes(), scale) for radians, scale in found]

    language_model = model.language_model
    if law(needed_length) != law(model.needed_length):
        language_model = build_language_model(
            model.config, model.dtype, model.decode_attention, needed_length
        )
    return model._replace(language_model=language_model, needed_length=needed_length)


def _resolve_dtype(dtype: str | None) -> np.dtype:
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}; expected one of {', '.join(DTYPES)}")
    return jnp.dtype(dtype)


def _read(
    located: Located, dtype: np.dtype, place: Place, sharding: ShardingRule | None
) -> Checkpoint:
    if located.kind == locate.RANDOM:
        return random_model.make(str(located.path), dtype, place, sharding)
    if located.kind == locate.GGUF:
        return gguf_reader.read_gguf(located.path, dtype, place)
    return huggingface_reader.read_huggingface(located.path, dtype, place)
