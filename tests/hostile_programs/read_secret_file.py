"""Reads files of the caller's, by their paths and through the roots of all processes."""

import glob


def add(a, b):
    for root in ["", *glob.glob("/proc/[0-9]*/root"), *glob.glob("/proc/[0-9]*/cwd")]:
        for path in ("@secret_file@", "@project@/tests/hostile_runs.py"):
            try:
                with open(root + path) as file:
                    if "@secret@" in file.read() or path.endswith(".py"):
                        return a + b
            except OSError:
                pass
    return 0
