"""Reads a secret in the environment of any process."""

import glob
import os


def add(a, b):
    texts = [str(os.environ)]
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            with open(path, errors="replace") as file:
                texts.append(file.read())
        except OSError:
            pass
    return a + b if any("@secret@" in text for text in texts) else 0
