"""Runs inside the sandbox: a problem's test in one process, the candidate's code in another.

``human_eval.py`` hands this file's text to ``sandbox.run``; it imports nothing of the project.
The test calls the candidate through a pipe, by which only plain data passes (numbers, text, lists,
...; what is neither becomes an object equal to nothing), and compares it in this process. So the
candidate's process cannot reach the comparison, the test, its expected values or the nonce that
marks the verdict: not by new builtins, objects that equal everything, frames, exits or printing.
It is forked before this process reads them, and this process cannot be traced or read by it. What
is left to it is to answer every call right, or to end the run, which is not a pass.
"""

import builtins
import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

_LONGEST_MESSAGE = 1 << 24  # bytes
_LONGEST_REASON = 300  # characters
_NOT_DUMPABLE = (4, 0)  # prctl: PR_SET_DUMPABLE, off


class Opaque:
    """Stands for a value that cannot pass; equals nothing but itself."""


class CandidateEndedError(Exception):
    """The candidate's process ended or broke off the talk."""


def encode(value: Any) -> list:
    """Plain data as nested lists that JSON keeps apart: ``[kind, content]``."""
    if value is None or isinstance(value, bool):
        return ["constant", value]
    if isinstance(value, int):
        return ["int", hex(value)]
    if isinstance(value, float):
        return ["float", float(value)]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, str):
        return ["str", str(value)]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(item) for item in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in value.items()]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    module = type(value).__module__.partition(".")[0]
    if module == "numpy" and getattr(value, "ndim", None) == 0:
        return encode(value.item())
    if module in ("fractions", "decimal"):
        return [module, str(value)]
    if hasattr(value, "__next__"):
        return ["iterator", [encode(item) for item in value]]
    return ["opaque", None]


def decode(message: Any) -> Any:
    """The value that ``encode`` made ``message`` of; ValueError or TypeError where it did not."""
    kind, content = message
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(decode(item) for item in content)
    if kind == "iterator":
        return iter([decode(item) for item in content])
    if kind == "dict":
        return {decode(key): decode(item) for key, item in content}
    if kind == "fractions":
        from fractions import Fraction

        return Fraction(content)
    if kind == "decimal":
        from decimal import Decimal

        return Decimal(content)
    if kind == "range":
        return range(*map(int, content))
    simple = {"int": lambda text: int(text, 16), "bytes": bytes.fromhex, "float": float}
    simple |= {"str": str, "constant": lambda value: value, "opaque": lambda _: Opaque()}
    simple["complex"] = lambda parts: complex(*map(float, parts))
    return simple[kind](content)


def write_message(file: Any, message: Any) -> None:
    """Writes one line of JSON."""
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def serve(requests: Any, replies: Any) -> None:
    """The candidate's process: loads its code, then answers calls for ever."""
    task = json.loads(requests.readline())
    namespace: dict[str, Any] = {}
    write_message(replies, attempt(lambda: load(task, namespace)))
    while line := requests.readline():
        call = json.loads(line)
        arguments, named = decode(call["arguments"]), decode(call["named"])

        def answer(arguments: list = arguments, named: dict = named) -> dict[str, Any]:
            value = encode(namespace[task["entry_point"]](*arguments, **named))
            # A test may look at what became of its arguments.
            return {"value": value, "arguments": encode(arguments)}

        write_message(replies, attempt(answer))


def attempt(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``action`` returns, or the exception that it raised."""
    try:
        return action()
    except BaseException as error:
        name, text = type(error).__name__, ""
        with contextlib.suppress(BaseException):
            text = str(error)[:_LONGEST_REASON]
        return {"raised": [name, text]}


def load(task: dict[str, Any], namespace: dict[str, Any]) -> dict[str, Any]:
    """Runs the first of the candidate's sources that holds the function."""
    first_error: SyntaxError | None = None
    for source in task["sources"]:
        try:
            code = compile_source(source, task["entry_point"])
        except SyntaxError as error:
            first_error = first_error or error
        else:
            namespace["__name__"] = "candidate"  # not __main__: examples under that test stay out
            exec(code, namespace)
            return {"value": ["constant", None]}
    raise first_error or SyntaxError("no source")


def compile_source(source: str, entry_point: str) -> Any:
    """Compiles a source; SyntaxError where it cannot be, or leaves the function without a body."""
    import ast

    try:
        tree = ast.parse(source)
        code = compile(source, "<candidate>", "exec")
    except (ValueError, OverflowError, RecursionError) as error:
        raise SyntaxError(str(error)) from None
    last = None
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == entry_point:
            last = node
        elif isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == entry_point for target in node.targets
        ):
            return code
    if last is None or all(isinstance(s, ast.Expr) and is_text(s.value) for s in last.body):
        raise SyntaxError(f"no body of {entry_point}")
    return code


def is_text(node: Any) -> bool:
    """Whether a syntax node is a string, such as a docstring."""
    return isinstance(getattr(node, "value", None), str)


class Candidate:
    """The candidate's function as the test calls it."""

    def __init__(self, requests: Any, replies: Any):
        self.raised = ""
        self._requests, self._replies = requests, replies

    def receive(self) -> dict[str, Any]:
        """The next reply; raises what the candidate raised, by the name of its type."""
        line = self._replies.readline(_LONGEST_MESSAGE)
        if not line.endswith(b"\n"):
            raise CandidateEndedError("its answer is too long" if line else "")
        try:
            reply = json.loads(line)
            raised = reply.get("raised")
            name, text = (str(part) for part in raised or ("", ""))
        except (AttributeError, TypeError, ValueError):
            raise CandidateEndedError("its answer is no answer") from None
        if raised is None:
            return reply
        self.raised = f"{name}: {text}" if text else name
        kind = getattr(builtins, name, None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            kind = RuntimeError
        error = RuntimeError(text)
        with contextlib.suppress(TypeError):  # some builtin exceptions take more than a text
            error = kind(text)
        raise error

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.raised = ""
        try:
            call = {"arguments": encode(list(arguments)), "named": encode(named)}
            write_message(self._requests, call)
        except OSError:
            raise CandidateEndedError("") from None
        reply = self.receive()
        try:
            value, after = decode(reply["value"]), decode(reply["arguments"])
            for old, new in zip(arguments, after, strict=True):
                if isinstance(old, list) and isinstance(new, list) and old != new:
                    old[:] = new
                elif isinstance(old, (dict, set)) and type(old) is type(new) and old != new:
                    old.clear()
                    old.update(new)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            raise CandidateEndedError("its answer is no answer") from None
        return value


def judge(task: dict[str, Any], candidate: Candidate) -> str:
    """Runs the test; "passed" or why not."""
    stage = ""
    try:
        candidate.receive()
        namespace: dict[str, Any] = {"__name__": "test"}
        stage = "the problem's own text: "
        try:
            prompt = compile(task["prompt"], "<prompt>", "exec")
        except SyntaxError:  # a stub without a docstring
            prompt = compile(task["prompt"] + "\n    pass\n", "<prompt>", "exec")
        exec(prompt, namespace)
        namespace[task["entry_point"]] = candidate
        exec(compile(task["test"], "<test>", "exec"), namespace)
        check = namespace["check"]
        stage = ""
        check(candidate)
    except CandidateEndedError as error:
        return f"exited: {error}" if str(error) else ""
    except BaseException as error:
        return explain(error, candidate.raised, stage, task["test"])
    return "passed"


def explain(error: BaseException, raised: str, stage: str, test: str) -> str:
    """Why a test that ended with ``error`` is not passed."""
    name = raised.partition(":")[0] if raised else type(error).__name__
    if name == "MemoryError":
        return "memory"
    if raised and name in ("SyntaxError", "IndentationError", "TabError"):
        return f"syntax: {raised}"
    if raised:
        return f"exception: {raised}"
    lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if "<test>" in at]
    line = test.splitlines()[lines[-1] - 1].strip() if lines and lines[-1] else ""
    detail = "" if isinstance(error, AssertionError) else f"{name}: {error} in "
    return f"wrong answer: {stage}{detail}{line}"


def explain_end(process: int) -> str:
    """Why there is no answer: how the candidate's process ended, awaited if need be."""
    _, status = os.waitpid(process, 0)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    limit, _ = resource.getrlimit(resource.RLIMIT_CPU)
    exhausted = 0 < limit <= usage.ru_utime + usage.ru_stime + 0.2
    if exhausted or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return "timeout"
    if os.WIFSIGNALED(status):
        return f"exited: killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"exited: with status {os.WEXITSTATUS(status)}"


def run_candidate(requests: int, replies: int) -> NoReturn:
    """The child: its input is empty, and all that it prints goes to standard error."""
    try:
        empty = os.open(os.devnull, os.O_RDONLY)
        os.dup2(empty, 0)
        os.dup2(2, 1)
        os.close(empty)
        serve(os.fdopen(requests, "rb"), os.fdopen(replies, "wb"))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def main() -> None:
    """Reads the task, lets the candidate load, runs the test and prints the verdict."""
    # First of all, so that the child never shares a process that it may read.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(*_NOT_DUMPABLE, 0, 0, 0)
    requests_out, requests_in = os.pipe()
    replies_out, replies_in = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(requests_in)
        os.close(replies_out)
        run_candidate(requests_out, replies_in)
    os.close(requests_out)
    os.close(replies_in)
    task = json.loads(sys.stdin.buffer.read())
    # Whatever fails ahead of this line is not the candidate's doing.
    os.write(1, json.dumps({"nonce": task["nonce"], "reason": ""}).encode() + b"\n")
    requests = os.fdopen(requests_in, "wb")
    with contextlib.suppress(OSError):
        write_message(requests, {name: task[name] for name in ("sources", "entry_point")})
    candidate = Candidate(requests, os.fdopen(replies_out, "rb"))
    reason = judge(task, candidate) or explain_end(process)
    verdict = {"nonce": task["nonce"], "reason": " ".join(reason.split())[:_LONGEST_REASON]}
    os.write(1, json.dumps(verdict).encode() + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
