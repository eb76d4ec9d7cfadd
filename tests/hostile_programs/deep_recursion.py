"""Calls itself a billion times."""

import sys

sys.setrecursionlimit(1 << 30)


def count(number):
    return 0 if number == 0 else 1 + count(number - 1)


def add(a, b):
    return a + b if count(1_000_000_000) else 0
