"""A GGUF file of a Llama-family model as a ``Checkpoint``: the tables of names, and the layout."""

import os
from typing import Any

import numpy as np

from models import checkpoint, gguf_header
from models.chat_template import ChatTemplate
from models.checkpoint import Checkpoint, Piece
from models.config import TransformerConfig
from models.gguf_header import Header
from models.tokenizer import tokenizer_from_gguf

SUPPORTED_ARCHITECTURES = ("llama",)

_NAMES = {
    "embedding": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attention_norm": "blk.{layer}.attn_norm.weight",
    "query": "blk.{layer}.attn_q.weight",
    "key": "blk.{layer}.attn_k.weight",
    "value": "blk.{layer}.attn_v.weight",
    "attention_output": "blk.{layer}.attn_output.weight",
    "feed_forward_norm": "blk.{layer}.ffn_norm.weight",
    "gate": "blk.{layer}.ffn_gate.weight",
    "up": "blk.{layer}.ffn_up.weight",
    "down": "blk.{layer}.ffn_down.weight",
}
# Keys that change the network; any other value than these would be ignored silently.
_NEUTRAL = {
    "llama.rope.scaling.type": (None, "none"),
    "llama.rope.scaling.factor": (None, 0.0, 1.0),
    "llama.rope.scale_linear": (None, 0.0, 1.0),
    "llama.rope.scaling.attn_factor": (None, 1.0),
    "llama.attention.sliding_window": (None, 0),
    "llama.expert_count": (None, 0),
    "split.count": (None, 0, 1),
}
_EOS_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def read_gguf(path: str | os.PathLike[str], dtype: np.dtype) -> Checkpoint:
    """Reads a GGUF file; every check comes before the first weight.

    Args:
      path: the file.
      dtype: dtype of the parameters; quantised tensors are expanded to it.

    Returns:
      The model.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: naming the file, when it is corrupt or holds a model that is not supported.
    """
    header = gguf_header.read_header(path)
    config = read_config(header)
    tokenizer = tokenizer_from_gguf(header.metadata, config.vocabulary_size, header.path)
    eos_ids = checkpoint.check_eos_ids(
        [header.metadata[key] for key in _EOS_KEYS if key in header.metadata],
        config.vocabulary_size,
        header.path,
    )
    shapes = {name: info.shape for name, info in header.tensors.items()}
    checkpoint.check_tensors(config, _NAMES, shapes, header.path)
    gguf_header.check_kinds(header)

    def read(piece: Piece) -> np.ndarray:
        weights = gguf_header.read_tensor(header, piece.name)
        if piece.role in ("query", "key"):
            return _halves_from_pairs(weights, config.head_size)
        return weights

    params = checkpoint.read_parameters(config, _NAMES, read, dtype)
    return Checkpoint(config, params, tokenizer, _chat_template(header), eos_ids)


def read_config(header: Header) -> TransformerConfig:
    """Reads the network's shape from a GGUF file's metadata.

    Raises:
      ValueError: naming the file and the key that is missing, absurd or not supported.
    """
    metadata, path = header.metadata, header.path
    architecture = metadata.get("general.architecture")
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"{path}: general.architecture is {architecture!r}; supported are "
            f"{', '.join(SUPPORTED_ARCHITECTURES)}. Pass another file to --model"
        )
    for key, neutral in _NEUTRAL.items():
        value = metadata.get(key)
        if value not in neutral:
            raise ValueError(f"{path}: {key} is {value!r}, which is not supported")
    if "rope_freqs.weight" in header.tensors:
        raise ValueError(f"{path}: rope_freqs.weight scales the positions; not supported")
    embedding = header.tensors.get(_NAMES["embedding"])
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{path}: tensor {_NAMES['embedding']!r} is missing or not a matrix")

    def number(key: str, kind: type = int, default: float | None = None) -> Any:
        return checkpoint.read_number(metadata, f"llama.{key}", kind, path, default)

    width = number("embedding_length")
    num_heads = number("attention.head_count")
    head_size = number("attention.key_length", int, width // num_heads if num_heads else 0)
    for key in ("rope.dimension_count", "attention.value_length"):
        if number(key, int, head_size) != head_size:
            raise ValueError(
                f"{path}: llama.{key} is {number(key)}; expected the head size, {head_size}"
            )
    return checkpoint.make_config(
        path,
        vocabulary_size=number("vocab_size", int, embedding.shape[0]),
        num_layers=number("block_count"),
        embedding_size=width,
        num_heads=num_heads,
        num_kv_heads=number("attention.head_count_kv", int, num_heads),
        head_size=head_size,
        feed_forward_size=number("feed_forward_length"),
        context_length=number("context_length"),
        rope_theta=number("rope.freq_base", float, 10_000.0),
        norm_epsilon=number("attention.layer_norm_rms_epsilon", float),
        tied_head=_NAMES["head"] not in header.tensors,
    )


def _halves_from_pairs(weights: np.ndarray, head_size: int) -> np.ndarray:
    """Undoes GGUF's order of query and key rows, ``[heads * head_size, inputs]``.

    llama.cpp rotates neighbouring rows of a head together and stores them so; this network, like
    Hugging Face's, rotates row i with row i + head_size / 2. A model with the wrong order still
    writes fluent text, only worse.
    """
    pairs = weights.reshape(-1, head_size // 2, 2, weights.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def _chat_template(header: Header) -> ChatTemplate | None:
    text = header.metadata.get("tokenizer.chat_template")
    if not isinstance(text, str):
        return None
    tokens = header.metadata["tokenizer.ggml.tokens"]

    def token(key: str) -> str:
        index = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else ""

    return ChatTemplate(text, f"{header.path} (chat template)", token("bos"), token("eos"))
