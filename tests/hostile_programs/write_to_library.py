"""Writes into the interpreter's library, its packages and the project."""

import os
import sys


def add(a, b):
    folders = [os.path.dirname(os.__file__), "@site_packages@", "@project@", *sys.path]
    for folder in folders:
        try:
            with open(os.path.join(folder, "left_by_a_hostile_program.py"), "w"):
                return a + b
        except OSError:
            pass
    return 0
