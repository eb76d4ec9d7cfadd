"""GGUF files that are broken, hostile or of a kind that is not supported: one clear error each."""

import json
import os
import random
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from models import gguf_header, gguf_reader, load
from tests import tiny_checkpoints
from tests.tiny_checkpoints import CONFIG, write_gguf


def gguf_bytes(
    num_tensors: int = 0, num_keys: int = 0, body: bytes = b"", version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + body


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: str = "t") -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dimensions + struct.pack("<IQ", kind, offset)


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


HOSTILE_HEADERS = {
    # name: (the file, part of the message)
    "empty": (b"", "empty"),
    "not_gguf": (b"PK\x03\x04" + bytes(64), "GGUF"),
    "only_magic": (b"GGUF", "version"),
    "old_version": (gguf_bytes(version=1), "version"),
    "big_endian": (gguf_bytes(version=3 << 24), "version"),
    "tensor_count": (gguf_bytes(num_tensors=1 << 62) + bytes(64), "tensors"),
    "key_count": (gguf_bytes(num_keys=1 << 63) + bytes(64), "metadata keys"),
    "array_of_2_to_40": (
        gguf_bytes(num_keys=1, body=key("a", 9, array(4, 1 << 40)) + bytes(64)),
        "needs 4398046511104 bytes",
    ),
    "string_array_of_2_to_40": (
        gguf_bytes(num_keys=1, body=key("a", 9, array(8, 1 << 40)) + bytes(64)),
        "needs",
    ),
    "array_overflow": (
        gguf_bytes(num_keys=1, body=key("a", 9, array(10, (1 << 64) - 1)) + bytes(64)),
        "needs",
    ),
    "many_empty_strings": (
        gguf_bytes(num_keys=1, body=key("a", 9, array(8, 1 << 22)) + bytes(8 << 22)),
        "more than 1048576 elements",
    ),
    "many_numbers": (
        gguf_bytes(num_keys=1, body=key("a", 9, array(0, 1 << 22)) + bytes(1 << 22)),
        "more than 1048576 elements",
    ),
    "many_strings_below_the_limit": (
        gguf_bytes(num_keys=1, body=key("a", 9, array(8, 1 << 20)) + bytes(8 << 20)),
        "general.architecture is None",
    ),
    "architecture_list": (
        gguf_bytes(num_keys=1, body=key("general.architecture", 9, array(4, 2, bytes(8)))),
        "general.architecture is [0, 0]",
    ),
    "nested_arrays": (
        gguf_bytes(num_keys=1, body=key("a", 9, array(9, 1, array(9, 1) * 99)) + bytes(64)),
        "array of arrays",
    ),
    "array_of_unknown": (gguf_bytes(num_keys=1, body=key("a", 9, array(77, 1))), "unknown type"),
    "long_string": (
        gguf_bytes(num_keys=1, body=key("a", 8, struct.pack("<Q", 1 << 61)) + bytes(64)),
        "needs",
    ),
    "not_utf8": (gguf_bytes(num_keys=1, body=key("a", 8, string(b"\xff\xfe"))), "UTF-8"),
    "unknown_type": (gguf_bytes(num_keys=1, body=key("a", 13, bytes(64))), "unknown type 13"),
    "key_twice": (gguf_bytes(num_keys=2, body=key("a", 0, b"\1") * 2), "twice"),
    "alignment_zero": (
        gguf_bytes(num_keys=1, body=key("general.alignment", 4, bytes(4))),
        "alignment",
    ),
    "alignment_text": (
        gguf_bytes(num_keys=1, body=key("general.alignment", 8, string("32"))),
        "alignment",
    ),
    "dimensions": (
        gguf_bytes(num_tensors=1, body=string("t") + struct.pack("<I", 1 << 31) + bytes(64)),
        "dimensions",
    ),
    "shape_overflow": (
        gguf_bytes(num_tensors=1, body=tensor((1 << 32, 1 << 32)) + bytes(64)),
        "beyond the end",
    ),
    "offset_overflow": (
        gguf_bytes(num_tensors=1, body=tensor((4,), offset=(1 << 64) - 32) + bytes(64)),
        "beyond the end",
    ),
    "offset_unaligned": (
        gguf_bytes(num_tensors=1, body=tensor((4,), offset=4) + bytes(128)),
        "aligned",
    ),
    "tensors_overlap": (
        gguf_bytes(
            num_tensors=2, body=tensor((16,), name="a") + tensor((16,), name="b") + bytes(256)
        ),
        "overlaps",
    ),
    "tensor_twice": (gguf_bytes(num_tensors=2, body=tensor((1,)) * 2 + bytes(256)), "twice"),
    "tensor_kind": (
        gguf_bytes(num_tensors=1, body=tensor((4,), kind=999) + bytes(64)),
        "quantisation type 999",
    ),
    "ragged_blocks": (
        gguf_bytes(num_tensors=1, body=tensor((33,), kind=8) + bytes(128)),
        "multiple of 32",
    ),
    "no_architecture": (gguf_bytes(), "general.architecture is None"),
}

HEADER_PROGRAM = """
    import json, resource, sys, time
    from pathlib import Path
    from models import gguf_header, gguf_reader

    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), int(sys.argv[2])))
    found = {}
    for path in sorted(Path(sys.argv[1]).glob("*.gguf")):
        start = time.process_time()
        try:
            gguf_reader.read_config(gguf_header.read_header(path))
            message = "no error"
        except ValueError as error:
            message = str(error)
        found[path.stem] = message, time.process_time() - start
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def hostile_results(tmp_path_factory):
    """Reads every hostile header in a process that cannot have more than 1 GB of its own."""
    folder = tmp_path_factory.mktemp("hostile")
    for name, (data, _) in HOSTILE_HEADERS.items():
        (folder / f"{name}.gguf").write_bytes(data)
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HEADER_PROGRAM), str(folder), str(1 << 30)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return folder, json.loads(finished.stdout)


@pytest.mark.parametrize("name", HOSTILE_HEADERS)
def test_hostile_gguf_header(hostile_results, name):
    folder, results = hostile_results
    message, seconds = results[name]
    assert HOSTILE_HEADERS[name][1] in message
    assert str(folder / f"{name}.gguf") in message
    assert seconds < 2


def test_truncated_gguf_is_refused_at_every_length(tmp_path):
    data = write_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "part.gguf"
    lengths = {*range(0, 200, 7), *range(200, len(data), len(data) // 100), len(data) - 1}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"part\.gguf"):
            gguf_header.read_header(path)


def test_corrupt_gguf_gives_no_other_error(tmp_path):
    """Flipped bytes are refused or harmless; nothing but ValueError comes out."""
    data = write_gguf(tmp_path / "whole.gguf").read_bytes()
    weights_start = min(
        info.offset for info in gguf_header.read_header(tmp_path / "whole.gguf").tensors.values()
    )
    path = tmp_path / "flipped.gguf"
    dice = random.Random(0)
    messages = []
    for _ in range(300):
        flipped = bytearray(data)
        for _ in range(dice.choice([1, 4])):
            flipped[dice.randrange(weights_start)] = dice.choice([0, 1, 127, 255])
        path.write_bytes(flipped)
        try:
            gguf_reader.read_gguf(path, np.dtype(np.float32))
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 30
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma3"}, "'gemma3'; supported are llama"),
        ({"pre": "default"}, "tokenizer.ggml.pre is 'default'"),
        ({"pre": "llama-bpe"}, "expected 'smollm' or 'qwen2'"),
        ({"extra": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type is 'yarn'"),
        ({"extra": {"llama.rope.scaling.factor": 4.0}}, "llama.rope.scaling.factor is 4.0"),
        ({"extra": {"llama.attention.sliding_window": 512}}, "sliding_window is 512"),
        ({"extra": {"llama.expert_count": 8}}, "llama.expert_count is 8"),
        ({"extra": {"split.count": 2}}, "split.count is 2"),
        ({"extra": {"llama.attention.key_length": 6}}, "expected the head size, 6"),
        ({"extra": {"tokenizer.ggml.eot_token_id": 5000}}, "end-of-sequence id 5000"),
        ({"leave_out": ("blk.1.ffn_up.weight",)}, "'blk.1.ffn_up.weight' is missing"),
        ({"leave_out": ("token_embd.weight",)}, "'token_embd.weight' is missing"),
        ({"config": {**CONFIG, "intermediate_size": 64}}, "has shape"),
        ({"config": {**CONFIG, "hidden_size": 64}}, "expected the head size, 16"),
        ({"config": {**CONFIG, "num_hidden_layers": 3}}, "missing"),
        ({"config": {**CONFIG, "num_hidden_layers": 4_000_000_000}}, "4000000000 layers"),
        ({"config": {**CONFIG, "num_hidden_layers": 1}}, "no place in a Llama-family"),
        ({"config": {**CONFIG, "num_key_value_heads": 3}}, "divide"),
        ({"config": {**CONFIG, "rope_theta": float("nan")}}, "rope.freq_base is nan"),
    ],
)
def test_unsupported_or_contradicting_gguf(tmp_path, monkeypatch, changes, message):
    path = tmp_path / "bad.gguf"
    weights = tiny_checkpoints.random_weights(CONFIG)
    write_gguf(path, weights=weights, **changes)
    monkeypatch.setattr(gguf_header, "read_tensor", forbidden)
    with pytest.raises(ValueError, match=r"bad\.gguf") as caught:
        load.load_model(path)
    assert message in str(caught.value)


def forbidden(*_arguments):
    raise AssertionError("a weight was read before the checks")
