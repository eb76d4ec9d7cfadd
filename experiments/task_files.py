"""Rows of a data set's file: a JSON list, JSON Lines or CSV, plain or gzipped.

Files are the user's own, so that each way in which one can be unusable ends in a ValueError that
names the file, the place, what was expected and where to get the file.
"""

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

LARGEST_FILE = 64 << 20  # bytes; the largest of the data sets has 3 MB
LARGEST_TEXT = 256 << 20  # bytes when unpacked
_SHOWN = 80  # characters of a malformed line in a message
_OTHER_FORMATS = {b"PK": "a zip archive", b"PAR1": "a Parquet file", b"\x28\xb5\x2f\xfd": "zstd"}


class Row(NamedTuple):
    """One row of a file; ``place`` says where it stands: "line 3", or "row 3" of a list."""

    number: int
    place: str
    values: dict[str, Any]


class Source(NamedTuple):
    """A file, and what to say where it is unusable.

    Attributes:
      path: as the user gave it.
      expected: the form of its rows.
      where: where to get it.
    """

    path: str
    expected: str
    where: str

    def error(self, problem: str, place: str = "") -> ValueError:
        """Returns the error to raise for a problem at a place of the file."""
        at = f", {place}" if place else ""
        return ValueError(
            f"--data={self.path}{at}: {problem}; expected {self.expected}. {self.where}"
        )


def read_rows(source: Source) -> list[Row]:
    """Reads all rows; what the file is shows in its content, not its name.

    Args:
      source: the file.

    Returns:
      The rows in order, at least one. Blank lines are skipped but counted.

    Raises:
      ValueError: the file cannot be read, is too large, not UTF-8, malformed or empty.
    """
    text = _read_text(source)
    start = text.lstrip()[:1]
    if not start:
        raise source.error("the file is empty")
    if start == "[":
        rows = _rows_of_list(source, text)
    elif start == "{":
        rows = _rows_of_lines(source, text)
    else:
        rows = _rows_of_table(source, text)
    if not rows:
        raise source.error("the file holds no row")
    return rows


def read_text_field(source: Source, row: Row, *names: str) -> str:
    """Returns a row's text under the first of the names that it has.

    Args:
      source: the file, for the message.
      row: the row.
      *names: the field's names in the forms of the data set that are known.

    Raises:
      ValueError: the field is missing, is no text or no more than blanks, or is not valid Unicode.
    """
    value = next((row.values[name] for name in names if row.values.get(name) is not None), None)
    named = " or ".join(f'"{name}"' for name in names)
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # ids and answers are numbers in some files
    if not isinstance(value, str) or not value.strip():
        shown = "is missing" if value is None else f"is {str(value)[:_SHOWN]!r}"
        raise source.error(f"{named} {shown}", row.place)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise source.error(f"{named} holds half of a surrogate pair", row.place) from error
    return value


def _read_text(source: Source) -> str:
    try:
        with Path(source.path).expanduser().open("rb") as file:
            data = file.read(LARGEST_FILE + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise source.error(f"cannot be read: {reason}") from error
    if len(data) > LARGEST_FILE:
        raise source.error(f"larger than {LARGEST_FILE} bytes")
    if data[:2] == b"\x1f\x8b":
        data = _unpack(source, data)
    for magic, name in _OTHER_FORMATS.items():
        if data.startswith(magic):
            raise source.error(f"this is {name}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise source.error(f"not UTF-8 at byte {error.start}", f"line {line}") from error


def _unpack(source: Source, data: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            unpacked = file.read(LARGEST_TEXT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise source.error(f"damaged gzip: {error}") from error
    if len(unpacked) > LARGEST_TEXT:
        raise source.error(f"unpacks to more than {LARGEST_TEXT} bytes")
    return unpacked


def _parse(source: Source, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        within = f"{place or f'line {error.lineno}'}, column {error.colno}"
        raise source.error(f"not JSON ({error.msg})", within) from error
    except ValueError as error:  # an integer of thousands of digits
        raise source.error(f"not JSON ({error})", place) from error
    except RecursionError as error:
        raise source.error("JSON nested too deeply", place) from error


def _object(source: Source, value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise source.error(f"not a JSON object: {json.dumps(value)[:_SHOWN]}", place)
    return value


def _rows_of_list(source: Source, text: str) -> list[Row]:
    values = _parse(source, text, "")
    return [
        Row(number, f"row {number}", _object(source, value, f"row {number}"))
        for number, value in enumerate(values, 1)
    ]


def _rows_of_lines(source: Source, text: str) -> list[Row]:
    rows = []
    # Not splitlines: it also splits at U+2028, which JSON may hold as it is.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            place = f"line {number}"
            rows.append(Row(number, place, _object(source, _parse(source, line, place), place)))
    return rows


def _rows_of_table(source: Source, text: str) -> list[Row]:
    first = text.lstrip().partition("\n")[0].strip()
    if "," not in first:
        raise source.error(f"neither JSON nor a table: {first[:_SHOWN]!r}", "line 1")
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        for number, values in enumerate(reader, 1):
            place = f"line {reader.line_num}"
            if None in values or None in values.values():  # too many cells, too few
                count = len(reader.fieldnames or ())
                raise source.error(f"not as many cells as line 1, {count}", place)
            rows.append(Row(number, place, dict(values)))
    except csv.Error as error:
        raise source.error(f"not CSV ({error})", f"line {reader.line_num}") from error
    return rows
