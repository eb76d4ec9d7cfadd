"""Writes a file of 64 MB."""

import signal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def add(a, b):
    with open("large", "wb") as file:
        for _ in range(64):
            file.write(bytes(1 << 20))
    return a + b
