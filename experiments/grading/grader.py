"""Grades completions of any task, and says which answers are the same."""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.grading import integers, letters, math_answers, math_rules
from experiments.grading.boxed import last_boxed
from experiments.grading.math_answers import MathComparer
from experiments.tasks import Problem, get_task

NO_ANSWER = "no answer"


class Grade(NamedTuple):
    """The grade of one completion.

    Attributes:
      answer: what the completion gives as its answer, or None; of a program, None.
      correct: whether that is right.
      note: why it could not be graded, or why a program failed; else empty.
    """

    answer: str | None
    correct: bool
    note: str


class Grader:
    """Grades completions; a context manager, because it owns processes.

    Attributes:
      num_workers: processes that compare answers or run programs.
      seconds: wall time that one comparison of answers may take.
      allow_unsandboxed: whether programs may run where no sandbox is to be had.
    """

    def __init__(self, num_workers: int = 2, seconds: float = 5.0, allow_unsandboxed: bool = False):
        """Starts nothing yet.

        Raises:
          ValueError: a setting is out of range.
        """
        if num_workers < 1:
            raise ValueError(f"--grading_workers={num_workers}; expected at least 1")
        if not 0 < seconds < float("inf"):
            raise ValueError(f"--grading_seconds={seconds}; expected a positive number of seconds")
        self.num_workers = num_workers
        self.seconds = seconds
        self.allow_unsandboxed = allow_unsandboxed
        self._comparer = MathComparer(num_workers, seconds)

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; the grader may be used again."""
        self._comparer.close()

    def check(self, task: str) -> None:
        """Raises ValueError where this task cannot be graded here; call it before long work."""
        grading = get_task(task).grading
        if grading == "math":
            math_answers.check_available()
        elif grading == "program":
            from experiments.grading import sandbox

            sandbox.require(self.allow_unsandboxed)

    def grade_many(
        self, task: str, problems: Sequence[Problem], texts: Sequence[str]
    ) -> list[Grade]:
        """Grades completions.

        Args:
          task: one of ``tasks.TASKS``.
          problems: the problem of each completion.
          texts: the completions, as the model wrote them.

        Returns:
          A grade of each completion, in order.

        Raises:
          ValueError: not as many problems as completions, or the task cannot be graded here.
        """
        if len(problems) != len(texts):
            raise ValueError(f"{len(problems)} problems; expected {len(texts)}, one a completion")
        grading = get_task(task).grading
        if grading == "program":
            return self._run_programs(problems, texts)
        if grading == "math":
            return self._compare(problems, texts)
        grade_one = {"letter": _grade_letter, "integer": _grade_integer, "number": _grade_number}
        return [grade_one[grading](*pair) for pair in zip(problems, texts, strict=True)]

    def _compare(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        answers = [last_boxed(text) for text in texts]
        pairs = [
            (problem.gold, answer)
            for problem, answer in zip(problems, answers, strict=True)
            if answer is not None
        ]
        comparisons = iter(self._comparer.compare_many(pairs))
        return [
            Grade(None, False, NO_ANSWER) if answer is None else Grade(answer, *next(comparisons))
            for answer in answers
        ]

    def _run_programs(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
        from experiments.grading import human_eval

        programs = [
            human_eval.Program(
                problem.details["prompt"],
                text,  # uncut: it may be a fenced block or the whole function
                problem.details["test"],
                problem.details["entry_point"],
            )
            for problem, text in zip(problems, texts, strict=True)
        ]
        verdicts = human_eval.check_many(
            programs, num_workers=self.num_workers, allow_unsandboxed=self.allow_unsandboxed
        )
        return [
            Grade(None, verdict.passed, "" if verdict.passed else verdict.reason)
            for verdict in verdicts
        ]


def same_answer_key(task: str, answer: str) -> str:
    r"""Returns a text that equal answers of a task share, for majority votes.

    For numbers and letters it is exact. For mathematics it joins what is equal by its text (1/2,
    0.5 and ``\frac{1}{2}``; sets in any order) and not what needs algebra (``\sqrt{8}`` and
    ``2\sqrt{2}``).

    Args:
      task: one of ``tasks.TASKS``.
      answer: a ``Grade.answer``.

    Raises:
      ValueError: the task is not known.
    """
    grading = get_task(task).grading
    if grading == "letter":
        return letters.read_letter(answer) or answer.strip()
    if grading in ("integer", "number"):
        return integers.number_key(answer) or answer.strip()
    return math_rules.key(answer) if grading == "math" else answer


def _grade_letter(problem: Problem, text: str) -> Grade:
    letter = letters.find_letter(text)
    return Grade(letter, letter == problem.gold, "" if letter else NO_ANSWER)


def _grade_number(problem: Problem, text: str) -> Grade:
    return _grade_found(problem, integers.find_number(text, last_number=True))


def _grade_integer(problem: Problem, text: str) -> Grade:
    return _grade_found(problem, integers.find_number(text, last_number=False))


def _grade_found(problem: Problem, answer: str | None) -> Grade:
    if answer is None:
        return Grade(None, False, NO_ANSWER)
    key = integers.number_key(answer)
    gold = integers.number_key(problem.gold)
    note = "" if key else "answer too long" if len(answer) > integers.LONGEST else "not a number"
    return Grade(answer, key is not None and key == gold, note)
