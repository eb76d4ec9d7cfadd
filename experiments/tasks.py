r"""The tasks of the paper's experiments, and GSM8K: problems, prompts and presets.

The data sets are the user's own files; none is fetched. Prompts and presets are the paper's, except
those of GSM8K, which it does not have: ours are MATH's prompt and completions of 512 tokens.
"""

import random
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from experiments import task_files
from experiments.grading import integers
from experiments.task_files import Row, Source, read_text_field

LETTERS = "ABCD"
SYSTEM_PROMPT = "You are an AI math expert."
# The doubled braces reach the model, as they do in the paper's code.
_MATH_PROMPT = (
    "Can you solve the following math problem? Please reason step by step, and put your final "
    "answer within \\boxed{{}}.\n\n%s\n\nRemember to present your final answer within \\boxed{{}}!"
)
_CHOICE_PROMPT = (
    "Answer the following multiple choice question. The last line of your response should be of "
    "the following format: '\\boxed{$LETTER}' (without quotes) where LETTER is one of ABCD. Think "
    "step by step before answering.\n\n%s\n\n%s"
)


class Problem(NamedTuple):
    """One problem of a task.

    Attributes:
      problem_id: unique within the file.
      question: what is asked, without instructions.
      gold: the reference answer; of GPQA its letter, of HumanEval the canonical solution.
      details: what prompt and grader need besides: GPQA's "choices" in the order shown;
        HumanEval's "prompt", "test" and "entry_point"; else empty.
    """

    problem_id: str
    question: str
    gold: str
    details: dict[str, Any]


class Prompt(NamedTuple):
    """What a model is given.

    Attributes:
      text: the text, or the user's message.
      system: the system message of a chat, or None.
      raw: whether the text is the prompt as it is, without a chat template.
    """

    text: str
    system: str | None
    raw: bool


class Preset(NamedTuple):
    """The settings of the paper's runs: see ``ecmh_jax.Config`` and ``make_tuning``."""

    max_new_tokens: int
    num_stages: int
    steps_per_stage: int
    power: float
    cut_power: float
    top_k: int


class Task(NamedTuple):
    """One data set.

    Attributes:
      read: makes the problem of a row; draws from the generator, row after row.
      grading: how a completion is graded.
      preset: settings of its runs.
      expected: the form of a row, for messages.
      where: where to get the file, for messages.
    """

    read: Callable[[Source, Row, random.Random], Problem]
    grading: Literal["math", "integer", "number", "letter", "program"]
    preset: Preset
    expected: str
    where: str


def _read_math(source: Source, row: Row, _: random.Random) -> Problem:
    return Problem(
        read_text_field(source, row, "id", "unique_id"),
        read_text_field(source, row, "prompt", "problem"),
        read_text_field(source, row, "answer"),
        {},
    )


def _read_gsm8k(source: Source, row: Row, _: random.Random) -> Problem:
    answer = read_text_field(source, row, "answer")
    gold = integers.number_key(answer.rpartition("####")[2]) if "####" in answer else None
    if gold is None:
        raise source.error(f'"answer" ends in {answer[-40:]!r}', row.place)
    return Problem(str(row.number), read_text_field(source, row, "question"), gold, {})


def _read_human_eval(source: Source, row: Row, _: random.Random) -> Problem:
    prompt = read_text_field(source, row, "prompt")
    details = {
        "prompt": prompt,
        "test": read_text_field(source, row, "test"),
        "entry_point": read_text_field(source, row, "entry_point"),
    }
    if not details["entry_point"].isidentifier():
        raise source.error(f'"entry_point" is {details["entry_point"]!r}', row.place)
    gold = read_text_field(source, row, "canonical_solution")
    return Problem(read_text_field(source, row, "task_id"), prompt, gold, details)


def _read_gpqa(source: Source, row: Row, generator: random.Random) -> Problem:
    # In the order of the paper's code: shuffle the wrong ones, then insert the right one.
    choices = [read_text_field(source, row, f"Incorrect Answer {i}") for i in (1, 2, 3)]
    generator.shuffle(choices)
    index = generator.randint(0, 3)
    choices.insert(index, read_text_field(source, row, "Correct Answer"))
    problem_id = str(row.number)
    if row.values.get("Record ID"):
        problem_id = read_text_field(source, row, "Record ID")
    question = read_text_field(source, row, "Question")
    return Problem(problem_id, question, LETTERS[index], {"choices": choices})


def _read_aime(source: Source, row: Row, _: random.Random) -> Problem:
    answer = read_text_field(source, row, "answer")
    number = integers.read_integer(answer)
    if number is None or not 0 <= number <= 999:
        raise source.error(f'"answer" is {answer[:40]!r}', row.place)
    problem_id = read_text_field(source, row, "id", "problem_idx")
    return Problem(problem_id, read_text_field(source, row, "problem"), str(number), {})


TASKS: dict[str, Task] = {
    "math500": Task(
        _read_math,
        "math",
        Preset(3072, 16, 10, power=4.0, cut_power=4.0, top_k=50),
        'rows {"prompt", "answer", "id"} or {"problem", "answer", "unique_id"}',
        "Get the test split of HuggingFaceH4/MATH-500 from Hugging Face",
    ),
    "gsm8k": Task(
        _read_gsm8k,
        "number",
        Preset(512, 16, 10, power=4.0, cut_power=4.0, top_k=50),
        'rows {"question", "answer"} whose answer ends in "#### N"',
        "Get the test split of openai/gsm8k (main) from Hugging Face, saved as JSON Lines",
    ),
    "humaneval": Task(
        _read_human_eval,
        "program",
        Preset(3072, 16, 10, power=5.0, cut_power=4.0, top_k=50),
        'rows {"task_id", "prompt", "canonical_solution", "test", "entry_point" (a name)}',
        "Get openai/openai_humaneval from Hugging Face, saved as JSON Lines, or HumanEval.jsonl.gz",
    ),
    "gpqa_diamond": Task(
        _read_gpqa,
        "letter",
        Preset(6144, 16, 10, power=4.0, cut_power=4.0, top_k=50),
        'rows or a CSV table with "Question", "Correct Answer" and "Incorrect Answer 1" to 3',
        "Get gpqa_diamond of Idavidrein/gpqa from Hugging Face, which asks for an account",
    ),
    "aime": Task(
        _read_aime,
        "integer",
        Preset(6144, 16, 10, power=4.0, cut_power=4.0, top_k=50),
        'rows {"problem", "answer" (0 to 999), "id"}; "problem_idx" may stand for "id"',
        "Get a year's problems from MathArena on Hugging Face, saved as JSON Lines, or write them",
    ),
}


def get_task(task: str) -> Task:
    """Returns a task by its name.

    Raises:
      ValueError: there is none of that name.
    """
    if task not in TASKS:
        raise ValueError(f"--task={task}; expected one of {', '.join(TASKS)}")
    return TASKS[task]


def read_problems(task: str, path: str, seed: int) -> tuple[Problem, ...]:
    """Reads all problems of a task.

    Args:
      task: one of ``TASKS``.
      path: the data set's file: JSON list, JSON Lines or CSV, plain or gzipped.
      seed: shuffles GPQA's choices, of all rows in order; the other tasks do not depend on it.

    Returns:
      The problems in the file's order.

    Raises:
      ValueError: the task is not known, or the file is unusable; names the place in it.
    """
    described = get_task(task)
    source = Source(path, described.expected, described.where)
    generator = random.Random(seed)
    problems = []
    places: dict[str, str] = {}
    for row in task_files.read_rows(source):
        problem = described.read(source, row, generator)
        earlier = places.setdefault(problem.problem_id, row.place)
        if earlier != row.place:
            raise source.error(
                f"the id {problem.problem_id[:80]!r} is already that of {earlier}", row.place
            )
        problems.append(problem)
    return tuple(problems)


def make_prompt(task: str, problem: Problem, chat: bool) -> Prompt:
    """Returns the prompt of a problem.

    Args:
      task: one of ``TASKS``.
      problem: the problem.
      chat: whether the model is tuned to chat; HumanEval's stub is a raw text even then.

    Raises:
      ValueError: the task is not known.
    """
    grading = get_task(task).grading
    if grading == "program":
        return Prompt(problem.details["prompt"], None, raw=True)
    if grading == "letter":
        choices = "\n".join(
            f"{letter}) {choice}"
            for letter, choice in zip(LETTERS, problem.details["choices"], strict=True)
        )
        return Prompt(_CHOICE_PROMPT % (problem.question, choices), None, raw=not chat)
    return Prompt(_MATH_PROMPT % problem.question, SYSTEM_PROMPT if chat else None, raw=not chat)
