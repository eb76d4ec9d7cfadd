"""Hostile programs against one small problem, beside a server and a process that must survive."""

import concurrent.futures
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments.grading import human_eval
from experiments.grading.sandbox import Limits

FOLDER = Path(__file__).parent / "hostile_programs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
PROMPT = 'def add(a, b):\n    """Returns the sum."""\n'
TEST = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
LIMITS = Limits(wall_seconds=30.0)  # for a busy machine
_BUSY = ("busy_loop", "busy_on_loading", "ignore_signals", "deep_recursion", "endless_answer")
_ENDED_BY_DEADLINE = ("sleep_for_ever", "stop_judge", "fork_for_ever")


class Surroundings(NamedTuple):
    """What hostile programs look for: each answers rightly only where its attack succeeds."""

    secret_file: Path
    port: int
    secret: str
    bystander: subprocess.Popen


class Result(NamedTuple):
    """A verdict and how long it took."""

    verdict: human_eval.Verdict
    seconds: float


@contextlib.contextmanager
def surroundings(secret_file: Path) -> Iterator[Surroundings]:
    """A secret in a file and in another process's environment, and a server that answers."""
    secret = f"secret-{os.getpid()}"
    secret_file.write_text(secret)
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], env={"TOKEN": secret}
    )
    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve, args=(server,), daemon=True).start()
    try:
        yield Surroundings(secret_file, server.getsockname()[1], secret, bystander)
    finally:
        server.close()
        bystander.kill()
        bystander.wait()


def _serve(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            with connection:
                connection.sendall(b"hello")


def program(name: str, around: Surroundings) -> human_eval.Program:
    """A hostile program as a completion."""
    text = (FOLDER / f"{name}.py").read_text()
    places = {
        "@secret_file@": str(around.secret_file),
        "@secret@": around.secret,
        "@port@": str(around.port),
        "@site_packages@": sysconfig.get_path("purelib"),
        "@project@": str(Path(__file__).parents[1]),
    }
    for place, value in places.items():
        text = text.replace(place, value)
    return human_eval.Program(PROMPT, text, TEST, "add")


def limits_of(name: str, limits: Limits) -> Limits:
    """The limits of one program: no longer than they need to be."""
    if name in _BUSY:
        return dataclasses.replace(limits, cpu_seconds=1)
    if name in _ENDED_BY_DEADLINE:
        return dataclasses.replace(limits, wall_seconds=3.0)
    return limits


def run_all(
    names: list[str],
    around: Surroundings,
    limits: Limits,
    num_workers: int,
    allow_unsandboxed: bool = False,
) -> dict[str, Result]:
    """Runs hostile programs side by side, those that go on for ever under shorter limits."""

    def run(name: str) -> Result:
        started = time.monotonic()
        programs = [program(name, around)]
        own_limits = limits_of(name, limits)
        (verdict,) = human_eval.check_many(programs, own_limits, 1, allow_unsandboxed)
        return Result(verdict, time.monotonic() - started)

    # Those that only the deadline ends go first, beside all others.
    order = sorted(names, key=lambda name: name not in _ENDED_BY_DEADLINE)
    with concurrent.futures.ThreadPoolExecutor(num_workers) as pool:
        return dict(zip(order, pool.map(run, order), strict=True))


def processes_with(words: str) -> list[int]:
    """The host's processes that have ``words`` in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if words.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def wait_until_gone(words: str, seconds: float = 5.0) -> list[int]:
    """As ``processes_with``, when none is left or the time is over."""
    deadline = time.monotonic() + seconds
    while (found := processes_with(words)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
