"""Never answers, and takes no processor time."""

import time


def add(a, b):
    while True:
        time.sleep(1000)
