"""Graders, held to verdicts of a human reader, and to deadlines under hostile answers."""

import importlib.util
import json
import pathlib
import sys
import threading
import time
import types

import pytest

from experiments.grading import answer_text, boxed, integers, letters, math_answers, math_rules
from experiments.grading.grader import Grade, Grader, same_answer_key
from experiments.grading.math_answers import Comparison, MathComparer
from experiments.tasks import Problem

ROWS = [
    json.loads(line)
    for line in (pathlib.Path(__file__).parent / "golden_answers.jsonl").read_text().splitlines()
]
NEVER_ENDS = "9^{9^{9^9}}"  # sympy does not come back
SECONDS = 3.0  # deadline of the hostile tests


def problem(gold: str, **details) -> Problem:
    return Problem("1", "question", gold, details)


@pytest.fixture(scope="module")
def comparer():
    comparer = MathComparer(num_workers=1, seconds=60.0)
    yield comparer
    comparer.close()


# Verdicts of a human reader


@pytest.fixture(scope="module")
def golden_grades():
    grades: list[Grade] = [Grade(None, False, "")] * len(ROWS)
    with Grader(seconds=60.0) as grader:
        for task in {row["task"] for row in ROWS}:
            places = [place for place, row in enumerate(ROWS) if row["task"] == task]
            found = grader.grade_many(
                task,
                [problem(ROWS[place]["gold"]) for place in places],
                # What never ends has a test of its own.
                [ROWS[place]["text"].replace(NEVER_ENDS, "6") for place in places],
            )
            for place, grade in zip(places, found, strict=True):
                grades[place] = grade
    return grades


@pytest.mark.parametrize("place", range(len(ROWS)), ids=lambda place: f"line {place + 1}")
def test_golden_answers(place, golden_grades):
    row, grade = ROWS[place], golden_grades[place]
    known_wrong = "known_wrong" in row
    assert (grade.correct == row["correct"]) != known_wrong, f"{row['why']}: {grade}"
    if not known_wrong and NEVER_ENDS not in row["text"]:
        assert grade.answer == row["answer"]
    assert not grade.correct or not grade.note


def test_golden_answers_are_many_and_of_both_kinds():
    assert len(ROWS) >= 150
    assert len({(row["task"], row["gold"], row["text"]) for row in ROWS}) == len(ROWS)
    assert sum("known_wrong" in row for row in ROWS) == 6
    for task in ("math500", "gsm8k", "aime", "gpqa_diamond"):
        verdicts = [row["correct"] for row in ROWS if row["task"] == task]
        assert min(verdicts.count(True), verdicts.count(False)) >= 4


# Long texts


HOSTILE_TEXTS = [
    r"\boxed{" * 15_000,
    r"\boxed{" * 15_000 + "}" * 15_000,
    r"\boxed1" * 15_000,
    r"\boxed{" + "a" + " " * 99_000 + "!}",
    "answer is" + "*" * 100_000,
    "answer is " * 10_000,
    "choice to " * 10_000,
    "option A is" + " " * 100_000,
    "1" * 100_000,
    "1," * 50_000,
    "#### " * 20_000,
    "\n" * 100_000 + "A",
    "(A) " * 30_000,
    "a{" * 50_000,
    "\0" * 100_000,
]


@pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=lambda text: text[:20].strip() or "blank")
def test_reading_a_long_text_takes_no_long_time(text):
    started = time.process_time()
    boxed.last_boxed(text)
    letters.find_letter(text)
    found = integers.find_number(text, last_number=True)
    integers.read_number(found or "")
    for task in ("gsm8k", "aime", "gpqa_diamond", "math500"):
        same_answer_key(task, text)
    assert time.process_time() - started < 5.0  # 0.3 s at most where this was written


@pytest.mark.parametrize("unit", ["(", "{", "\\frac", "\\text{", "1,", "a ", ", and ", "\\ ", "^"])
def test_cleaning_the_longest_answer_takes_no_long_time(unit):
    answer = (unit * answer_text.LONGEST)[: answer_text.LONGEST]
    started = time.process_time()
    for text in (answer, "1" + answer[1:], answer[:-1] + "}", answer[:-1] + ")"):
        math_rules.decide(answer_text.clean(text), answer_text.clean("5"))
        math_rules.key(text)
    assert time.process_time() - started < 5.0


# Keys for majority votes


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("math500", ["1/2", "0.5", r"\frac{1}{2}", r"\dfrac12", r"x=\frac{2}{4}", "$.50$"]),
        ("math500", ["1,-2", "-2, 1", r"\{1,-2\}", "-2 and 1"]),
        ("math500", ["(1, 2)", r"\left(1,2\right)", "(1.0,2)"]),
        ("math500", [r"\text{Evelyn}", "Evelyn", r"\textbf{evelyn}"]),
        ("math500", [r"10,\!080", "10080", r"10\,080", r"\$10,080"]),
        ("math500", [r"2 \sqrt{3}", r"2\sqrt3", r"2\sqrt{3}"]),
        ("math500", ["36", r"36^\circ", r"36 \text{ degrees}"]),
        ("gsm8k", ["72", "$72.00", r"72\text{ clips}", "60+12=72"]),
        ("aime", ["25", "025", r"25^\circ"]),
        ("gpqa_diamond", ["B", "(b)", r"\text{B}"]),
        ("humaneval", ["x"]),
    ],
)
def test_equal_answers_have_equal_keys(task, answers):
    assert len({same_answer_key(task, answer) for answer in answers}) == 1


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("math500", ["(1,2)", "[1,2]", "(1,2]", r"\{1,2\}", "12", "(2,1)", "(1,2,2)"]),
        ("math500", ["1/2", "2", "-1/2", "12", "1 1/2", "x", "x^2", "2x"]),
        ("math500", [r"\frac{1}{2} h", r"\frac{1}{2}", r"\pi r", r"\pi", "p - q", "q - p"]),
        ("math500", ["2 3", "23", r"2\cdot 3"]),
        ("gsm8k", ["72", "-72", "7.2", "two"]),
        ("gpqa_diamond", ["A", "B", "A and B"]),
    ],
)
def test_different_answers_have_different_keys(task, answers):
    assert len({same_answer_key(task, answer) for answer in answers}) == len(answers)


def test_keys_agree_with_the_human_reader():
    for row in ROWS:
        if row["answer"] and row["task"] in ("math500", "gsm8k", "aime") and not row["correct"]:
            gold, answer = (same_answer_key(row["task"], row[name]) for name in ("gold", "answer"))
            if gold == answer:  # units, bases and names are left out of keys, and nothing else is
                assert row["why"].startswith(
                    ("another unit", "another base", "half a percent")
                ) or (row["gold"] == "x=5")


# Processes


def test_text_alone_starts_no_process():
    comparer = MathComparer(num_workers=1, seconds=1.0)
    pairs = [("72", "72.0"), (r"\frac{1}{2}", "0.5"), (r"\text{east}", "west"), ("5", "x" * 1001)]
    assert comparer.compare_many(pairs) == [
        Comparison(True, ""),
        Comparison(True, ""),
        Comparison(False, ""),
        Comparison(False, "answer too long"),
    ]
    assert not comparer._workers


def test_hostile_answers_are_stopped_and_the_next_ones_graded():
    hostile = [NEVER_ENDS, "10^{10^{10}}!"]
    pairs = []
    for number, answer in enumerate(hostile, 1):
        pairs += [("5", answer), (rf"\sqrt{{{number}}}", rf"\sqrt{{{4 * number}}}/2"), ("x", "x+0")]
    comparer = MathComparer(num_workers=2, seconds=SECONDS)
    started = time.monotonic()
    found = comparer.compare_many(pairs)
    seconds = time.monotonic() - started
    comparer.close()
    assert [result.equal for result in found] == [False, True, True] * len(hostile)
    notes = {"", "timeout", "grader crashed", "MemoryError", "OverflowError", "RecursionError"}
    assert {result.note for result in found} <= notes
    assert found[0].note == "timeout"
    # Each hostile one at most twice its deadline, shared by two, and a start of processes.
    assert seconds < len(hostile) * 2 * SECONDS + 30


@pytest.mark.parametrize(
    "answer",
    [
        "(" * 400 + "5" + ")" * 400,
        "{" * 999,
        r"\sqrt{" * 140 + "x" + "}" * 140,
        r"\frac{1}{1+" * 80 + "x" + "}" * 80,
        "\0" * 1000,
        "x" * 1000,
        "1+" * 499 + "1",
        r"\\" * 500,
        "$" * 1000,
        "\ud800x\u202e",
        "x\n\r\ty",
        r"\begin{pmatrix}" * 60,
        r"\int_0^\infty e^{x^{x^x}} dx",
    ],
    ids=lambda answer: ascii(answer[:12]),
)
def test_odd_answers_end_in_a_verdict(answer, hostile_comparer):
    found = hostile_comparer.compare_many([("x+1", answer), ("x+1", "1+x")])
    assert not found[0].equal or answer.startswith("1+")
    assert found[1] == Comparison(True, "")


@pytest.fixture(scope="module")
def hostile_comparer():
    comparer = MathComparer(num_workers=1, seconds=SECONDS)
    yield comparer
    comparer.close()


def test_very_long_answers():
    with Grader(num_workers=1, seconds=SECONDS) as grader:
        text = rf"\boxed{{{'1+' * 50_000}1}}"
        for task in ("math500", "gsm8k", "aime"):
            (grade,) = grader.grade_many(task, [problem("5")], [text])
            assert not grade.correct
            assert grade.note == "answer too long"


def test_waiting_in_the_queue_is_not_counted():
    comparer = MathComparer(num_workers=1, seconds=SECONDS)
    honest = [(f"x+{number}", f"{number}+x") for number in range(1, 9)]
    pairs = [("5", NEVER_ENDS), *honest]
    found = comparer.compare_many(pairs)
    comparer.close()
    assert found[0] == Comparison(False, "timeout")
    assert found[1:] == [Comparison(True, "")] * len(honest)


def test_answers_are_not_mixed_up(comparer):
    pairs = [(f"x+{a}", f"{b}+x") for a in range(1, 8) for b in range(1, 8)]
    found = comparer.compare_many(pairs)
    assert [result.equal for result in found] == [a == b for a in range(7) for b in range(7)]
    assert comparer.compare_many([]) == []


def test_outside_the_main_thread(comparer):
    found = []
    pairs = [("x+1", "1+x"), ("x+1", "x+2")]
    thread = threading.Thread(target=lambda: found.extend(comparer.compare_many(pairs)))
    thread.start()
    thread.join(120)
    assert [result.equal for result in found] == [True, False]


def test_a_process_that_dies_is_replaced(comparer):
    assert comparer.compare_many([("x+1", "1+x")])[0].equal
    comparer._workers[0]._process.kill()
    comparer._workers[0]._process.wait()
    assert comparer.compare_many([("x+2", "2+x")]) == [Comparison(True, "")]


def test_an_interrupt_ends_the_processes(comparer, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    assert comparer.compare_many([("x+1", "1+x")])[0].equal
    (worker,) = comparer._workers
    monkeypatch.setattr(math_answers, "_wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        comparer.compare_many([("x+3", NEVER_ENDS)])
    assert worker._process.poll() is not None
    monkeypatch.undo()
    assert comparer.compare_many([("x+3", "x+4")]) == [Comparison(False, "")]


def test_processes_end_with_the_grader_and_with_their_parent():
    with Grader(num_workers=1) as grader:
        assert grader.grade_many("math500", [problem("x+1")], [r"\boxed{1+x}"])[0].correct
        (worker,) = grader._comparer._workers
        assert worker._process.poll() is None
    assert worker._process.poll() is not None

    orphan = math_answers._Worker(1.0)
    orphan._input.close()  # what the end of the parent does
    orphan._process.wait(timeout=60)
    orphan.kill()


def test_text_is_not_run_as_python(comparer, tmp_path):
    path = tmp_path / "made"
    code = f"open('{path}','w').close()"
    comparer.compare_many([("5", code), ("5", f"x={code}"), (code, "5"), ("5", f"1+{code}")])
    assert not path.exists()


def test_memory_of_a_comparison_is_bounded(comparer):
    pytest.importorskip("resource")
    assert comparer.compare_many([("x+1", "1+x")])[0].equal
    limits = pathlib.Path(f"/proc/{comparer._workers[0]._process.pid}/limits")
    if not limits.exists():
        pytest.skip("no /proc")
    (line,) = [line for line in limits.read_text().splitlines() if "address space" in line]
    assert line.split()[3] == str(1 << 30)


def test_without_math_verify(monkeypatch):
    def find_spec(name, *rest):
        return None if name == "math_verify" else importlib.util.find_spec(name, *rest)

    module = types.SimpleNamespace(util=types.SimpleNamespace(find_spec=find_spec))
    monkeypatch.setattr(math_answers, "importlib", module)
    with Grader() as grader:
        with pytest.raises(ValueError, match=r"pip install -e '\.\[evaluate\]'"):
            grader.check("math500")
        grader.check("gsm8k")
        with pytest.raises(ValueError, match=r"pip install -e '\.\[evaluate\]'"):
            grader.grade_many("math500", [problem("x+1")], [r"\boxed{1+x}"])
        assert grader.grade_many("math500", [problem("5")], [r"\boxed{5}"])[0].correct


def test_a_worker_that_does_not_start(monkeypatch):
    monkeypatch.setattr(math_answers.sys, "executable", "/bin/false")
    comparer = MathComparer(num_workers=1, seconds=1.0)
    with pytest.raises(ValueError, match="does not start"):
        comparer.compare_many([("x+1", "1+x")])
    assert not comparer._workers


# The grader


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="--grading_workers=0"):
        Grader(num_workers=0)
    for seconds in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="--grading_seconds"):
            Grader(seconds=seconds)
    with Grader() as grader, pytest.raises(ValueError, match="2 problems; expected 1"):
        grader.grade_many("aime", [problem("1")] * 2, ["1"])
    with Grader() as grader, pytest.raises(ValueError, match="--task=math; expected one of"):
        grader.grade_many("math", [], [])


def test_programs_go_to_the_sandbox_whole(monkeypatch):
    calls = []

    class Program(tuple):
        def __new__(cls, *fields):
            return super().__new__(cls, fields)

    def check_many(programs, **settings):
        calls.append((programs, settings))
        return [
            types.SimpleNamespace(passed=True, reason="passed"),
            types.SimpleNamespace(passed=False, reason="timeout"),
        ]

    stub = types.ModuleType("experiments.grading.human_eval")
    stub.Program, stub.check_many = Program, check_many  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    monkeypatch.setattr("experiments.grading.human_eval", stub, raising=False)
    asked = problem("", prompt="def f():\n", test="def check(c): ...", entry_point="f")
    texts = ["    return 1\n", "```python\ndef f():\n    return 1\n```"]
    with Grader(num_workers=3, allow_unsandboxed=True) as grader:
        grades = grader.grade_many("humaneval", [asked] * 2, texts)
    assert grades == [Grade(None, True, ""), Grade(None, False, "timeout")]
    ((programs, settings),) = calls
    assert programs == [("def f():\n", text, "def check(c): ...", "f") for text in texts]
    assert settings == {"num_workers": 3, "allow_unsandboxed": True}
