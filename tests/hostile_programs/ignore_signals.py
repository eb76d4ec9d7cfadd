"""Never answers, and minds no signal."""

import contextlib
import signal

for number in signal.valid_signals():
    with contextlib.suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_IGN)


def add(a, b):
    while True:
        pass
