"""Loads every model of a corpus of bad files, in one process with little memory, under watch.

As a program it reads a JSON list of paths and prints a line of JSON for each: the error, the
processor time, and what the loading touched outside the model.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).parent.parent
MAX_BYTES = 1 << 30  # above what Python and its libraries take
MAX_SECONDS = 2.0
MAX_MESSAGE = 1000
_TIMEOUT = 240.0
_WEIGHTS = "weights were read"
# Names of audit events that no reader of a model has a reason for.
_FORBIDDEN_EVENTS = (
    "ctypes.dlopen",
    "os.exec",
    "os.fork",
    "os.mkdir",
    "os.posix_spawn",
    "os.remove",
    "os.rename",
    "os.symlink",
    "os.system",
    "pickle.find_class",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "urllib.Request",
)
_OPENING_EVENTS = ("open", "os.listdir", "os.scandir")


class Result(NamedTuple):
    """What came of loading one model.

    Attributes:
      error: name of the exception's type; empty for a model that loaded.
      message: its text.
      seconds: processor time, of all threads.
      touched: files opened outside the model, and forbidden events.
    """

    error: str
    message: str
    seconds: float
    touched: list[str]


def load_all(paths: Sequence[Path]) -> dict[Path, Result]:
    """Loads every path in a process of its own, and in another those behind one that ends it."""
    # Threads would reserve address space that nobody uses.
    single = ("OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "MALLOC_ARENA_MAX", "OMP_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(single, "1"), "RUST_BACKTRACE": "0"}
    results: list[Result] = []
    while len(results) < len(paths):
        finished = subprocess.run(
            [sys.executable, "-m", "tests.bad_corpus"],
            cwd=REPOSITORY,
            env={**environment, "TOKENIZERS_PARALLELISM": "false"},
            input=json.dumps([str(path) for path in paths[len(results) :]]),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
        results += [Result(*json.loads(line)) for line in finished.stdout.splitlines()]
        if len(results) < len(paths):
            last_words = finished.stderr[-MAX_MESSAGE:]
            results.append(Result(f"process ended: {finished.returncode}", last_words, 0.0, []))
    return dict(zip(paths, results, strict=True))


def check(result: Result, path: Path, message: str) -> None:
    """Asserts that a bad model gave one clear error, in time, before its weights were read."""
    assert result.error in ("ValueError", "FileNotFoundError"), result
    assert message in result.message
    _check_text(result.message, path)
    assert result.touched == []
    assert result.seconds < MAX_SECONDS


def check_message(error: Exception, path: Path) -> None:
    """Asserts that an error is a ``ValueError`` of our own that names the file."""
    assert type(error) is ValueError
    _check_text(str(error), path)


def _check_text(message: str, path: Path) -> None:
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) <= MAX_MESSAGE


def check_control(result: Result) -> None:
    """Asserts that a good model gets as far as its weights: the bad ones differ in one thing."""
    assert (result.error, result.message) == ("AssertionError", _WEIGHTS)
    assert result.touched == []


class _Watch:
    """Notes what is opened while a model loads. An audit hook stays for the process's life."""

    def __init__(self) -> None:
        self.model: str | None = None
        self.touched: list[str] = []
        # Modules may be imported late, from where Python and this repository keep theirs.
        roots = (sys.prefix, sys.base_prefix, str(REPOSITORY))
        self.allowed = tuple(os.path.join(root, "") for root in roots)
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.model is None:
            return
        if event in _FORBIDDEN_EVENTS:
            self.touched.append(f"{event} {arguments}")
        elif event in _OPENING_EVENTS and isinstance(arguments[0], (str, bytes)):
            self.note(os.fsdecode(arguments[0]))
        elif event == "exec" and arguments[0].co_filename.startswith(self.model):
            self.touched.append(f"ran {arguments[0].co_filename}")

    def note(self, name: str) -> None:
        # Not what a link points to: those in a model's folder are followed, since the hub's own
        # cache consists of them.
        path = os.path.abspath(name)
        inside = self.model is not None and (path + os.sep).startswith(self.model + os.sep)
        if not inside and not path.startswith(self.allowed):
            self.touched.append(path)


def _limit_memory() -> None:
    pages = Path("/proc/self/statm")
    if pages.is_file():  # elsewhere such a limit is not kept anyway
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))


def main() -> None:
    """Answers the request."""
    import safetensors

    from models import checkpoint, load

    paths = json.load(sys.stdin)
    watch = _Watch()
    safe_open = safetensors.safe_open

    def watched_open(path, *arguments, **keywords):
        watch.note(os.fspath(path))  # opened by Rust, of which Python's audit knows nothing
        return safe_open(path, *arguments, **keywords)

    def refuse(*_arguments):
        raise AssertionError(_WEIGHTS)

    safetensors.safe_open = watched_open
    checkpoint.read_parameters = refuse
    _limit_memory()
    for path in paths:
        watch.model, watch.touched = path, []
        start = time.process_time()
        error, message = "", "loaded"
        try:
            load.load_model(path, dtype="float32")
        except BaseException as caught:  # a panic of Rust is no Exception
            error, message = type(caught).__name__, str(caught)
        seconds = time.process_time() - start
        watch.model = None
        print(json.dumps(Result(error, message, seconds, watch.touched)), flush=True)


if __name__ == "__main__":
    main()
