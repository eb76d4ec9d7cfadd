r"""Compares mathematical answers: by their text where it tells, else in bounded processes.

math-verify's own timeout is an alarm, which works in the main thread only and does not interrupt a
long power; here each comparison has its own deadline on the wall clock, counted from when a process
takes it up and not from when it was queued, and a process that overruns is killed and replaced.
"""

import contextlib
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.grading import answer_text, math_rules

_ROOT = Path(__file__).parents[2]
_START_SECONDS = 120.0  # to import sympy, on a machine with much other work
_ATTEMPTS = 2  # a process may die of what is no fault of the answer


class Comparison(NamedTuple):
    """Whether two answers are equal; ``note`` says why they could not be compared, or is empty."""

    equal: bool
    note: str


class MathComparer:
    """Compares pairs of answers in ``num_workers`` processes, started when first needed."""

    def __init__(self, num_workers: int, seconds: float):
        """Sets the limits.

        Args:
          num_workers: processes, at least 1.
          seconds: wall time that one comparison may take.
        """
        self._num_workers = num_workers
        self._seconds = seconds
        self._workers: list[_Worker] = []

    def compare_many(self, pairs: Sequence[tuple[str, str]]) -> list[Comparison]:
        """Compares (gold, answer) pairs; the same pair is compared once.

        Args:
          pairs: the answers as found, LaTeX or text.

        Raises:
          ValueError: math-verify is not installed, or the processes cannot be started.
        """
        results: dict[tuple[str, str], Comparison] = {}
        waiting: deque[tuple[tuple[str, str], int]] = deque()
        for pair in dict.fromkeys(pairs):
            if len(pair[1]) > answer_text.LONGEST:
                results[pair] = Comparison(False, "answer too long")
                continue
            gold, answer = (answer_text.clean(text) for text in pair)
            verdict = math_rules.decide(gold, answer)
            if verdict is None:
                waiting.append((pair, 1))
            else:
                results[pair] = Comparison(verdict, "")
        if waiting:
            check_available()
            self._run(waiting, results)
        return [results[pair] for pair in pairs]

    def close(self) -> None:
        """Ends the processes."""
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _run(
        self,
        waiting: deque[tuple[tuple[str, str], int]],
        results: dict[tuple[str, str], Comparison],
    ) -> None:
        try:
            while len(self._workers) < min(self._num_workers, len(waiting)):
                self._workers.append(_Worker(self._seconds))
            while waiting or any(worker.job for worker in self._workers):
                for worker in self._workers:
                    if worker.ready and not worker.job and waiting:
                        worker.send(waiting.popleft())
                _wait(self._workers)
                for index, worker in enumerate(self._workers):
                    reply = worker.receive()
                    job = worker.job
                    if reply is None:
                        continue
                    worker.job = None
                    if job and (reply.note != _DIED or job[1] == _ATTEMPTS):
                        results[job[0]] = reply
                    elif job:
                        waiting.append((job[0], job[1] + 1))
                    elif reply.note == _DIED:
                        raise ValueError(
                            "the process that compares answers does not start; expected "
                            "`python -c 'import math_verify'` to work: pip install -e '.[evaluate]'"
                        )
                    if worker.dead and waiting:
                        self._workers[index] = _Worker(self._seconds)
                self._workers = [worker for worker in self._workers if not worker.dead]
        except BaseException:
            self.close()  # interrupted: no process may go on with a comparison
            raise


def check_available() -> None:
    """Raises ValueError where math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError(
            "answers in mathematics are compared by math-verify, which is not installed; expected "
            "it: pip install -e '.[evaluate]'"
        )


_DIED = "grader crashed"
_TIMEOUT = "timeout"


class _Worker:
    """One process and the comparison that it is at."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._buffer = b""
        self.ready = False
        self.dead = False
        self.job: tuple[tuple[str, str], int] | None = None
        path = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            # -P keeps the current folder off the path, where modules could hide others.
            [sys.executable, "-P", "-m", "experiments.grading.math_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
            start_new_session=True,  # an interrupt is for this process, which then ends that one
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self.output = self._process.stdin, self._process.stdout
        os.set_blocking(self.output.fileno(), False)
        self.deadline = time.monotonic() + _START_SECONDS

    def send(self, job: tuple[tuple[str, str], int]) -> None:
        """Starts a comparison."""
        gold, answer = (answer_text.clean(text) for text in job[0])
        request = {"gold": gold, "answer": answer, "seconds": self._seconds}
        self.job = job
        self.deadline = time.monotonic() + self._seconds
        # Two short answers always fit into a pipe's buffer, so that this cannot block.
        with contextlib.suppress(OSError):  # it has died, which receive() finds
            self._input.write(json.dumps(request).encode() + b"\n")
            self._input.flush()

    def receive(self) -> Comparison | None:
        """Returns how the comparison ended, or None where it goes on or there is none."""
        if self.dead or (self.ready and not self.job):
            return None
        try:
            block = self.output.read()
        except OSError:
            block = b""
        self._buffer += block or b""
        line, newline, rest = self._buffer.partition(b"\n")
        if newline:
            self._buffer = rest
            reply = json.loads(line)
            if not self.ready:
                self.ready = True
                return None
            return Comparison(reply.get("equal", False), reply.get("error", ""))
        if block == b"":
            self.kill()
            return Comparison(False, _DIED)
        if time.monotonic() > self.deadline:
            starting = not self.ready
            self.kill()
            return Comparison(False, _DIED if starting else _TIMEOUT)
        return None

    def kill(self) -> None:
        """Ends the process, whatever it is doing."""
        self.dead = True
        self._process.kill()
        self._process.wait()
        for pipe in (self._input, self.output):
            with contextlib.suppress(OSError):  # bytes that the process never read
                pipe.close()


def _wait(workers: Sequence[_Worker]) -> None:
    """Returns when a process has written or a deadline has passed."""
    busy = [worker for worker in workers if worker.job or not worker.ready]
    if not busy:
        return
    with selectors.DefaultSelector() as selector:
        for worker in busy:
            selector.register(worker.output, selectors.EVENT_READ)
        earliest = min(worker.deadline for worker in busy)
        selector.select(max(0.0, earliest - time.monotonic()) + 0.01)
