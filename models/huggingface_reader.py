"""A Hugging Face folder of a Llama-family model as a ``Checkpoint``.

Weights come from safetensors alone: a pickle file can run code when it is read, so none ever is.
"""

import collections
import json
import os
import struct
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import safetensors

from models import checkpoint
from models.chat_template import ChatTemplate
from models.checkpoint import Checkpoint, Piece
from models.config import TransformerConfig
from models.tokenizer import read_tokenizer

SUPPORTED_MODEL_TYPES = ("llama", "mistral")

_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "head": "lm_head.weight",
    "attention_norm": "model.layers.{layer}.input_layernorm.weight",
    "query": "model.layers.{layer}.self_attn.q_proj.weight",
    "key": "model.layers.{layer}.self_attn.k_proj.weight",
    "value": "model.layers.{layer}.self_attn.v_proj.weight",
    "attention_output": "model.layers.{layer}.self_attn.o_proj.weight",
    "feed_forward_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "gate": "model.layers.{layer}.mlp.gate_proj.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
}
# Keys that change the network; any other value than these would be ignored silently.
_NEUTRAL = {
    "hidden_act": (None, "silu"),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1.0),
    "quantization_config": (None,),
    "sliding_window": (None,),
}
_STORED_DTYPES = ("F32", "F16", "BF16")
_MAX_JSON_BYTES = 1 << 26


def read_huggingface(folder: str | os.PathLike[str], dtype: np.dtype) -> Checkpoint:
    """Reads a folder with config.json, tokenizer.json and safetensors.

    Every check comes before the first weight.

    Args:
      folder: as ``save_pretrained`` of transformers or a hub snapshot lays it out.
      dtype: dtype of the parameters.

    Returns:
      The model.

    Raises:
      FileNotFoundError: naming the file that is missing.
      ValueError: naming the file that is corrupt or describes a model that is not supported.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json", config.vocabulary_size)
    eos_ids = _eos_ids(folder, config.vocabulary_size)
    chat_template = _chat_template(folder)
    shards = _find_shards(folder)
    shapes, shard_of = _list_tensors(folder, shards)
    if config.tied_head:
        shapes.pop(_NAMES["head"], None)
    checkpoint.check_tensors(config, _NAMES, shapes, folder)

    # All at once: safetensors maps a file, so that an open one costs nothing.
    opened = {shard: safetensors.safe_open(shard, framework="np") for shard in shards}

    def read(piece: Piece) -> np.ndarray:
        return opened[shard_of[piece.name]].get_tensor(piece.name)

    params = checkpoint.read_parameters(config, _NAMES, read, dtype)
    return Checkpoint(config, params, tokenizer, chat_template, eos_ids)


def read_config(folder: Path) -> TransformerConfig:
    """Reads config.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: naming the file and the key that is missing, absurd or not supported.
    """
    path = folder / "config.json"
    values = _read_json(path)
    model_type = values.get("model_type")
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"{path}: model_type is {model_type!r}; supported are "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}. Pass another model to --model"
        )
    if model_type == "mistral":
        values.setdefault("sliding_window", 4096)  # what transformers takes when it is not given
    for key, neutral in _NEUTRAL.items():
        if values.get(key) not in neutral:
            raise ValueError(f"{path}: {key} is {values[key]!r}, which is not supported")

    def number(key: str, kind: type = int, default: float | None = None) -> Any:
        return checkpoint.read_number(values, key, kind, path, default)

    width = number("hidden_size")
    num_heads = number("num_attention_heads")
    if values.get("head_dim") is None and (num_heads <= 0 or width % num_heads):
        raise ValueError(
            f"{path}: hidden_size {width} is not a multiple of num_attention_heads {num_heads}"
        )
    # The defaults are those of transformers' LlamaConfig.
    return checkpoint.make_config(
        path,
        vocabulary_size=number("vocab_size"),
        num_layers=number("num_hidden_layers"),
        embedding_size=width,
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", int, num_heads),
        head_size=number("head_dim", int, width // num_heads if num_heads else 0),
        feed_forward_size=number("intermediate_size"),
        context_length=number("max_position_embeddings", int, 2048),
        rope_theta=_rope_theta(values, path),
        norm_epsilon=number("rms_norm_eps", float, 1e-6),
        tied_head=values.get("tie_word_embeddings") is True,
    )


def _rope_theta(values: dict[str, Any], path: Path) -> float:
    """The base of the rotary positions; transformers 5 writes it into ``rope_parameters``."""
    theta = values.get("rope_theta")
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if rope is None:
            continue
        kind = rope.get("rope_type", rope.get("type")) if isinstance(rope, dict) else rope
        if kind not in (None, "default") or not isinstance(rope, dict):
            raise ValueError(f"{path}: {key} is {rope!r}; only 'default' is supported")
        if rope.get("partial_rotary_factor") not in (None, 1.0):
            raise ValueError(f"{path}: partial_rotary_factor in {key} is not supported")
        theta = rope.get("rope_theta", theta)
    return checkpoint.read_number({"rope_theta": theta}, "rope_theta", float, path, 10_000.0)


def _eos_ids(folder: Path, vocabulary_size: int) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = _read_json(path).get("eos_token_id")
            if ids is not None:
                return checkpoint.check_eos_ids(ids, vocabulary_size, path)
    return ()


def _chat_template(folder: Path) -> ChatTemplate | None:
    """The template of chat_template.jinja, or else of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    values = _read_json(path) if path.is_file() else {}
    text = values.get("chat_template")
    if isinstance(text, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in text if entry}
        text = named.get("default")
    if (folder / "chat_template.jinja").is_file():
        path = folder / "chat_template.jinja"
        text = _read_text(path)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{path}: chat_template is {text!r}; expected text")

    def token(key: str) -> str:
        value = values.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        return value if isinstance(value, str) else ""

    return ChatTemplate(text, str(path), token("bos_token"), token("eos_token"))


def _find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder; their names in an index are not trusted."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        pickles = sorted(
            path.name
            for path in folder.iterdir()
            if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
        )
        if pickles:
            raise ValueError(
                f"{folder}: holds {pickles[0]} but no model.safetensors; pickle files can run "
                "code and are never read. Convert it with save_pretrained of transformers"
            )
        raise FileNotFoundError(f"{folder}: no model.safetensors and no {index.name}")
    shards = []
    for name in sorted({str(name) for name in _weight_map(index).values()}):
        # A name with a folder in it could lead anywhere. Links are followed: the hub's own cache
        # is made of them.
        bare = name == PurePosixPath(name).name == PureWindowsPath(name).name
        if not bare or not name.endswith(".safetensors"):
            raise ValueError(
                f"{index}: shard name {name!r}; expected the plain name of a .safetensors file"
            )
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such shard, but {index.name} names it")
        shards.append(folder / name)
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is missing; expected tensor names and their shards")
    return weight_map


def _list_tensors(
    folder: Path, shards: list[Path]
) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
    """Returns the shape and the shard of every tensor; no tensor is read."""
    shapes: dict[str, tuple[int, ...]] = {}
    shard_of: dict[str, Path] = {}
    for shard in shards:
        try:
            with safetensors.safe_open(shard, framework="np") as opened:
                _refuse_repeated_names(shard)
                for name in list(opened.keys()):
                    tensor = opened.get_slice(name)
                    if tensor.get_dtype() not in _STORED_DTYPES:
                        raise ValueError(
                            f"{shard}: tensor {name!r} is stored as {tensor.get_dtype()}; "
                            f"expected one of {', '.join(_STORED_DTYPES)}"
                        )
                    if name in shapes:
                        raise ValueError(
                            f"{shard}: tensor {name!r} is in {shard_of[name].name} too"
                        )
                    if name.endswith(".rotary_emb.inv_freq"):
                        continue  # old files store what rope_theta says anyway
                    shapes[name], shard_of[name] = tuple(tensor.get_shape()), shard
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{shard}: not a whole safetensors file ({error}); download it again"
            ) from error
    return shapes, shard_of


def _refuse_repeated_names(shard: Path) -> None:
    """Reads the header once more: the library merges a name that occurs twice."""
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        text = file.read(length)  # the library has checked the length
    _parse_json(text, shard)


def _read_text(path: Path) -> str:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{path}: larger than {_MAX_JSON_BYTES} bytes; expected a small file")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a Hugging Face model folder")
    return _parse_json(_read_text(path), path)


def _parse_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object in which no key is given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (repeated, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the name {repeated!r} occurs twice")
        return values

    try:
        values = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a JSON {type(values).__name__}; expected an object")
    return values
