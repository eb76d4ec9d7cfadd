"""A GGUF file as a ``Checkpoint``."""

import math
import os
from typing import Any

import numpy as np

from models import checkpoint, gguf_header, gguf_rotary
from models.chat_template import ChatTemplate
from models.checkpoint import Checkpoint, Piece, Place
from models.config import TransformerConfig
from models.families import FAMILIES, GGUF_FAMILIES
from models.gguf_header import Header
from models.gguf_tokenizer import TURN_ENDS, tokenizer_from_gguf
from models.json_file import brief
from models.rotary import Rotary

_EOS_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
_GEMMA3_27B_LAYERS = 62  # the one Gemma 3 whose attention is scaled by its width
# Keys that change the network; any other value than these would be ignored silently.
_NEUTRAL = {"split.count": (None, 0, 1)}
_NEUTRAL_OF_ARCHITECTURE = {
    "rope.scale_linear": (None, 0.0, 1.0),
    "expert_count": (None, 0),
    "attn_logit_softcapping": (None, 0.0),
    "attention.causal": (None, True),
    "rope.scaling.alpha": (None,),
    "rope.scaling.yarn_ext_factor": (None,),
    "rope.scaling.yarn_attn_factor": (None, 1.0),
    "rope.scaling.yarn_log_multiplier": (None,),
}


def read_gguf(path: str | os.PathLike[str], dtype: np.dtype, place: Place) -> Checkpoint:
    """Reads a GGUF file; every check comes before the first weight.

    Args:
      path: the file.
      dtype: dtype of the parameters; quantised tensors are expanded to it.
      place: puts a parameter where it is used, as in ``checkpoint.read_parameters``.

    Returns:
      The model.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: naming the file, when it is corrupt or holds a model that is not supported.
    """
    header = gguf_header.read_header(path)
    gguf_header.check_kinds(header)
    config = read_config(header)
    tokenizer = tokenizer_from_gguf(header.metadata, config.vocabulary_size, header.path)
    eos_ids = read_eos_ids(header, config)
    chat_template = read_chat_template(header)
    check_weights(header, config)
    family = FAMILIES[config.family]

    def read(piece: Piece) -> np.ndarray:
        weights = gguf_header.read_tensor(header, piece.name)
        if family.gguf_interleaves and piece.role in ("query", "key"):
            return _halves_from_pairs(weights, config.head_size)
        return weights

    params = checkpoint.read_parameters(config, family.gguf_names, read, dtype, place)
    return Checkpoint(config, params, tokenizer, chat_template, eos_ids)


def check_weights(header: Header, config: TransformerConfig) -> None:
    """Raises ValueError unless the file holds exactly the tensors of ``config``."""
    shapes = {
        name: info.shape for name, info in header.tensors.items() if name not in gguf_rotary.TENSORS
    }
    checkpoint.check_tensors(config, FAMILIES[config.family].gguf_names, shapes, header.path)


def read_eos_ids(header: Header, config: TransformerConfig) -> tuple[int, ...]:
    """End-of-sequence ids: those that the file names, and the tokens whose text ends a turn.

    Files name one end of several; a conversation with Phi-3 would run on past ``<|end|>``.
    """
    found = [header.metadata[key] for key in _EOS_KEYS if key in header.metadata]
    tokens = header.metadata.get("tokenizer.ggml.tokens", [])
    ends = [index for index, token in enumerate(tokens) if token in TURN_ENDS]
    return checkpoint.check_eos_ids(found + ends, config.vocabulary_size, header.path)


def read_config(header: Header) -> TransformerConfig:
    """Reads the network's shape from a GGUF file's metadata.

    Raises:
      ValueError: naming the file and the key that is missing, absurd or not supported.
    """
    metadata, path = header.metadata, header.path
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in GGUF_FAMILIES:
        raise ValueError(
            f"{path}: general.architecture is {brief(architecture)}; supported are "
            f"{', '.join(GGUF_FAMILIES)}. Pass another file to --model"
        )
    family = FAMILIES[GGUF_FAMILIES[architecture]]
    neutral_values = _NEUTRAL | {
        f"{architecture}.{key}": neutral for key, neutral in _NEUTRAL_OF_ARCHITECTURE.items()
    }
    for key, neutral in neutral_values.items():
        if metadata.get(key) not in neutral:
            raise ValueError(f"{path}: {key} is {brief(metadata[key])}, which is not supported")
    name = family.gguf_names["embedding"]
    embedding = header.tensors.get(name)
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{path}: tensor {name!r} is missing or not a matrix")

    def number(key: str, kind: type = int, default: float | None = None) -> Any:
        name = f"{architecture}.{key}"
        value = checkpoint.read_number(metadata, name, kind, path, default)
        # Zero is how some converters say that there is none.
        if value < 0 or (value == 0 and default != 0):
            raise ValueError(f"{path}: {name} is {value}; expected > 0")
        return value

    width = number("embedding_length")
    num_heads = number("attention.head_count")
    num_layers = number("block_count")
    head_size = number("attention.key_length", int, width // num_heads)
    if number("attention.value_length", int, head_size) != head_size:
        raise ValueError(
            f"{path}: {architecture}.attention.value_length is "
            f"{number('attention.value_length')}; expected the head size, {head_size}"
        )
    if num_layers > len(header.tensors):
        raise ValueError(
            f"{path}: {architecture}.block_count is {num_layers}; expected 1..{len(header.tensors)}"
            ", as many as tensors"
        )
    plain = gguf_rotary.read_rotary(header, family, number, head_size)
    window = number("attention.sliding_window", int, 0)
    is_gemma = family.window == "but every 6th"
    softcap = number("final_logit_softcapping", float, 0.0)
    return checkpoint.make_config(
        path,
        vocabulary_size=number("vocab_size", int, embedding.shape[0]),
        num_layers=num_layers,
        embedding_size=width,
        num_heads=num_heads,
        num_kv_heads=number("attention.head_count_kv", int, num_heads),
        head_size=head_size,
        feed_forward_size=number("feed_forward_length"),
        context_length=number("context_length"),
        norm_epsilon=number("attention.layer_norm_rms_epsilon", float),
        tied_head=family.gguf_names["head"] not in header.tensors,
        rotary=plain,
        # What follows for Gemma 3 stands in llama.cpp's code, not in the files.
        sliding_rotary=Rotary(theta=float(number("rope.freq_base_swa", float, 10_000.0)))
        if is_gemma
        else None,
        embedding_scale=math.sqrt(width) if is_gemma else 1.0,
        attention_scale=(width / num_heads) ** -0.5
        if is_gemma and num_layers == _GEMMA3_27B_LAYERS
        else None,
        logit_softcap=softcap or None,
        sliding_window=window or None,
        sliding_layers=_sliding_layers(header, is_gemma, num_layers) if window else (),
        family=GGUF_FAMILIES[architecture],
        **{**family.traits, **family.gguf_traits},
    )


def _sliding_layers(header: Header, is_gemma: bool, num_layers: int) -> tuple[bool, ...]:
    """A flag a layer: all, or all but each sixth for Gemma 3, or what newer files say."""
    key = f"{header.metadata['general.architecture']}.attention.sliding_window_pattern"
    pattern = header.metadata.get(key, 6 if is_gemma else 0)
    if isinstance(pattern, list) and [type(flag) for flag in pattern] == [bool] * num_layers:
        return tuple(pattern)
    if isinstance(pattern, bool) or not isinstance(pattern, int) or pattern < 0:
        raise ValueError(
            f"{header.path}: {key} is {brief(pattern)}; expected a number, or a flag for each of "
            f"{num_layers} layers"
        )
    return tuple(pattern == 0 or (layer + 1) % pattern != 0 for layer in range(num_layers))


def _halves_from_pairs(weights: np.ndarray, head_size: int) -> np.ndarray:
    """Undoes GGUF's order of query and key rows, ``[heads * head_size, inputs]``.

    llama.cpp rotates neighbouring rows of a head together and stores them so; this network, like
    Hugging Face's, rotates row i with row i + head_size / 2. A model with the wrong order still
    writes fluent text, only worse.
    """
    pairs = weights.reshape(-1, head_size // 2, 2, weights.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weights.shape)


def read_chat_template(header: Header) -> ChatTemplate | None:
    """The file's template, or None."""
    text = header.metadata.get("tokenizer.chat_template")
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{header.path}: tokenizer.chat_template is {brief(text)}; expected text")
    tokens = header.metadata["tokenizer.ggml.tokens"]

    def token(key: str) -> str:
        index = header.metadata.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if isinstance(index, int) and 0 <= index < len(tokens) else ""

    return ChatTemplate(text, f"{header.path} (chat template)", token("bos"), token("eos"))
