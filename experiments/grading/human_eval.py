"""Grades HumanEval: a completion passes if the function that it makes satisfies the problem's test.

How a completion is read, decided by its text alone (``assemble``):

* Its first line with anything on it is indented: it continues the stub, as base models do, and ends
  ahead of the first of the published stop strings.
* It has a fenced block (``` with or without a language): the first block that defines the function,
  else the first block; a block that defines it stands for itself, any other continues the stub.
* A line of it begins the definition of the function: it stands for itself, if need be without what
  stands ahead of the code's first line, such as a sentence, and without what follows the code.
* Else it continues the stub, its first indentation having been lost.

A continuation may be indented by other widths than the stub, one space included, or by none: where
the stub with the text as it stands is not Python or leaves the function empty, it is indented anew.
The stub always goes first, for its imports and helpers.
"""

import concurrent.futures
import contextlib
import json
import re
import secrets
import signal
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from experiments.grading import judge, sandbox
from experiments.grading.sandbox import Limits

# The last is not in the paper but in its code.
STOP_STRINGS = (
    *("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\nassert", "\nimport", "\nfrom", "\n```"),
    "if __name__",
)
_FENCE = re.compile(
    r"^[ \t]*(?:[-*] +|\d+[.)] +)?```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL
)
_CODE_START = re.compile(r"^(?:def|async def|from|import|class|@)\b|^@", re.MULTILINE)
# Code at the margin, comments, closing brackets and names that are assigned to.
_CODE_LINE = re.compile(r"(?:def|async|from|import|class|if|for|while|try|with)\b|[@#)\]}]|\w+ *=")


class Program(NamedTuple):
    """A problem and what a model made of it."""

    prompt: str  # the stub: imports, helpers, signature, docstring
    completion: str
    test: str  # defines check(candidate)
    entry_point: str  # name of the function


class Verdict(NamedTuple):
    """Whether a program passed, and in one line why not."""

    passed: bool
    reason: str  # "passed", "timeout", "memory" or "syntax|wrong answer|exception|exited: ..."


def check_many(
    programs: Sequence[Program],
    limits: Limits | None = None,
    num_workers: int = 2,
    allow_unsandboxed: bool = False,
) -> list[Verdict]:
    """Runs programs against their tests, each in a sandbox of its own.

    Args:
      programs: what to check.
      limits: for each of them; default ``Limits()``.
      num_workers: how many run at the same time, at least 1.
      allow_unsandboxed: run them without a sandbox where there is none.

    Returns:
      A verdict for each program, in their order.

    Raises:
      ValueError: a setting is unusable, or there is no sandbox and ``allow_unsandboxed`` is False.
      OSError: a sandbox did not start.
    """
    if num_workers < 1:
        raise ValueError(f"num_workers={num_workers}; expected at least 1")
    limits = limits or Limits()
    sandbox.check_limits(limits)
    sandbox.require(allow_unsandboxed)

    def check(program: Program) -> Verdict:
        return _check(program, limits, allow_unsandboxed)

    pool = concurrent.futures.ThreadPoolExecutor(num_workers)
    try:
        return list(pool.map(check, programs))
    finally:  # after an error or an interrupt, what has not begun is not begun
        pool.shutdown(cancel_futures=True)


def _check(program: Program, limits: Limits, allow_unsandboxed: bool) -> Verdict:
    nonce = secrets.token_hex(16)
    task = {
        "nonce": nonce,
        "sources": assemble(program),
        "prompt": program.prompt,
        "test": program.test,
        "entry_point": program.entry_point,
    }
    outcome = sandbox.run(
        Path(judge.__file__).read_text(encoding="utf-8"),
        limits,
        stdin=json.dumps(task).encode(),
        allow_unsandboxed=allow_unsandboxed,
    )
    reasons = list(_reasons(outcome.stdout, nonce))
    if not reasons:
        raise OSError(f"a test did not begin: {outcome.stderr.decode('utf-8', 'replace')[-500:]}")
    if reasons[-1]:
        return Verdict(reasons[-1] == "passed", reasons[-1])
    if outcome.timed_out or outcome.status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        return Verdict(False, "timeout")
    return Verdict(False, f"exited: the test was ended, status {outcome.status}")


def _reasons(output: bytes, nonce: str) -> Iterator[str]:
    """What the judge said, by the nonce: "" when it began, then the verdict's reason."""
    for line in output.splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            message = json.loads(line)
            if message["nonce"] == nonce:
                yield str(message["reason"])


def assemble(program: Program) -> list[str]:
    """The sources that a completion may stand for, the likeliest first.

    Args:
      program: the problem and the completion.

    Returns:
      Sources, each with the stub first. The one to run is the first that compiles and gives the
      function a body; nothing is compiled here, since compilers, too, can be made to crash.
    """
    text = program.completion.replace("\r\n", "\n")
    first_line = next((line for line in text.split("\n") if line.strip()), "")
    if first_line[:1] in (" ", "\t") and not first_line.strip().startswith("```"):
        return _continuations(program.prompt, _cut(text))
    blocks = [textwrap.dedent(block) for block in _FENCE.findall(text)]
    name = re.escape(program.entry_point)
    definition = re.compile(rf"^(?:(?:async )?def +{name}\b|{name} *=)", re.MULTILINE)
    for block in blocks:
        if definition.search(block):
            return [_join(program.prompt, block)]
    if blocks:
        return _continuations(program.prompt, blocks[0])
    if definition.search(text):
        start = _CODE_START.search(text) or definition.search(text)
        code = text[start.start() if start else 0 :]
        return [_join(program.prompt, source) for source in (text, code, _without_prose(code))]
    return _continuations(program.prompt, _cut(text.strip("\n")))


def _join(prompt: str, definition: str) -> str:
    """The stub, complete in itself, and a definition that takes its place."""
    return f"{prompt.rstrip()}\n{_indent(prompt)}pass\n\n{definition}"


def _indent(prompt: str) -> str:
    """What the stub's body is indented by: its docstring's, the last one's where there are more."""
    indents = re.findall(r"^([ \t]+)[a-zA-Z]?(?:\"{3}|'{3})\S", prompt + "\n", re.MULTILINE)
    indents += re.findall(r"^([ \t]+)[a-zA-Z]?(?:\"{3}|'{3})", prompt, re.MULTILINE)[-1:]
    return indents[-1] if indents else "    "


def _continuations(prompt: str, body: str) -> list[str]:
    """The stub with a body: as it stands, with its first line indented, all indented anew."""
    indent = _indent(prompt)
    first, *others = body.strip("\n").split("\n")
    lost = "\n".join([indent + first, *others])
    # The first line alone has lost its indentation, or the whole body has another one.
    anew = textwrap.indent(textwrap.dedent(body.expandtabs(8)), indent)
    return [prompt + body, f"{prompt}\n{lost}", f"{prompt}\n{anew}"]


def _cut(text: str) -> str:
    """Text ahead of the first stop string."""
    return text[: min((at for stop in STOP_STRINGS if (at := text.find(stop)) >= 0), default=None)]


def _without_prose(code: str) -> str:
    """Code up to the first line at the margin that is none."""
    lines = code.split("\n")
    for number, line in enumerate(lines):
        if line and line[0] not in " \t" and not _CODE_LINE.match(line):
            return "\n".join(lines[:number])
    return code
