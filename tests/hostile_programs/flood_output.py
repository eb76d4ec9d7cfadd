"""Prints 100 MB, and no sum."""

import sys


def add(a, b):
    for _ in range(50):
        sys.stdout.write("passed\n" * 150_000)
        sys.stderr.write("passed\n" * 150_000)
    return 0
