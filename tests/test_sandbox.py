"""The sandbox: what hostile programs cannot do in it, can do outside, and when it refuses."""

import concurrent.futures
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from experiments.grading import sandbox, system_calls
from experiments.grading.sandbox import Limits
from tests import hostile_runs

AVAILABLE, WHY_NOT = sandbox.is_available()
needs_sandbox = pytest.mark.skipif(not AVAILABLE, reason=f"no sandbox: {WHY_NOT}")
SPACES = ["ipc", "mnt", "net", "pid", "uts"]
ANOTHER_USER = 61500
SYSTEM_PYTHON = Path("/usr/bin/python3.11")

# How each program must end: a sandbox that merely fails would end them otherwise.
REASONS = {
    "allocate_memory": "memory",
    "become_root": "wrong answer",
    "benign": "passed",
    "busy_loop": "timeout",
    "busy_on_loading": "timeout",
    "connect_to_host": "exception: ConnectionRefusedError",
    "daemon": "wrong answer",
    "deep_recursion": "",  # its time or its memory is over first
    "deep_source": "memory",
    "deepest_answer": "exception: RecursionError",
    "endless_answer": "",
    "equal_to_everything": "wrong answer",
    "exit_in_call": "exited: with status 0",
    "exit_on_loading": "exception: SystemExit: 0",
    "fill_disk": "wrong answer",
    "flood_output": "wrong answer",
    "fork_bomb": "exception: BlockingIOError",
    "fork_for_ever": "timeout",
    "ignore_signals": "timeout",
    "kill_everything": "exited: the test was ended",
    "kill_parent": "exited: the test was ended",
    "longest_answer": "exited: its answer is too long",
    "malformed_answers": "exited: its answer is no answer",
    "many_threads": "exception: RuntimeError: can't start new thread",
    "memory_of_no_process": "wrong answer",
    "object_equal_to_everything": "wrong answer",
    "own_namespace": "wrong answer",
    "patch_the_checker": "wrong answer",
    "print_verdicts": "exited: its answer is no answer",
    "raise_limits": "wrong answer",
    "read_environment": "wrong answer",
    "read_secret_file": "wrong answer",
    "read_shadow": "exception: FileNotFoundError",
    "read_the_test": "wrong answer",
    "segfault": "exited: killed by SIGSEGV",
    "sleep_for_ever": "timeout",
    "stop_judge": "timeout",
    "system_exit_in_call": "exception: SystemExit: 0",
    "trace_the_judge": "wrong answer",
    "write_large_file": "exception: OSError: [Errno 27]",
    "write_to_library": "wrong answer",
}


@pytest.fixture(scope="module")
def around(tmp_path_factory):
    with hostile_runs.surroundings(tmp_path_factory.mktemp("home") / "secret") as around:
        yield around


@pytest.fixture(scope="module")
def results(around):
    return hostile_runs.run_all(hostile_runs.NAMES, around, hostile_runs.LIMITS, num_workers=8)


def test_sandbox_works_where_bubblewrap_does():
    """The other tests skip without a sandbox: not because ours alone is broken."""
    trial = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    if shutil.which("bwrap") is None or subprocess.run(trial, check=False).returncode:
        pytest.skip("no bubblewrap that works here")
    assert AVAILABLE, WHY_NOT


def test_every_program_has_its_end():
    assert sorted(REASONS) == hostile_runs.NAMES
    assert len(REASONS) > 30


@needs_sandbox
@pytest.mark.parametrize("name", hostile_runs.NAMES)
def test_hostile_programs_are_contained(name, results, around):
    verdict, seconds = results[name]
    assert verdict.passed == (name == "benign"), verdict
    assert verdict.reason.startswith(REASONS[name])
    assert "\n" not in verdict.reason
    assert len(verdict.reason) <= 300
    assert seconds < hostile_runs.limits_of(name, hostile_runs.LIMITS).wall_seconds + 5
    assert around.bystander.poll() is None
    assert around.secret_file.read_text() == around.secret
    assert not list(Path(os.__file__).parent.glob("left_by*"))


@pytest.fixture
def copy_for_another_user():
    """The grader and the hostile programs, in a folder that another user can read."""
    folder = Path(tempfile.mkdtemp())
    root = Path(__file__).parents[1]
    shutil.copytree(root / "experiments" / "grading", folder / "experiments" / "grading")
    shutil.copytree(hostile_runs.FOLDER, folder / "tests" / hostile_runs.FOLDER.name)
    shutil.copy(hostile_runs.__file__, folder / "tests")
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
        os.chown(path, ANOTHER_USER, ANOTHER_USER)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.slow
@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="no interpreter that another user can read")
def test_hostile_programs_of_another_user_are_contained(copy_for_another_user, around):
    """Root starts the sandbox without a user namespace, others with one: here the others."""
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom tests import hostile_runs\n"
        "names = [name for name in hostile_runs.NAMES if name != 'benign']\n"
        "file, port, secret = sys.argv[1:]\n"
        "around = hostile_runs.Surroundings(Path(file), int(port), secret, None)\n"
        "results = hostile_runs.run_all(names, around, hostile_runs.LIMITS, 8)\n"
        "print(json.dumps({name: result.verdict for name, result in results.items()}))"
    )
    secret_file = copy_for_another_user / "secret"
    secret_file.write_text(around.secret)
    run = subprocess.run(
        [SYSTEM_PYTHON, "-c", code, secret_file, str(around.port), around.secret],
        cwd=copy_for_another_user,
        user=ANOTHER_USER,
        group=ANOTHER_USER,
        extra_groups=[],
        capture_output=True,
        check=False,
    )
    if run.returncode and b"No permissions to create new namespace" in run.stderr:
        pytest.skip("other users may not make namespaces here")
    assert run.returncode == 0, run.stderr.decode()
    verdicts = json.loads(run.stdout)
    assert len(verdicts) == len(REASONS) - 1
    for name, (passed, reason) in verdicts.items():
        assert not passed, name
        assert reason.startswith(REASONS[name]), name


@needs_sandbox
@pytest.mark.parametrize("name", ["daemon", "fork_bomb", "sleep_for_ever", "kill_everything"])
def test_no_process_outlives_its_run(name, around):
    mark = 16_000_000 + os.getpid()  # a limit as a name: it stands in the command line
    limits = Limits(wall_seconds=30.0, file_bytes=mark)
    hostile_runs.run_all([name], around, limits, 1)
    assert hostile_runs.wait_until_gone(f"RLIMIT_FSIZE={mark}") == []


@needs_sandbox
def test_no_process_outlives_a_killed_caller():
    mark = 17_000_000 + os.getpid()
    code = (
        "from experiments.grading import sandbox\n"
        f"limits = sandbox.Limits(wall_seconds=600, file_bytes={mark})\n"
        "sandbox.run('import time; time.sleep(600)', limits)\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while len(hostile_runs.processes_with(f"RLIMIT_FSIZE={mark}")) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    assert hostile_runs.wait_until_gone(f"RLIMIT_FSIZE={mark}") == []


def test_attacks_succeed_where_nothing_contains_them(around, monkeypatch):
    monkeypatch.setattr(sandbox, "is_available", lambda: (False, "switched off"))
    names = ["read_secret_file", "read_environment", "connect_to_host", "memory_of_no_process"]
    names += ["fork_bomb", "many_threads", "benign"]
    mark = 18_000_000 + os.getpid()
    limits = Limits(memory_bytes=1 << 32, wall_seconds=30.0, file_bytes=mark)
    results = hostile_runs.run_all(names, around, limits, 2, allow_unsandboxed=True)
    assert {name: result.verdict.reason for name, result in results.items()} == dict.fromkeys(
        names, "passed"
    )
    assert hostile_runs.wait_until_gone(f"RLIMIT_FSIZE={mark}") == []  # the fork bomb's


def test_limits_hold_without_a_sandbox(around, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "is_available", lambda: (False, "switched off"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    names = ["allocate_memory", "busy_loop", "ignore_signals", "sleep_for_ever"]
    names += ["write_large_file", "exit_in_call", "equal_to_everything", "segfault"]
    limits = hostile_runs.LIMITS
    results = hostile_runs.run_all(names, around, limits, 4, allow_unsandboxed=True)
    for name, (verdict, seconds) in results.items():
        assert verdict.reason.startswith(REASONS[name])
        assert not verdict.passed
        assert seconds < hostile_runs.limits_of(name, limits).wall_seconds + 5
    assert list(tmp_path.iterdir()) == []  # the programs' folders are gone


@needs_sandbox
def test_run_returns_what_was_printed():
    program = (
        "import sys\nprint(sys.stdin.read(), __name__)\nprint('no', file=sys.stderr)\nsys.exit(3)"
    )
    outcome = sandbox.run(program, stdin="wörter".encode())
    assert outcome.stdout.decode() == "wörter __main__\n"
    assert outcome.stderr == b"no\n"
    assert outcome.status == 3
    assert not outcome.timed_out
    assert 0 < outcome.seconds < Limits().wall_seconds


@needs_sandbox
def test_input_ends_at_once_by_default():
    assert sandbox.run("import sys; print(repr(sys.stdin.read()))").stdout == b"''\n"


@needs_sandbox
def test_streams_larger_than_any_pipe():
    program = (
        "import sys\nsys.stdout.write('a' * 50_000_000)\nsys.stdout.flush()\n"
        "text = sys.stdin.read()\nsys.stderr.write('b' * 50_000_000)\nsys.exit(len(text) % 251)"
    )
    outcome = sandbox.run(program, Limits(output_bytes=1000), stdin=b"c" * 3_000_000)
    assert outcome.status == 3_000_000 % 251
    assert outcome.stdout == b"a" * 1000
    assert set(outcome.stderr) == {ord("b")}
    assert len(outcome.stderr) < 1100


@needs_sandbox
def test_program_that_closes_its_streams_still_has_a_deadline():
    program = "import os, time\nos.close(1)\nos.close(2)\ntime.sleep(600)"
    outcome = sandbox.run(program, Limits(wall_seconds=1.0), stdin=b"x" * 1_000_000)
    assert outcome.timed_out
    assert outcome.seconds < 6


@needs_sandbox
def test_what_a_program_sees():
    program = (
        f"import json, os, sys\nspaces = {SPACES}\n"
        "host = ['/bin', '/home', '/sys', '/etc/passwd', '/usr/bin']\n"
        "print(json.dumps({'user': os.getuid(), 'group': os.getgroups(), 'folder': os.getcwd(),"
        "'spaces': [os.readlink('/proc/self/ns/' + name) for name in spaces],"
        "'names': sorted(os.environ), 'files': os.listdir(), 'path': sys.path,"
        "'processes': [name for name in os.listdir('/proc') if name.isdigit()],"
        "'host': [path for path in host if os.path.exists(path)]}))"
    )
    seen = json.loads(sandbox.run(program).stdout)
    assert seen["user"] > 0
    assert 0 not in seen["group"]
    assert seen["folder"] == "/tmp"
    assert set(seen["names"]) <= {"HOME", "LANG", "LC_CTYPE", "OPENBLAS_NUM_THREADS", "PWD"}
    assert seen["files"] == []
    assert not {os.readlink(f"/proc/self/ns/{name}") for name in SPACES} & set(seen["spaces"])
    assert not [path for path in seen["path"] if "site-packages" in path]
    assert len(seen["processes"]) == 2  # its own and bubblewrap's
    assert seen["host"] == []


@needs_sandbox
def test_runs_do_not_share_their_processes():
    """Each takes nearly all that one may have, at the same time."""
    program = (
        "import os, time\nfor _ in range(6):\n    if os.fork() == 0:\n        time.sleep(600)\n"
        "print(os.getuid())\ntime.sleep(0.3)"
    )
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda _: sandbox.run(program), range(8)))
    assert [outcome.status for outcome in outcomes] == [0] * 8
    if os.geteuid() == 0:
        assert len({outcome.stdout for outcome in outcomes}) == 8


@needs_sandbox
def test_surrogates_in_a_program_do_no_harm():
    outcome = sandbox.run("print('\ud800')")
    assert outcome.status == 1
    assert b"Error" in outcome.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("cpu_seconds", 0),
        ("cpu_seconds", 1.5),
        ("processes", -1),
        ("wall_seconds", float("nan")),
        ("wall_seconds", float("inf")),
        ("memory_bytes", True),
        ("memory_bytes", "512M"),
        ("file_bytes", 1 << 70),
    ],
)
def test_unusable_limits(name, value):
    with pytest.raises(ValueError, match=rf"Limits\.{name}={value!r}; expected a positive"):
        sandbox.run("", Limits(**{name: value}))


@needs_sandbox
def test_deadline_before_the_start():
    with pytest.raises(OSError, match=r"did not start: nothing in 0\.001 seconds"):
        sandbox.run("", Limits(wall_seconds=0.001))


def test_refuses_without_a_sandbox(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    sandbox.is_available.cache_clear()
    try:
        with pytest.raises(ValueError, match=r"not installed .*--allow_unsandboxed_code"):
            sandbox.run("print('ran')")
        assert sandbox.run("print('ran')", allow_unsandboxed=True).stdout == b"ran\n"
    finally:
        sandbox.is_available.cache_clear()


def test_unavailable_where_bubblewrap_fails(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    available, reason = sandbox.is_available.__wrapped__()
    assert not available
    assert "No permissions to create new namespace" in reason


def test_unavailable_on_unknown_machines(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "pdp11")
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/bwrap")
    assert not sandbox.is_available.__wrapped__()[0]


def filtered(program: bytes, architecture: int, number: int, argument: int = 0) -> int:
    """What a filter answers to a system call, as the kernel would run it."""
    data = struct.pack("<IIQQ", number, architecture, 0, argument)
    instructions = list(struct.iter_unpack("=HBBI", program))
    at = accumulator = 0
    while True:
        code, if_true, if_false, value = instructions[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("<I", data, value)
        elif code == 0x06:
            return value
        else:
            tests = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }
            at += if_true if tests[code] else if_false


@pytest.mark.parametrize(
    ("machine", "architecture", "clone", "unshare", "read"),
    [("x86_64", 0xC000003E, 56, 272, 0), ("aarch64", 0xC00000B7, 220, 97, 63)],
)
def test_filter(monkeypatch, machine, architecture, clone, unshare, read):
    monkeypatch.setattr("platform.machine", lambda: machine)
    program = system_calls.build_filter()
    assert program is not None
    allowed, not_permitted, not_implemented, killed = 0x7FFF0000, 0x50001, 0x50026, 0x80000000
    first_argument_only = 8  # struct seccomp_data: number, architecture, pointer, arguments
    assert len(program) % first_argument_only == 0
    refused = set(system_calls._REFUSED[machine].values())
    assert {unshare, 425, 447} <= refused
    for number in range(600):
        expected = not_permitted if number in refused else allowed
        expected = not_implemented if number == 435 else expected
        assert filtered(program, architecture, number) == expected
    assert filtered(program, architecture, clone, signal.SIGCHLD) == allowed
    assert filtered(program, architecture, clone, 0x003D0F00) == allowed  # a thread's flags
    assert filtered(program, architecture, clone, 0x10000000 | signal.SIGCHLD) == not_permitted
    assert filtered(program, architecture, 0x40000000 + read) == not_permitted
    assert filtered(program, architecture ^ 0x80000000, read) == killed
