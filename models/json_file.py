"""JSON objects from files that may be corrupt or hostile."""

import collections
import json
import reprlib
from pathlib import Path
from typing import Any

# The largest in use are Gemma's tokenizer_config.json, 1.2 MB, and headers of safetensors, 0.2 MB.
# Python's objects are thirty times as large: "[],[]," and so on.
MAX_BYTES = 1 << 22

_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 8
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 80


def brief(value: object) -> str:
    """A value of a file for a message: a few hundred characters at most, on one line."""
    return _SHORT.repr(value)


def check_size(path: Path, most: int = MAX_BYTES) -> None:
    """Checks that a file can be read as a whole.

    Raises:
      ValueError: naming the file, when it is larger than ``most`` bytes.
    """
    size = path.stat().st_size
    if size > most:
        raise ValueError(f"{path}: has {size} bytes; expected at most {most}")


def read_text(path: Path) -> str:
    """Reads a small UTF-8 file.

    Raises:
      ValueError: naming the file, when it is large or not UTF-8.
    """
    check_size(path)
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one object.

    Raises:
      FileNotFoundError: there is none.
      ValueError: naming the file, for anything else than an object without repeated keys.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a Hugging Face model folder")
    return parse_json(read_text(path), path)


def parse_json(text: str | bytes, path: Path) -> dict[str, Any]:
    """Parses a JSON object in which no key is given twice; ``path`` is for messages."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (repeated, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"the name {brief(repeated)} occurs twice")
        return values

    try:
        # The json module would take UTF-16 as well.
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        values = json.loads(decoded, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a JSON {type(values).__name__}; expected an object")
    return values
