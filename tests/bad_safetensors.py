"""Bad weights of a model folder: ``name -> (the change, part of the message)``.

Some change the tensors of a good file, the others its header byte by byte.
"""

import copy
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from models.families import FAMILIES
from tests import tiny_families

Case = tuple[Callable[[Path], Any], str]
NORM = "model.norm.weight"
_BIAS = "model.layers.0.self_attn.q_proj.bias"


def tensors(**changes: np.ndarray | None) -> Callable[[Path], Any]:
    """Returns a change that replaces tensors, or drops them for None."""

    def change(folder: Path) -> None:
        weights = tiny_families.weights("llama", dict(FAMILIES["llama"].huggingface_names))
        kept = {key: values for key, values in {**weights, **changes}.items() if values is not None}
        safetensors.numpy.save_file(kept, folder / "model.safetensors")

    return change


def split(data: bytes) -> tuple[bytes, bytes]:
    """Header and tensors of a file."""
    (length,) = struct.unpack_from("<Q", data)
    return data[8 : 8 + length], data[8 + length :]


def join(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file with this header, whose length may be a lie."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def edit_bytes(edit: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Returns a change of a whole file."""

    def change(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return change


def edit_text(edit: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Returns a change of a header's text."""

    def edit_file(data: bytes) -> bytes:
        header, rest = split(data)
        return join(edit(header), rest)

    return edit_bytes(edit_file)


def edit_header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Returns a change of a header's values, made in place."""

    def edit_values(text: bytes) -> bytes:
        values = json.loads(text)
        edit(values)
        return json.dumps(values).encode()

    return edit_text(edit_values)


def norm(**changes: Any) -> Callable[[Path], Any]:
    """Returns a change of what the header says of one tensor; None drops it."""

    def edit(values: dict[str, Any]) -> None:
        row = {**values[NORM], **changes}
        values[NORM] = {key: value for key, value in row.items() if value is not None}

    return edit_header(edit)


def add(name: str, row: Any) -> Callable[[Path], Any]:
    """Returns a change that adds a row to the header."""
    return edit_header(lambda values: values.update({name: row}))


def same_place(values: dict[str, Any]) -> None:
    """Lets two tensors lie in the same bytes."""
    values["again"] = copy.deepcopy(values[NORM])


def swap(values: dict[str, Any]) -> None:
    """Shifts all tensors: the first bytes then belong to none."""
    for name, row in values.items():
        if name != "__metadata__":
            row["data_offsets"] = [offset + 4 for offset in row["data_offsets"]]


def repeat(text: bytes) -> bytes:
    """Names a tensor twice."""
    again = json.dumps({NORM: json.loads(text)[NORM]})[1:-1]
    return text.rstrip()[:-1] + f",{again}}}".encode()


def long_file(folder: Path) -> None:
    """Says that nearly all of a large file, which takes no room on a disk, is the header."""
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 99_999_992))
    os.truncate(path, 100_000_000)


def many_tensors(values: dict[str, Any]) -> None:
    """Adds very many tensors without elements."""
    values.update(
        {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    )


_UNWHOLE = "model.safetensors: not a whole safetensors file"
_EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
CASES: Mapping[str, Case] = {
    # --- tensors that do not fit the configuration
    "missing_tensor": (tensors(**{NORM: None}), f"'{NORM}' is missing; expected (32,)"),
    "no_head": (tensors(**{"lm_head.weight": None}), "'lm_head.weight' is missing"),
    "wrong_shape": (tensors(**{NORM: np.ones(31, np.float32)}), "shape (31,); expected (32,)"),
    "turned": (
        tensors(**{"lm_head.weight": np.ones((32, 263), np.float32)}),
        "'lm_head.weight' has shape (32, 263); expected (263, 32)",
    ),
    "scalar": (tensors(**{NORM: np.ones((), np.float32)}), "shape (); expected (32,)"),
    "a_bias": (tensors(**{_BIAS: np.ones(32, np.float32)}), "q_proj.bias"),
    "one_more_layer": (
        tensors(**{"model.layers.2.mlp.up_proj.weight": np.ones((24, 32), np.float32)}),
        "'model.layers.2.mlp.up_proj.weight'",
    ),
    "odd_name": (tensors(**{"a\nb": np.ones(3, np.float32)}), r"such as 'a\nb'"),
    "no_name": (tensors(**{"": np.ones(3, np.float32)}), "such as ''"),
    "long_name": (tensors(**{"x" * 100_000: np.ones(3, np.float32)}), "such as 'xxx"),
    **{
        f"stored_as_{dtype.__name__}": (
            tensors(**{NORM: np.ones(32, dtype)}),
            f"tensor '{NORM}' is stored as {stored}; expected one of F32",
        )
        for dtype, stored in (
            (np.float64, "F64"),
            (np.int64, "I64"),
            (np.uint8, "U8"),
            (np.bool_, "BOOL"),
            (np.complex64, "C64"),
        )
    },
    "stored_as_float8": (
        norm(dtype="F8_E4M3", shape=[128]),
        "is stored as F8_E4M3; expected one of F32",
    ),
    "stored_as_float4": (norm(dtype="F4", shape=[256]), "F4"),
    # --- the file
    "empty": (edit_bytes(lambda data: b""), "its header has 0 bytes"),
    "seven_bytes": (edit_bytes(lambda data: data[:7]), "its header has 0 bytes"),
    "only_a_length": (edit_bytes(lambda data: data[:8]), "model.safetensors"),
    "header_cut": (edit_bytes(lambda data: data[:30]), "not valid JSON"),
    "no_tensors": (edit_bytes(lambda data: data[:-1]), _UNWHOLE),
    "only_header": (edit_bytes(lambda data: join(split(data)[0], b"")), _UNWHOLE),
    "longer": (edit_bytes(lambda data: data + b"x"), _UNWHOLE),
    "another_format": (edit_bytes(lambda data: b"GGUF" + data[4:]), "its header has"),
    "a_zip": (edit_bytes(lambda data: b"PK\3\4" + bytes(600)), "its header has"),
    "a_pickle": (edit_bytes(lambda data: b"\x80\2cos\nsystem\n(S'id'\ntR."), "its header has"),
    "folder": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            (folder / "model.safetensors").mkdir(),
        ),
        "no model.safetensors",
    ),
    "length_zero": (edit_bytes(lambda data: join(b"", data, 0)), "its header has 0 bytes"),
    "length_one_less": (
        edit_bytes(lambda data: struct.pack("<Q", len(split(data)[0].rstrip()) - 1) + data[8:]),
        "not valid JSON",
    ),
    "length_one_more": (
        edit_bytes(lambda data: struct.pack("<Q", len(split(data)[0]) + 1) + data[8:]),
        "model.safetensors",
    ),
    "length_100_mb": (long_file, "its header has 99999992 bytes; expected 1..4194304"),
    "length_2_to_40": (edit_bytes(lambda data: join(b"{}", data, 1 << 40)), "1099511627776 bytes"),
    "length_2_to_64": (
        edit_bytes(lambda data: join(b"{}", data, (1 << 64) - 1)),
        "its header has 18446744073709551615 bytes",
    ),
    # --- the header's text
    "no_json": (edit_text(lambda text: b"x" + text[1:]), "not valid JSON"),
    "zeros": (edit_text(lambda text: bytes(1_000_000)), "not valid JSON"),
    "list": (edit_text(lambda text: b"[]"), "holds a JSON list"),
    "null": (edit_text(lambda text: b"null"), "holds a JSON NoneType"),
    "no_tensor": (edit_text(lambda text: b"{}"), _UNWHOLE),
    "deep": (edit_text(lambda text: b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "deep_but_closed": (
        edit_text(lambda text: b'{"a":' + b"[" * 500 + b"]" * 500 + b"}"),
        _UNWHOLE,
    ),
    "many_objects": (
        edit_text(lambda text: b"[" + b"{}," * 1_390_000 + b"{}]"),
        "holds a JSON list",
    ),
    "name_not_utf8": (
        edit_text(lambda text: text.replace(b"model.norm", b"model.n\xff\xfem")),
        "not valid JSON: 'utf-8' codec",
    ),
    "utf16": (edit_text(lambda text: text.decode().encode("utf-16-le")), "not valid JSON"),
    "surrogate": (
        edit_text(lambda text: text.replace(b"model.norm", b"\\ud800")),
        "model.safetensors",
    ),
    "name_twice": (edit_text(repeat), f"'{NORM}' occurs twice"),
    "shape_twice": (
        edit_text(lambda text: text.replace(b'"shape":[32]', b'"shape":[1],"shape":[32]', 1)),
        "'shape' occurs twice",
    ),
    # --- what the header says
    "overlap": (edit_header(same_place), _UNWHOLE),
    "gap": (edit_header(swap), _UNWHOLE),
    "offsets_backwards": (norm(data_offsets=[128, 0]), _UNWHOLE),
    "offsets_beyond": (norm(data_offsets=[1 << 40, (1 << 40) + 128]), _UNWHOLE),
    "offsets_huge": (norm(data_offsets=[(1 << 64) - 128, 1 << 64]), _UNWHOLE),
    "offsets_overflow": (norm(data_offsets=[10**30, 10**30 + 128]), _UNWHOLE),
    "offsets_negative": (norm(data_offsets=[-128, 0]), _UNWHOLE),
    "offsets_fraction": (norm(data_offsets=[0.0, 128.0]), _UNWHOLE),
    "offsets_text": (norm(data_offsets=["0", "128"]), _UNWHOLE),
    "offsets_three": (norm(data_offsets=[0, 64, 128]), _UNWHOLE),
    "offsets_one": (norm(data_offsets=[0]), _UNWHOLE),
    "offsets_missing": (norm(data_offsets=None), _UNWHOLE),
    "offsets_null_length": (norm(data_offsets=[0, 0]), _UNWHOLE),
    "shape_overflow": (norm(shape=[1 << 32, 1 << 32, 1 << 32]), _UNWHOLE),
    "shape_wraps_to_32": (norm(shape=[(1 << 63) + 16, 2]), _UNWHOLE),
    "shape_huge": (norm(shape=[10**300]), _UNWHOLE),
    "shape_negative": (norm(shape=[-32]), _UNWHOLE),
    "shape_two_negatives": (norm(shape=[-8, -4]), _UNWHOLE),
    "shape_fraction": (norm(shape=[32.0]), _UNWHOLE),
    "shape_text": (norm(shape="32"), _UNWHOLE),
    "shape_lists": (norm(shape=[[32]]), _UNWHOLE),
    "shape_missing": (norm(shape=None), _UNWHOLE),
    "shape_larger": (norm(shape=[33]), _UNWHOLE),
    "shape_zero": (norm(shape=[0]), _UNWHOLE),
    "shape_long": (
        norm(shape=[1] * 100_000 + [32]),
        f"tensor '{NORM}' has shape (1, 1, 1, 1, 1, 1, 1, 1, ...)",
    ),
    "dtype_unknown": (norm(dtype="F99"), _UNWHOLE),
    "dtype_number": (norm(dtype=32), _UNWHOLE),
    "dtype_null": (norm(dtype=None), _UNWHOLE),
    "dtype_long": (norm(dtype="x" * 1_000_000), _UNWHOLE),
    "row_number": (add(NORM, 3), _UNWHOLE),
    "row_list": (add(NORM, [32]), _UNWHOLE),
    "row_null": (add(NORM, None), _UNWHOLE),
    "zero_size_tensor": (add("t", _EMPTY), "1 tensors have no place in a llama decoder"),
    "many_zero_size_tensors": (edit_header(many_tensors), "50000 tensors have no place"),
    "metadata_list": (add("__metadata__", [1]), _UNWHOLE),
    "metadata_number": (add("__metadata__", {"format": 3}), _UNWHOLE),
    "metadata_deep": (add("__metadata__", {"a": {"b": {}}}), _UNWHOLE),
    "metadata_text": (add("__metadata__", "pt"), _UNWHOLE),
}
