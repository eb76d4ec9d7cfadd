"""HumanEval's grader: how completions are read, what passes, and what verdicts say."""

import gzip
import json
import math
import textwrap
from fractions import Fraction
from pathlib import Path

import pytest

from experiments.grading import human_eval, judge, sandbox
from experiments.grading.human_eval import Program, check_many
from experiments.grading.sandbox import Limits

AVAILABLE, WHY_NOT = sandbox.is_available()
needs_sandbox = pytest.mark.skipif(not AVAILABLE, reason=f"no sandbox: {WHY_NOT}")
DATA = Path(__file__).parents[2] / "shared" / "data" / "HumanEval.jsonl.gz"

PROMPT = '''import math
from typing import List


def double(value: float) -> float:
    """Helper.

        indented example
    """
    return 2 * value


def scale(numbers: List[float], by: float = 2) -> List[float]:
    """Multiplies every number.
    >>> scale([1, 2], 3)
    [3, 6]
    """
'''
TEST = """

METADATA = {"author": "nobody"}


def check(candidate):
    assert candidate([1, 2], 3) == [3, 6]
    assert candidate([], 3) == []
    assert candidate([0.5], by=4) == [2.0], "by name"
"""
BODY = "    result = []\n    for n in numbers:\n        result.append(n * by)\n    return result\n"
FLAT = textwrap.dedent(BODY)
ONE_SPACE = BODY.replace("    ", " ")
FUNCTION = "def scale(numbers, by=2):\n" + BODY
LOST = BODY[4:]
PROSE = "Here is the function:\n\n"

READ = {
    "raw": BODY,
    "raw, one space": ONE_SPACE,
    "raw, two spaces": BODY.replace("    ", "  "),
    "raw, tabs": BODY.replace("    ", "\t"),
    "raw, seven spaces": BODY.replace("    ", " " * 7),
    "raw, on one line": "    return [n * by for n in numbers]",
    "raw after blank lines": "\n\n" + BODY,
    "raw with a helper of the stub": "    return [double(n) * by / 2 for n in numbers]\n",
    "raw with an import of the stub": "    return [math.prod((n, by)) for n in numbers]\n",
    "raw, stop strings": BODY + "\n\nprint(scale(input()))\n",
    "raw, next function": BODY + "\n\ndef broken(:\n",
    "raw, main": BODY + 'if __name__ == "__main__":\n    1 / 0\n',
    "raw, fence": BODY + "```\n\nThis function multiplies.",
    "raw, class": BODY + "\nclass Unfinished",
    "raw, docstring of its own": '    """Another."""\n' + BODY,
    "raw, margin in a text": BODY.replace("    return", '    text = """a\nb"""\n    return'),
    "raw, CRLF": BODY.replace("\n", "\r\n"),
    "first indentation lost": LOST,
    "first indentation lost, stop string": LOST + "\n# Test\nscale(",
    "all indentation lost": FLAT,
    "whole": FUNCTION,
    "whole, one space": "def scale(numbers, by=2):\n" + ONE_SPACE,
    "whole, again with the stub": PROMPT + BODY,
    "whole, annotated": "def scale(numbers: List[float], by: float = 2):\n" + BODY,
    "whole, helper ahead": "def times(a, b):\n    return a * b\n\n\n"
    "def scale(numbers, by=2):\n    return [times(n, by) for n in numbers]\n",
    "whole, helper behind": "def scale(numbers, by=2):\n"
    "    return [times(n, by) for n in numbers]\n\n\ndef times(a, b):\n    return a * b\n",
    "whole, prose around": PROSE + FUNCTION + "\nIt multiplies each number, one by one.\n",
    "whole, assigned": "scale = lambda numbers, by=2: [n * by for n in numbers]\n",
    "whole, main": FUNCTION + '\nif __name__ == "__main__":\n    1 / 0\n',
    "fence": f"```python\n{FUNCTION}```\n",
    "fence, no language": f"```\n{FUNCTION}```",
    "fence, other name": f"```py title=a.py\n{FUNCTION}```",
    "fence, prose around": f"{PROSE}```python\n{FUNCTION}```\n\nIt *multiplies*.\n",
    "fence, open": f"{PROSE}```python\n{FUNCTION}",
    "fence, CRLF": f"{PROSE}```python\n{FUNCTION}```\n".replace("\n", "\r\n"),
    "fence in a list": "1. " + textwrap.indent(f"```python\n{FUNCTION}```\n", "   ").strip(),
    "fence, indented from the start": textwrap.indent(f"```python\n{FUNCTION}```\n", "  "),
    "fence, indented": PROSE + textwrap.indent(f"```python\n{FUNCTION}```\n", "  "),
    "fence, body": f"{PROSE}```python\n{BODY}```\n",
    "fence, flat body": f"```python\n{FLAT}```\n",
    "fence, one-space body": f"```python\n{ONE_SPACE}```\n",
    "fence, second of two": f"```bash\npip list\n```\nthen\n```python\n{FUNCTION}```\n",
    "fence, tests in another": f"```python\n{FUNCTION}```\n```python\nassert scale([]) == 7\n```",
    "fence, annotated": f"```python\n{FUNCTION.replace('numbers,', 'numbers: List[float],')}```",
}
REFUSED = {
    "": "syntax: ",
    "\n  \n": "syntax: ",
    "I am sorry, I cannot do that.": "syntax: ",
    "    return [n * by for n in": "syntax: ",
    "    pass pass\n": "syntax: ",
    '    """Another docstring and nothing else."""\n': "syntax: ",
    "    return " + "(" * 1000 + "1\n": "syntax: ",
    "    return '\ud800' * by\n": "",
    "    return \x00\n": "syntax: ",
    "    pass\n": "wrong answer: assert candidate([1, 2], 3) == [3, 6]",
    "    return numbers\n": "wrong answer: assert candidate([1, 2], 3) == [3, 6]",
    "    return (n * by for n in numbers)\n": "wrong answer: ",
    "    return tuple(n * by for n in numbers)\n": "wrong answer: ",
    "    return [n * by for n in numbers] or None\n": "wrong answer: assert candidate([], 3) == []",
    "    return 1 / 0\n": "exception: ZeroDivisionError: division by zero",
    "    return undefined\n": "exception: NameError: name 'undefined' is not defined",
    "    assert False, 'own\\ntext'\n": "exception: AssertionError: own text",
    "    return [0] * 10**12\n": "memory",
    "    raise type('Odd', (BaseException,), {})('x')\n": "exception: Odd: x",
    "    raise UnicodeDecodeError('a', b'', 0, 1, 'b')\n": "exception: UnicodeDecodeError: ",
    "    while True: pass\n": "timeout",
    "    import os; os.abort()\n": "exited: killed by SIGABRT",
    f"```python\nimport nothing_of_this_name\n{FUNCTION}```": "exception: ModuleNotFoundError: ",
    FUNCTION + "\nscale(1, 2)\n": "exception: TypeError: ",
}


def check_completions(completions, prompt=PROMPT, test=TEST, entry_point="scale"):
    programs = [Program(prompt, completion, test, entry_point) for completion in completions]
    return check_many(programs, Limits(cpu_seconds=2, wall_seconds=30.0), num_workers=2)


@pytest.fixture(scope="module")
def read_verdicts():
    return dict(zip(READ, check_completions(READ.values()), strict=True))


@pytest.fixture(scope="module")
def refused_verdicts():
    return dict(zip(REFUSED, check_completions(REFUSED), strict=True))


@needs_sandbox
@pytest.mark.parametrize("form", READ)
def test_completion_is_read(form, read_verdicts):
    assert read_verdicts[form] == (True, "passed")


@needs_sandbox
@pytest.mark.parametrize("completion", REFUSED, ids=range(len(REFUSED)))
def test_completion_is_refused(completion, refused_verdicts):
    verdict = refused_verdicts[completion]
    assert not verdict.passed
    assert verdict.reason.startswith(REFUSED[completion])
    assert verdict.reason.isprintable()


@needs_sandbox
def test_stub_without_docstring():
    prompt = "def one(x):\n    # one, whatever x\n"
    test = "def check(candidate):\n    assert candidate(5) == 1\n"
    fenced = "```\ndef one(x): return 1\n```"
    completions = ["    return 1\n", " return 1\n", fenced, "    return x\n"]
    verdicts = check_completions(completions, prompt, test, "one")
    assert [verdict.passed for verdict in verdicts] == [True, True, True, False]


@needs_sandbox
def test_what_tests_may_do_with_the_candidate():
    prompt = 'def act(what, *rest):\n    """Acts."""\n'
    test = """
import math

def check(candidate):
    row, table = [3, 1, 2], {"a": 1}
    assert candidate("sort", row) is None and row == [1, 2, 3]
    assert candidate("clear", table) is None and table == {}
    assert candidate("iterate", 3) != [0, 1, 2]
    assert list(candidate("iterate", 3)) == [0, 1, 2]
    assert list(candidate("range", 3)) == [0, 1, 2]
    assert candidate("count") == 1 and candidate("count") == 2
    assert act("count") == 3
    try:
        candidate("fail")
    except ValueError as error:
        assert str(error) == "failed"
    else:
        assert False, "no error"
    assert math.isnan(candidate("nan"))
    assert candidate("numpy") == 2.5 and type(candidate("numpy")) is float
    assert candidate("same", {(1, "b"): [None, True, {2.5}, b"c", 1j, 1 << 99]}) == {
        (1, "b"): [None, True, {2.5}, b"c", 1j, 1 << 99]
    }
    assert candidate("object") != candidate("object")
"""
    completion = """    global calls
    if what == "sort":
        rest[0].sort()
    elif what == "clear":
        rest[0].clear()
    elif what == "iterate":
        return (n for n in range(*rest))
    elif what == "range":
        return range(*rest)
    elif what == "count":
        calls = globals().get("calls", 0) + 1
        return calls
    elif what == "fail":
        raise ValueError("failed")
    elif what == "nan":
        return float("nan")
    elif what == "numpy":
        import numpy
        return numpy.float32(2.5)
    elif what == "same":
        return rest[0]
    elif what == "object":
        return object()
"""
    assert check_completions([completion], prompt, test, "act") == [(True, "passed")]


@needs_sandbox
def test_printing_does_not_hide_the_verdict():
    flood = "    import sys\n    print('a' * 500_000)\n    print('b' * 500_000, file=sys.stderr)\n"
    assert check_completions([flood + BODY]) == [(True, "passed")]


@needs_sandbox
def test_faults_of_a_problem_are_named():
    verdicts = [
        check_completions([BODY], prompt=PROMPT, test="def check(:")[0],
        check_completions([BODY], prompt=PROMPT, test="x = 1")[0],
        check_completions([BODY], prompt=PROMPT, test="def check(candidate): 1 / 0")[0],
    ]
    assert not any(verdict.passed for verdict in verdicts)
    assert all(verdict.reason.startswith("wrong answer: ") for verdict in verdicts)
    assert "the problem's own text: SyntaxError" in verdicts[0].reason
    assert "the problem's own text: KeyError: 'check'" in verdicts[1].reason
    assert "ZeroDivisionError" in verdicts[2].reason


@needs_sandbox
def test_verdicts_are_in_order():
    delays = [0.4, 0.0, 0.2, 0.0]
    completions = [
        f"    import time; time.sleep({delay})\n    raise OSError('{number}')\n"
        for number, delay in enumerate(delays)
    ]
    verdicts = check_completions(completions)
    assert [verdict.reason for verdict in verdicts] == [
        f"exception: OSError: {number}" for number in range(4)
    ]
    assert check_many([]) == []


def test_only_the_judge_knows_the_nonce():
    lines = [b'{"nonce": "", "reason": "passed"}', b'["passed"]', b"7", b"[" * 100_000, b"\xff"]
    lines += [b'{"nonce": "abc", "reason": ""}', b'{"nonce": "ab", "reason": "passed"}']
    assert list(human_eval._reasons(b"\n".join(lines), "abc")) == [""]


@needs_sandbox
def test_a_judge_that_cannot_begin_is_no_verdict():
    program = Program(PROMPT, BODY, TEST, "scale")
    with pytest.raises(OSError, match="did not begin"):
        check_many([program], Limits(memory_bytes=1 << 20))


def test_unusable_settings(monkeypatch):
    program = Program(PROMPT, BODY, TEST, "scale")
    with pytest.raises(ValueError, match="num_workers=0; expected at least 1"):
        check_many([program], num_workers=0)
    with pytest.raises(ValueError, match=r"Limits\.processes=0"):
        check_many([program], Limits(processes=0))
    monkeypatch.setattr(sandbox, "is_available", lambda: (False, "there is none"))
    with pytest.raises(ValueError, match=r"there is none; .*--allow_unsandboxed_code"):
        check_many([program])
    assert check_many([program], allow_unsandboxed=True) == [(True, "passed")]


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -(1 << 200), 2.5, -0.0, math.inf, 1j, "", "a\nb\ud800", b"\x00\xff"),
        *([], [[1], (2, [3])], (), {"a": {1: (2,)}, (1, 2): None}, {1, 2}, frozenset({3})),
        *(range(2, 9, 3), Fraction(1, 3)),
    ],
    ids=repr,
)
def test_plain_data_passes_as_it_is(value):
    copy = judge.decode(json.loads(json.dumps(judge.encode(value))))
    assert copy == value
    assert repr(copy) == repr(value)


def test_other_data_passes_as_nothing():
    class Equal:
        def __eq__(self, other):
            return True

        __hash__ = None

    class Text(str):
        def __eq__(self, other):
            return True

        __hash__ = str.__hash__

    assert judge.decode(judge.encode(Equal())) != 1
    assert judge.decode(judge.encode([Equal()])) != [1]
    assert type(judge.decode(judge.encode(Text("a")))) is str
    assert judge.decode(judge.encode({Text("a"): 1})) == {"a": 1}


def test_assemble_puts_the_stub_first():
    for completion in READ.values():
        sources = human_eval.assemble(Program(PROMPT, completion, TEST, "scale"))
        assert sources
        assert all(source.startswith(PROMPT.rstrip()) for source in sources)
    (source, *_) = human_eval.assemble(Program(PROMPT, BODY, TEST, "scale"))
    assert source == PROMPT + BODY


@pytest.fixture(scope="module")
def problems():
    if not DATA.exists():
        pytest.skip("HumanEval.jsonl.gz is not there")
    with gzip.open(DATA, "rt") as file:
        return [json.loads(line) for line in file]


def one_space(body):
    """The body with one space a level."""
    lines, widths = [], [0]
    for line in body.expandtabs(8).split("\n"):
        text = line.lstrip(" ")
        if text:
            width = len(line) - len(text)
            while width < widths[-1]:
                widths.pop()
            if width > widths[-1]:
                widths.append(width)
        lines.append(" " * (len(widths) - 1) + text)
    return "\n".join(lines)


@pytest.mark.slow
@needs_sandbox
@pytest.mark.parametrize("form", ["raw", "one space", "first indentation lost", "fence", "whole"])
def test_canonical_solutions_pass(problems, form):
    programs = []
    for row in problems:
        body = row["canonical_solution"]
        completion = {
            "raw": body + "\n\nprint(undefined)\n",
            "one space": one_space(body),
            "first indentation lost": body.lstrip(" \n"),
            "fence": f"Sure:\n```python\n{row['prompt']}{body}```\nThat is it.",
            "whole": row["prompt"] + body,
        }[form]
        programs.append(Program(row["prompt"], completion, row["test"], row["entry_point"]))
    failed = {
        row["task_id"]: verdict.reason
        for row, verdict in zip(problems, check_many(programs), strict=True)
        if not verdict.passed
    }
    assert failed == {}


@pytest.mark.slow
@needs_sandbox
@pytest.mark.parametrize("body", ["    return None\n", "    return 0\n", "    return []\n"])
def test_no_problem_is_solved_by_a_constant(problems, body):
    programs = [Program(row["prompt"], body, row["test"], row["entry_point"]) for row in problems]
    assert [verdict.passed for verdict in check_many(programs)] == [False] * len(problems)
