"""Bad GGUF files, byte by byte: ``name -> (the file, part of the message)``.

``bad_gguf_models`` has files that are well-formed and still no model.
"""

import struct
from collections.abc import Mapping


def gguf_bytes(
    num_tensors: int = 0, num_keys: int = 0, body: bytes = b"", version: int = 3
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_keys) + body


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def key(name: str | bytes, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def tensor(
    shape: tuple[int, ...], kind: int = 0, offset: int = 0, name: str | bytes = "t"
) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return string(name) + dimensions + struct.pack("<IQ", kind, offset)


def array(kind: int, count: int, values: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + values


_MANY = array(0, 600_000, bytes(600_000))

CASES: Mapping[str, tuple[bytes, str]] = {
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
    # --- counts and lengths
    "magic_cut": (b"GGU", "the magic number needs 4 bytes"),
    "turned_magic": (b"FUGG" + gguf_bytes()[4:], "starts with b'FUGG'"),
    "ggml": (b"lmgg" + bytes(64), "starts with b'lmgg'"),
    "safetensors": (b"\x02\0\0\0\0\0\0\0{}" + bytes(64), "expected a GGUF file"),
    "no_counts": (gguf_bytes()[:8], "the number of tensors needs 8 bytes"),
    "new_version": (gguf_bytes(version=4), "version 0x4"),
    "huge_version": (gguf_bytes(version=(1 << 32) - 1), "version 0xffffffff"),
    "both_counts": (
        gguf_bytes(num_tensors=(1 << 64) - 1, num_keys=(1 << 64) - 1) + bytes(64),
        "a table of 18446744073709551615 tensors",
    ),
    "tensor_count_in_bounds": (
        gguf_bytes(num_tensors=1 << 17) + bytes(24 << 17),
        "131072 tensors are more than 65536",
    ),
    "key_count_in_bounds": (
        gguf_bytes(num_keys=1 << 17) + bytes(13 << 17),
        "131072 metadata keys are more than 65536",
    ),
    "one_key_too_many": (
        gguf_bytes(num_keys=2, body=key("a", 4, bytes(4))),
        "a table of 2 metadata keys",
    ),
    "key_cut": (gguf_bytes(num_keys=1, body=string("a" * 40)[:30]), "a metadata key needs 40"),
    "value_cut": (
        gguf_bytes(num_keys=1, body=key("abcdefgh", 10, bytes(4))),
        "needs 8 bytes and 4",
    ),
    "key_long": (
        gguf_bytes(num_keys=1, body=key("k" * 1_000_000, 4, bytes(4))),
        "of 1000000 characters",
    ),
    "key_not_utf8": (
        gguf_bytes(num_keys=1, body=key(b"\xff", 4, bytes(4)) + bytes(8)),
        "a metadata key is not UTF-8",
    ),
    "key_with_lines": (
        gguf_bytes(num_keys=1, body=key("a\n\x1b[2J", 99, bytes(8))),
        r"metadata 'a\n\x1b[2J' has the unknown type 99",
    ),
    "array_of_strings_cut": (
        gguf_bytes(num_keys=1, body=key("a", 9, array(8, 3, string("x") + string("y")))),
        "needs",
    ),
    "array_type_cut": (gguf_bytes(num_keys=1, body=key("a", 9, b"\4")), "needs 4 bytes"),
    "two_large_arrays": (
        gguf_bytes(num_keys=2, body=key("a", 9, _MANY) + key("b", 9, _MANY)),
        "metadata 'b' makes more than 1048576 elements in all",
    ),
    "long_text": (
        gguf_bytes(num_keys=1, body=key("a", 8, string(bytes(40 << 20)))),
        "metadata 'a' makes more than 33554432 bytes of text in all",
    ),
    "long_texts": (
        gguf_bytes(num_keys=1, body=key("a", 9, array(8, 40, string(bytes(1 << 20)) * 40))),
        "metadata 'a' makes more than 33554432 bytes of text in all",
    ),
    "type_huge": (
        gguf_bytes(num_keys=1, body=key("a", (1 << 32) - 1, bytes(8))),
        "unknown type 4294967295",
    ),
    "alignment_three": (
        gguf_bytes(num_keys=1, body=key("general.alignment", 4, struct.pack("<I", 3))),
        "general.alignment is 3, not a power of two",
    ),
    "alignment_negative": (
        gguf_bytes(num_keys=1, body=key("general.alignment", 5, struct.pack("<i", -32))),
        "general.alignment is -32",
    ),
    "alignment_list": (
        gguf_bytes(num_keys=1, body=key("general.alignment", 9, array(4, 1, bytes(4)))),
        "general.alignment is [0]",
    ),
    "alignment_huge": (
        gguf_bytes(
            num_tensors=1,
            num_keys=1,
            body=key("general.alignment", 10, struct.pack("<Q", 1 << 63)) + tensor((4,)),
        )
        + bytes(64),
        "beyond the end",
    ),
    # --- tensors
    "no_dimensions": (gguf_bytes(num_tensors=1, body=tensor(()) + bytes(64)), "0 dimensions"),
    "five_dimensions": (
        gguf_bytes(num_tensors=1, body=tensor((1, 1, 1, 1, 1)) + bytes(64)),
        "5 dimensions, not 1..4",
    ),
    "shape_product": (
        gguf_bytes(num_tensors=1, body=tensor(((1 << 64) - 1,) * 4) + bytes(64)),
        "beyond the end",
    ),
    "shape_wraps_to_16": (
        gguf_bytes(num_tensors=1, body=tensor((1 << 62, 4)) + bytes(64)),
        "beyond the end",
    ),
    "one_byte_short": (gguf_bytes(num_tensors=1, body=tensor((16,)) + bytes(70)), "beyond the end"),
    "offset_within_another": (
        gguf_bytes(
            num_tensors=2,
            body=tensor((16,), name="a") + tensor((1,), offset=32, name="b") + bytes(256),
        ),
        "tensor 'b' overlaps",
    ),
    "tensor_name_long": (
        gguf_bytes(num_tensors=1, body=tensor((4,), name="t" * 5000) + bytes(64)),
        "a tensor's name is 'ttt",
    ),
    "tensor_name_not_utf8": (
        gguf_bytes(num_tensors=1, body=string(b"\xc3(") + bytes(64)),
        "a tensor's name is not UTF-8",
    ),
    "tensor_kind_huge": (
        gguf_bytes(num_tensors=1, body=tensor((4,), kind=(1 << 32) - 1) + bytes(64)),
        "quantisation type 4294967295",
    ),
    "tensor_kind_removed": (
        gguf_bytes(num_tensors=1, body=tensor((32,), kind=4) + bytes(64)),
        "unknown quantisation type 4",
    ),
    "tensor_kind_integer": (
        gguf_bytes(num_tensors=1, body=tensor((4,), kind=26) + bytes(128)),
        "tensor 't' is stored as I32, which the gguf package cannot dequantise",
    ),
    "no_elements": (
        gguf_bytes(num_tensors=1, body=tensor((0,)) + bytes(64)),
        "general.architecture is None",
    ),
}
