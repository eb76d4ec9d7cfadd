"""A Hugging Face folder as a ``Checkpoint``.

Weights come from safetensors alone: a pickle file can run code when it is read, so none ever is.
"""

import os
import re
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors

from models import checkpoint
from models.chat_template import ChatTemplate
from models.checkpoint import Checkpoint, Piece, Place
from models.config import TransformerConfig
from models.families import FAMILIES, Family
from models.huggingface_config import read_config
from models.json_file import MAX_BYTES, brief, parse_json, read_json, read_text
from models.tokenizer import read_tokenizer

_STORED_DTYPES = ("F32", "F16", "BF16")
# A name with a folder in it could lead anywhere.
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}\.safetensors")


def read_huggingface(folder: str | os.PathLike[str], dtype: np.dtype, place: Place) -> Checkpoint:
    """Reads a folder with config.json, tokenizer.json and safetensors.

    Every check comes before the first weight.

    Args:
      folder: as ``save_pretrained`` of transformers or a hub snapshot lays it out.
      dtype: dtype of the parameters.
      place: puts a parameter where it is used, as in ``checkpoint.read_parameters``.

    Returns:
      The model.

    Raises:
      FileNotFoundError: naming the file that is missing.
      ValueError: naming the file that is corrupt or describes a model that is not supported.
    """
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json", config.vocabulary_size)
    eos_ids = read_eos_ids(folder, config)
    chat_template = read_chat_template(folder)
    stored = list_weights(folder, config)

    def read(piece: Piece) -> np.ndarray:
        tensor = stored[piece.name]
        # Opened anew each time: what stays mapped would count as this process's memory.
        with safetensors.safe_open(tensor.shard, framework="np") as opened:
            return opened.get_tensor(tensor.name)

    names = FAMILIES[config.family].huggingface_names
    params = checkpoint.read_parameters(config, names, read, dtype, place)
    return Checkpoint(config, params, tokenizer, chat_template, eos_ids)


class StoredTensor(NamedTuple):
    """Where a tensor lies, under the name that its shard gives it."""

    shard: Path
    name: str
    shape: tuple[int, ...]


def list_weights(folder: Path, config: TransformerConfig) -> dict[str, StoredTensor]:
    """Returns the stored tensors that ``config`` asks for, by the family's own names.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: naming the file, unless it holds exactly these tensors.
    """
    family = FAMILIES[config.family]
    stored = _list_tensors(_find_shards(folder), family)
    if config.tied_head:
        stored.pop(family.huggingface_names["head"], None)
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    checkpoint.check_tensors(config, family.huggingface_names, shapes, folder)
    return stored


def read_eos_ids(folder: Path, config: TransformerConfig) -> tuple[int, ...]:
    """End-of-sequence ids of generation_config.json, or else of config.json."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids = read_json(path).get("eos_token_id")
            if ids is not None:
                return checkpoint.check_eos_ids(ids, config.vocabulary_size, path)
    return ()


def read_chat_template(folder: Path) -> ChatTemplate | None:
    """The template of chat_template.jinja, or else of tokenizer_config.json."""
    path = folder / "tokenizer_config.json"
    values = read_json(path) if path.is_file() else {}
    text = values.get("chat_template")
    if isinstance(text, list):  # several, by name
        if not all(
            isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in text
        ):
            raise ValueError(
                f"{path}: chat_template is {brief(text)}; expected text, or objects with a name"
            )
        text = {entry["name"]: entry.get("template") for entry in text}.get("default")
    if (folder / "chat_template.jinja").is_file():
        path = folder / "chat_template.jinja"
        text = read_text(path)
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{path}: chat_template is {brief(text)}; expected text")

    def token(key: str) -> str:
        value = values.get(key)
        value = value.get("content") if isinstance(value, dict) else value
        if not isinstance(value, str | None):
            raise ValueError(f"{path}: {key} is {brief(value)}; expected text")
        return value or ""

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
    for name in _shard_names(index):
        # Links are followed: the hub's own cache is made of them.
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such shard, but {index.name} names it")
        shards.append(folder / name)
    return shards


def _shard_names(index: Path) -> list[str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is missing; expected tensor names and their shards")
    for name in weight_map.values():
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise ValueError(
                f"{index}: shard name {brief(name)}; expected the plain name of a .safetensors file"
            )
    return sorted(set(weight_map.values()))


def _list_tensors(shards: list[Path], family: Family) -> dict[str, StoredTensor]:
    """Returns all tensors of the text model under the row's own names; none is read."""
    tensors: dict[str, StoredTensor] = {}
    bytes_left = MAX_BYTES  # of all headers
    for shard in shards:
        bytes_left -= _check_header(shard, bytes_left)
        try:
            with safetensors.safe_open(shard, framework="np") as opened:
                for stored_name in list(opened.keys()):
                    if stored_name.startswith(family.stray_tensors) or stored_name.endswith(
                        ".rotary_emb.inv_freq"  # old files store what rope_theta says anyway
                    ):
                        continue
                    tensor = opened.get_slice(stored_name)
                    if tensor.get_dtype() not in _STORED_DTYPES:
                        raise ValueError(
                            f"{shard}: tensor {brief(stored_name)} is stored as "
                            f"{tensor.get_dtype()}; "
                            f"expected one of {', '.join(_STORED_DTYPES)}"
                        )
                    name = _rename(stored_name, family)
                    if name in tensors:
                        raise ValueError(
                            f"{shard}: tensor {brief(stored_name)} is in "
                            f"{tensors[name].shard.name} too"
                        )
                    shape = tuple(tensor.get_shape())
                    tensors[name] = StoredTensor(shard, stored_name, shape)
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{shard}: not a whole safetensors file ({brief(str(error))}); download it again"
            ) from error
    return tensors


def _rename(name: str, family: Family) -> str:
    for prefix, meaning in family.renamed.items():
        if name.startswith(prefix):
            return meaning + name.removeprefix(prefix)
    return name


def _check_header(shard: Path, most_bytes: int) -> int:
    """Returns the bytes of a header after checks that the library leaves out.

    It takes headers of 100 MB, and merges a name that occurs twice.
    """
    with shard.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= most_bytes:
            raise ValueError(
                f"{shard}: not a safetensors file: its header has {length} bytes; expected 1.."
                f"{most_bytes}"
            )
        text = file.read(length)
    parse_json(text, shard)
    return length
