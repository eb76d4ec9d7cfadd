"""Returns a text of 20 MB."""


def add(a, b):
    return "3" * 20_000_000
