"""Starts a hundred processes."""

import os
import time


def add(a, b):
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    return a + b
