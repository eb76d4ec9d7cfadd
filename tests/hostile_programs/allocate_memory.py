"""Takes 2 GB."""


def add(a, b):
    block = bytearray(2 << 30)
    return a + b if len(block) else 0
