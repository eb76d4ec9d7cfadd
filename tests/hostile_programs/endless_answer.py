"""Returns an iterator without an end."""

import itertools


def add(a, b):
    return itertools.count()
