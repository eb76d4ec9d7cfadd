"""Compiles a source that is nested too deeply."""


def add(a, b):
    source = "-" * 1_000_000 + "1"
    return a + b if eval(source) else 0
