"""Runs a program that nobody has read, such as one that a model wrote, and lives.

With bubblewrap a program gets: namespaces of its own (no network, no process but its own to see or
to signal), a read-only view of the interpreter, of its libraries and of numpy and of no other file,
a small /tmp that is gone afterwards, an empty environment, a user that owns nothing, no
capabilities, a filter on system calls, and limits. What it prints is read to the end and kept up to
a bound. When it ends or its time is over, every process that it started ends too.

What holds for one process is a limit of the kernel; ``processes`` of them may take as much each, so
that memory is bounded by ``processes * memory_bytes + scratch_bytes``. A hole in the kernel itself
is not guarded against. Programs get the standard library and numpy, as in the published harness.

The user is what makes the limit on processes bind: Linux never applies it to the host's root, not
even to root under another number in a user namespace, as ``bwrap --uid`` makes it. And another user
would not reach an interpreter below /root. So root starts bubblewrap without a user namespace, and
``confine.py`` becomes an unused user inside, after the files are in place; other users start it
with a user namespace, in which the kernel counts their processes apart.

Without bubblewrap nothing runs unless ``allow_unsandboxed``: then the limits on time, memory and
files hold, in a folder of its own; files, network and processes of the caller are open to it.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

from experiments.grading import confine, system_calls

_PACKAGES = "/packages"
_CONFINE = Path(confine.__file__)
# Numbers that systemd's table of users leaves free, and those where a container has few users.
_UNUSED_USERS, _FEW_UNUSED_USERS = range(1_879_048_192, 2_147_483_647), range(60_578, 61_184)
_next_user = itertools.count(secrets.randbelow(1 << 30))
_SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
_CHUNK = 1 << 16  # bytes


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one program may use; all positive.

    Attributes:
      cpu_seconds: processor time of each process.
      wall_seconds: time from start to end.
      memory_bytes: address space of each process; Python takes 20 MiB of it, numpy 200.
      file_bytes: the largest file.
      scratch_bytes: all files in /tmp together.
      open_files: of each process.
      processes: processes and threads together, the first included.
      output_bytes: how much of standard output is kept, and of standard error.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 15.0
    memory_bytes: int = 1 << 29
    file_bytes: int = 1 << 24
    scratch_bytes: int = 1 << 25
    open_files: int = 64
    processes: int = 8
    output_bytes: int = 1 << 16


class Outcome(NamedTuple):
    """How a program ended; says nothing about whether its work was right."""

    timed_out: bool  # it was ended at the wall deadline
    status: int  # exit code; -N or 128 + N where signal N ended it
    stdout: bytes  # as far as it was kept
    stderr: bytes
    seconds: float


def check_limits(limits: Limits) -> None:
    """Raises ValueError where a limit is not a positive number."""
    for name, value in dataclasses.asdict(limits).items():
        kinds = (int, float) if name == "wall_seconds" else (int,)
        if type(value) not in kinds or not 0 < value < 1 << 62:
            kind = "number" if name == "wall_seconds" else "integer"
            raise ValueError(f"Limits.{name}={value!r}; expected a positive {kind}")


@functools.cache
def is_available() -> tuple[bool, str]:
    """Whether the sandbox works here, tried by running a program, and if not, why."""
    if not sys.platform.startswith("linux"):
        return False, f"bubblewrap runs on Linux, and this is {sys.platform}"
    if shutil.which("bwrap") is None:
        return False, "bubblewrap is not installed (apt-get install bubblewrap)"
    if system_calls.build_filter() is None:
        return False, f"there is no system-call filter for {os.uname().machine}"
    probe = "import ctypes, json, os\nif not os.fork(): os._exit(0)\nos.wait()\nprint('works')"
    try:
        outcome = _run(probe, Limits(), b"", sandboxed=True)
    except OSError as error:
        return False, str(error)
    if outcome.stdout == b"works\n":
        return True, ""
    return False, f"a trial program failed in it: {_last_line(outcome.stderr)}"


def require(allow_unsandboxed: bool = False) -> None:
    """Raises ValueError where programs can be run in no sandbox and may not be run outside one."""
    available, reason = is_available()
    if not available and not allow_unsandboxed:
        raise ValueError(
            f"programs written by a model cannot be run safely: {reason}; expected a working "
            "bubblewrap, or --allow_unsandboxed_code to run them with your own rights"
        )


def run(
    program: str,
    limits: Limits | None = None,
    stdin: bytes = b"",
    allow_unsandboxed: bool = False,
) -> Outcome:
    """Runs a Python program in the sandbox, and waits for its end or its deadline.

    Args:
      program: its text; it sees the standard library and numpy.
      limits: what it may use; default ``Limits()``.
      stdin: what it may read; then, and by default at once, the input ends.
      allow_unsandboxed: where there is no sandbox, run it all the same, under limits alone.

    Returns:
      What it printed, as far as that was kept, and how it ended. No exit status is a sign of
      success: the program chooses it.

    Raises:
      ValueError: a limit is unusable, or there is no sandbox and ``allow_unsandboxed`` is False.
      OSError: the sandbox did not start.
    """
    limits = limits or Limits()
    check_limits(limits)
    require(allow_unsandboxed)
    return _run(program, limits, stdin, is_available()[0])


def _run(program: str, limits: Limits, stdin: bytes, sandboxed: bool) -> Outcome:
    text = program.encode("utf-8", "surrogatepass")
    payload = b"%d\n%s%s" % (len(text), text, stdin)
    with contextlib.ExitStack() as stack:
        if sandboxed:
            filter_file = stack.enter_context(tempfile.TemporaryFile())
            filter_file.write(system_calls.build_filter() or b"")
            filter_file.seek(0)
            command = _sandboxed_command(limits, filter_file.fileno())
            inherited, folder = (filter_file.fileno(),), "/"
        else:
            folder = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
            )
            command, inherited = [sys.executable, *_python_arguments(limits, None)], ()
        outcome = _communicate(command, payload, limits, inherited, folder)
    if not outcome.stdout.startswith(confine.CONFINED):
        late = f"nothing in {limits.wall_seconds} seconds" if outcome.timed_out else ""
        raise OSError(f"the sandbox did not start: {late or _last_line(outcome.stderr)}")
    return outcome._replace(stdout=outcome.stdout.removeprefix(confine.CONFINED))


def _sandboxed_command(limits: Limits, filter_file: int) -> list[str]:
    as_root = os.geteuid() == 0
    command = [shutil.which("bwrap") or "bwrap"]
    command += ["--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    command += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv"]
    command += ["--setenv", "OPENBLAS_NUM_THREADS", "1", "--setenv", "HOME", "/tmp"]
    command += ["--setenv", "LANG", "C.UTF-8", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if as_root:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    views = {path: path for path in _interpreter_paths()}
    views |= {str(path): f"{_PACKAGES}/{path.name}" for path in _package_paths()}
    # Left to itself, bubblewrap makes these folders for root alone.
    inner = (Path(path) for path in (*views.values(), *_DEVICES))
    for folder in sorted({str(parent) for path in inner for parent in path.parents}):
        command += ["--perms", "0755", "--dir", folder]
    for device in _DEVICES:
        command += ["--dev-bind", device, device]
    for path, inside in views.items():
        command += ["--ro-bind-try", path, inside]
    # Mode 1777, for the user that the program becomes. What else bubblewrap made, its root among
    # it, lies in memory as well, and in a user namespace it would belong to the program.
    command += ["--perms", "1777", "--size", str(limits.scratch_bytes), "--tmpfs", "/tmp"]
    command += ["--proc", "/proc", "--remount-ro", "/", "--chdir", "/tmp"]
    command += ["--seccomp", str(filter_file), os.path.realpath(sys.executable)]
    user = _unused_user() if as_root else None
    return [*command, *_python_arguments(limits, user, sandboxed=True)]


def _unused_user() -> int:
    """A user's number for one run: runs that share one would share its processes."""
    with contextlib.suppress(OSError), open("/proc/self/uid_map") as file:
        first, _, count = map(int, file.readline().split())
        if first + count > _UNUSED_USERS.stop:
            return _UNUSED_USERS[next(_next_user) % len(_UNUSED_USERS)]
    return _FEW_UNUSED_USERS[next(_next_user) % len(_FEW_UNUSED_USERS)]


def _python_arguments(limits: Limits, user: int | None, sandboxed: bool = False) -> list[str]:
    settings: dict[str, int | str] = {
        "RLIMIT_CPU": limits.cpu_seconds,
        "RLIMIT_AS": limits.memory_bytes,
        "RLIMIT_FSIZE": limits.file_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_CORE": 0,
    }
    if sandboxed:  # outside, the kernel would count every process of the caller
        settings["RLIMIT_NPROC"] = limits.processes
    if user is not None:
        settings["user"] = user
    packages = _package_paths()
    if packages:
        settings["packages"] = _PACKAGES if sandboxed else str(packages[0].parent)
    arguments = [f"{name}={value}" for name, value in settings.items()]
    return ["-I", "-S", "-c", _CONFINE.read_text(encoding="utf-8"), *arguments]


@functools.cache
def _interpreter_paths() -> list[str]:
    """The interpreter itself, not the virtual environment around it, and what it loads."""
    paths = [os.path.realpath(sys.executable)]
    for prefix in {sys.base_prefix, sys.base_exec_prefix}:
        paths += [os.path.join(prefix, folder) for folder in ("lib", "lib64")]
    return [*dict.fromkeys([*_SYSTEM_LIBRARIES, *paths])]


@functools.cache
def _package_paths() -> list[Path]:
    """The folders of numpy and of its libraries, without their neighbours."""
    found = importlib.util.find_spec("numpy")
    if found is None or not found.submodule_search_locations:
        return []
    package = Path(found.submodule_search_locations[0])
    return [path for path in (package, package.parent / "numpy.libs") if path.is_dir()]


def _communicate(
    command: list[str], payload: bytes, limits: Limits, inherited: tuple[int, ...], folder: str
) -> Outcome:
    """Starts a command, feeds and drains it, and leaves no process of its session behind."""
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=inherited,
        start_new_session=True,
        cwd=folder,
        env={"OPENBLAS_NUM_THREADS": "1", "HOME": folder},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin, process.stdout, process.stderr:
        streams = _Streams(process.stdin, process.stdout, process.stderr, payload, limits)
        deadline = started + limits.wall_seconds
        try:
            while process.poll() is None and (left := deadline - time.monotonic()) > 0:
                if streams.are_open():
                    streams.transfer(min(left, 0.05))
                else:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(left)
            timed_out = process.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        # What it had printed lies in the pipes; a process that got away may go on filling them.
        while streams.are_open() and streams.transfer(0) and time.monotonic() < deadline + 1:
            pass
        streams.close()
    seconds = time.monotonic() - started
    stdout, stderr = map(bytes, streams.kept.values())
    return Outcome(timed_out, process.returncode, stdout, stderr, seconds)


class _Streams:
    """The three streams of a process: one is fed, two are drained; none ever blocks."""

    def __init__(
        self, stdin: IO[bytes], stdout: IO[bytes], stderr: IO[bytes], payload: bytes, limits: Limits
    ):
        self.kept = {stdout: bytearray(), stderr: bytearray()}
        self._stdin, self._payload = stdin, memoryview(payload)
        self._most = limits.output_bytes + len(confine.CONFINED)
        self._selector = selectors.DefaultSelector()
        for stream in (stdin, stdout, stderr):
            os.set_blocking(stream.fileno(), False)
        self._selector.register(stdin, selectors.EVENT_WRITE)
        self._selector.register(stdout, selectors.EVENT_READ)
        self._selector.register(stderr, selectors.EVENT_READ)

    def are_open(self) -> bool:
        """Whether anything may still be printed."""
        return any(stream in self._selector.get_map() for stream in self.kept)

    def transfer(self, seconds: float) -> bool:
        """Moves what can be moved, waiting up to ``seconds``; returns whether anything was."""
        ready = self._selector.select(seconds)
        for key, _ in ready:
            if key.fileobj is self._stdin:
                self._feed()
            else:
                self._drain(key.fileobj)
        return bool(ready)

    def close(self) -> None:
        self._selector.close()

    def _feed(self) -> None:
        try:
            self._payload = self._payload[os.write(self._stdin.fileno(), self._payload[:_CHUNK]) :]
        except BrokenPipeError:
            self._payload = self._payload[:0]
        if not self._payload:
            self._selector.unregister(self._stdin)
            self._stdin.close()

    def _drain(self, stream) -> None:
        chunk = os.read(stream.fileno(), _CHUNK)
        if not chunk:
            self._selector.unregister(stream)
        kept = self.kept[stream]
        kept += chunk[: self._most - len(kept)]


def _last_line(output: bytes) -> str:
    lines = output.decode("utf-8", "replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"
