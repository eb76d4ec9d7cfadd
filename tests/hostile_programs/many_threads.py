"""Starts two hundred threads."""

import threading
import time


def add(a, b):
    for _ in range(200):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    return a + b
