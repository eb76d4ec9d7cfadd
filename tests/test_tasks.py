"""Problems, prompts and presets of the tasks, and what files of every kind end in."""

import csv
import gzip
import io
import json
import pathlib
import random

import pytest

from experiments import task_files, tasks
from experiments.tasks import TASKS, Problem, Prompt, make_prompt, read_problems

DATA = pathlib.Path(__file__).parents[2] / "shared" / "data"

# Made up, in the forms of the published files.
ROWS = {
    "math500": [
        {"prompt": "What is $1+1$?", "answer": "2", "source": "math", "id": "test/algebra/1.json"},
        {"prompt": "Name a root of $x^2-9$.", "answer": "3", "source": "math", "id": "test/b/2"},
    ],
    "gsm8k": [
        {"question": "Ann has 2 pens and buys 3.", "answer": "2+3=<<2+3=5>>5\n#### 5"},
        {"question": "A car costs $1,200,\u2028minus $1.", "answer": "It is less.\n#### 1,199"},
        {"question": "How much colder?", "answer": "#### -10"},
    ],
    "humaneval": [
        {
            "task_id": "HumanEval/0",
            "prompt": 'def add_one(x):\n    """Adds one."""\n',
            "entry_point": "add_one",
            "canonical_solution": "    return x + 1\n",
            "test": "def check(candidate):\n    assert candidate(1) == 2\n",
        },
    ],
    "gpqa_diamond": [
        {
            "Question": f"Which is number {number}?",
            "Correct Answer": f"right {number}",
            "Incorrect Answer 1": f"one {number}",
            "Incorrect Answer 2": f"two, {number}",
            "Incorrect Answer 3": f'three\n"{number}"',
        }
        for number in range(40)
    ],
    "aime": [
        {"problem": "Find m+n.", "answer": 25, "id": 1},
        {"problem": "Find n.", "answer": "007", "id": 2},
    ],
}


def as_lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_list(rows) -> bytes:
    return json.dumps(rows, indent=1).encode()


def as_table(rows) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def write(folder, data: bytes, name: str = "data") -> str:
    path = folder / name
    path.write_bytes(data)
    return str(path)


# Reading


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", [as_lines, as_list, as_table])
def test_every_form_gives_the_same_problems(task, form, packed, tmp_path):
    data = form(ROWS[task])
    path = write(tmp_path, gzip.compress(data) if packed else data, "name.txt")
    expected = read_problems(task, write(tmp_path, as_lines(ROWS[task]), "plain"), 3)
    if task == "gsm8k" or (task == "gpqa_diamond" and form is as_table):
        expected = tuple(problem._replace(problem_id="") for problem in expected)
        found = tuple(p._replace(problem_id="") for p in read_problems(task, path, 3))
    else:
        found = read_problems(task, path, 3)
    assert found == expected
    assert len(found) == len(ROWS[task])


def test_fields_of_problems(tmp_path):
    def read(task):
        return read_problems(task, write(tmp_path, as_lines(ROWS[task])), 0)

    assert read("math500")[0] == Problem("test/algebra/1.json", "What is $1+1$?", "2", {})
    assert [(p.problem_id, p.gold) for p in read("gsm8k")] == [
        ("1", "5"),
        ("2", "1199"),
        ("3", "-10"),
    ]
    row = ROWS["humaneval"][0]
    details = {"prompt": row["prompt"], "test": row["test"], "entry_point": "add_one"}
    assert read("humaneval") == (
        Problem("HumanEval/0", row["prompt"], row["canonical_solution"], details),
    )
    assert [(p.problem_id, p.gold) for p in read("aime")] == [("1", "25"), ("2", "7")]


def test_names_of_fields_on_hugging_face(tmp_path):
    row = {"problem": "q", "solution": "s", "answer": "a", "unique_id": "u", "level": 3}
    problems = read_problems("math500", write(tmp_path, as_lines([row])), 0)
    assert problems == (Problem("u", "q", "a", {}),)
    row = {"problem_idx": 4, "problem": "q", "answer": 12}
    assert read_problems("aime", write(tmp_path, as_lines([row])), 0)[0].problem_id == "4"


def test_blank_lines_byte_order_mark_and_carriage_returns(tmp_path):
    lines = as_lines(ROWS["gsm8k"]).split(b"\n")
    data = b"\xef\xbb\xbf\r\n" + b"\r\n\r\n".join(lines)
    problems = read_problems("gsm8k", write(tmp_path, data), 0)
    assert [p.problem_id for p in problems] == ["2", "4", "6"]  # numbers of lines
    assert "\u2028" in problems[1].question


def test_choices_are_shuffled_as_published(tmp_path):
    path = write(tmp_path, as_lines(ROWS["gpqa_diamond"]))
    for seed in (0, 7):
        random.seed(seed)  # the published code uses the global generator, row after row
        for problem, row in zip(
            read_problems("gpqa_diamond", path, seed), ROWS["gpqa_diamond"], strict=True
        ):
            choices = [row[f"Incorrect Answer {i}"] for i in (1, 2, 3)]
            random.shuffle(choices)
            index = random.randint(0, 3)
            choices.insert(index, row["Correct Answer"])
            assert problem.details == {"choices": choices}
            assert problem.gold == "ABCD"[index]
            assert choices["ABCD".index(problem.gold)] == row["Correct Answer"]
    golds = [[p.gold for p in read_problems("gpqa_diamond", path, s)] for s in (0, 0, 1)]
    assert golds[0] == golds[1] != golds[2]
    assert set(golds[0]) == set("ABCD")


def test_other_tasks_do_not_depend_on_the_seed(tmp_path):
    for task in ("math500", "gsm8k", "humaneval", "aime"):
        path = write(tmp_path, as_lines(ROWS[task]))
        assert read_problems(task, path, 0) == read_problems(task, path, 1)


def test_record_ids(tmp_path):
    rows = [row | {"Record ID": f"rec{i}"} for i, row in enumerate(ROWS["gpqa_diamond"])]
    problems = read_problems("gpqa_diamond", write(tmp_path, as_table(rows)), 0)
    assert [p.problem_id for p in problems[:2]] == ["rec0", "rec1"]


# Unusable files: (content, what the message says)

GOOD = json.dumps(ROWS["math500"][0])
BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "blank": (b" \n\n", "the file is empty"),
    "empty list": (b"[]", "the file holds no row"),
    "no JSON": (GOOD.encode() + b"\n{oops\n", "line 2, column 2: not JSON"),
    "torn": (GOOD.encode() + b"\n" + GOOD.encode()[:40], "line 2, column"),
    "torn list": (b"[" + GOOD.encode() + b",\n{", "line 2, column 2: not JSON"),
    "a list in a line": (GOOD.encode() + b"\n[1]\n", r"line 2: not a JSON object: \[1\]"),
    "a list of numbers": (b"[1, 2]", "row 1: not a JSON object: 1"),
    "one object over lines": (b'{\n "data": []\n}', "line 1, column 2"),
    "not UTF-8": (GOOD.encode() + b'\n{"id": "\xff"}', "line 2: not UTF-8 at byte"),
    "UTF-16": (GOOD.encode("utf-16"), "line 1: not UTF-8 at byte 0"),
    "text": (b"hello world\n", "line 1: neither JSON nor a table: 'hello world'"),
    "other columns": (b"a,b\n1,2\n", 'line 2: "id" or "unique_id" is missing'),
    "too many cells": (b"id,prompt,answer\n1,2,3,4\n", "line 2: not as many cells as line 1, 3"),
    "too few cells": (b"id,prompt,answer\n1,2\n", "line 2: not as many cells as line 1, 3"),
    "open quote": (b'id,prompt,answer\n1,"2,3\n', "not CSV"),
    "NUL in a table": (b'id,prompt,answer\n1,"2\0",\n', "line 2: \"answer\" is ''"),
    "no id": (b'{"prompt": "q", "answer": "1"}', 'line 1: "id" or "unique_id" is missing'),
    "null answer": (b'{"prompt": "q", "answer": null, "id": "1"}', '"answer" is missing'),
    "blank question": (b'{"prompt": " ", "answer": "1", "id": "1"}', "\"problem\" is ' '"),
    "a list as answer": (b'{"prompt": "q", "answer": [1], "id": "1"}', r"\"answer\" is '\[1\]'"),
    "true as answer": (b'{"prompt": "q", "answer": true, "id": "1"}', "\"answer\" is 'True'"),
    "half a surrogate pair": (
        b'{"prompt": "\\ud800", "answer": "1", "id": "1"}',
        "holds half of a surrogate pair",
    ),
    "the same id": (f"{GOOD}\n\n{GOOD}".encode(), "line 3: the id 'test/algebra/1.json' is alr"),
    "deep": (b"[" * 100_000, "nested too deeply"),
    "a huge number": (b'{"id": ' + b"1" * 5000 + b"}", "line 1: not JSON"),
    "damaged gzip": (gzip.compress(GOOD.encode())[:-9], "damaged gzip"),
    "not gzip after all": (b"\x1f\x8b" + b"\0" * 40, "damaged gzip"),
    "gzip with a wrong checksum": (gzip.compress(b"{}")[:-8] + b"\0" * 8, "damaged gzip"),
    "zip": (b"PK\x03\x04 and so on", "this is a zip archive"),
    "Parquet": (b"PAR1 and so on", "this is a Parquet file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_files(name, tmp_path):
    data, message = BAD_FILES[name]
    path = write(tmp_path, data, "m.json")
    with pytest.raises(ValueError, match=message) as raised:
        read_problems("math500", path, 0)
    text = str(raised.value)
    assert text.startswith(f"--data={path}")
    assert "; expected rows " in text
    assert text.endswith("HuggingFaceH4/MATH-500 from Hugging Face")
    assert len(text) < 700


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("gsm8k", {"answer": "It is 5."}, "\"answer\" ends in 'It is 5.'"),
        ("gsm8k", {"answer": "#### five"}, "\"answer\" ends in '#### five'"),
        ("humaneval", {"entry_point": "f(); import os"}, '"entry_point" is'),
        ("humaneval", {"test": None}, '"test" is missing'),
        ("aime", {"answer": "1000"}, "\"answer\" is '1000'"),
        ("aime", {"answer": -1}, "\"answer\" is '-1'"),
        ("aime", {"answer": "x"}, "\"answer\" is 'x'"),
        ("aime", {"id": None}, '"id" or "problem_idx" is missing'),
        ("gpqa_diamond", {"Incorrect Answer 2": ""}, '"Incorrect Answer 2" is'),
    ],
)
def test_unusable_rows(task, changes, message, tmp_path):
    path = write(tmp_path, as_lines([ROWS[task][0] | changes]))
    with pytest.raises(ValueError, match="line 1: ") as raised:
        read_problems(task, path, 0)
    assert message in str(raised.value)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "missing", tmp_path, f"{tmp_path}/\0"):
        with pytest.raises(ValueError, match=r"cannot be read.*Get the test split"):
            read_problems("gsm8k", str(path), 0)


def test_large_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(task_files, "LARGEST_FILE", 1000)
    monkeypatch.setattr(task_files, "LARGEST_TEXT", 50_000)
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        read_problems("gsm8k", write(tmp_path, b"{" * 1001), 0)
    with pytest.raises(ValueError, match="unpacks to more than 50000 bytes"):
        read_problems("gsm8k", write(tmp_path, gzip.compress(b" " * 60_000)), 0)


def test_unknown_task():
    for call in (
        lambda: read_problems("math", "x", 0),
        lambda: make_prompt("math", Problem("1", "q", "1", {}), True),
    ):
        with pytest.raises(ValueError, match="--task=math; expected one of math500, gsm8k"):
            call()


# Prompts and presets

MATH = (
    "Can you solve the following math problem? Please reason step by step, and put your final "
    "answer within \\boxed{{}}.\n\nHow many %s are in {x}?\n\n"
    "Remember to present your final answer within \\boxed{{}}!"
)


@pytest.mark.parametrize("task", ["math500", "gsm8k", "aime"])
def test_prompt_of_mathematics(task):
    problem = Problem("1", "How many %s are in {x}?", "1", {})
    assert make_prompt(task, problem, chat=False) == Prompt(MATH, None, True)
    assert make_prompt(task, problem, chat=True) == Prompt(
        MATH, "You are an AI math expert.", False
    )


def test_prompt_of_multiple_choice():
    problem = Problem("1", "Which {one}?", "B", {"choices": ["w", "x", "y\nz", "100 %"]})
    text = (
        "Answer the following multiple choice question. The last line of your response should be "
        "of the following format: '\\boxed{$LETTER}' (without quotes) where LETTER is one of ABCD. "
        "Think step by step before answering.\n\nWhich {one}?\n\n"
        "A) w\nB) x\nC) y\nz\nD) 100 %"
    )
    assert make_prompt("gpqa_diamond", problem, chat=False) == Prompt(text, None, True)
    assert make_prompt("gpqa_diamond", problem, chat=True) == Prompt(text, None, False)


@pytest.mark.parametrize("chat", [False, True])
def test_prompt_of_programs_is_the_stub(chat, tmp_path):
    (problem,) = read_problems("humaneval", write(tmp_path, as_lines(ROWS["humaneval"])), 0)
    assert make_prompt("humaneval", problem, chat) == Prompt(
        'def add_one(x):\n    """Adds one."""\n', None, True
    )


def test_presets_are_the_papers():
    found = {name: task.preset for name, task in TASKS.items()}
    assert found == {
        "math500": (3072, 16, 10, 4.0, 4.0, 50),
        "gsm8k": (512, 16, 10, 4.0, 4.0, 50),
        "humaneval": (3072, 16, 10, 5.0, 4.0, 50),
        "gpqa_diamond": (6144, 16, 10, 4.0, 4.0, 50),
        "aime": (6144, 16, 10, 4.0, 4.0, 50),
    }
    for preset in found.values():
        assert preset.max_new_tokens % preset.num_stages == 0


# The real files, where they are


@pytest.mark.parametrize(
    ("task", "name", "count", "first", "last"),
    [
        ("math500", "MATH500.json", 500, "test/precalculus/807.json", "test/geometry/615.json"),
        ("gsm8k", "gsm8k_test.jsonl", 1319, "1", "1319"),
        ("humaneval", "HumanEval.jsonl.gz", 164, "HumanEval/0", "HumanEval/163"),
    ],
)
def test_real_files(task, name, count, first, last):
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not there")
    problems = tasks.read_problems(task, str(DATA / name), 0)
    assert len(problems) == count
    assert (problems[0].problem_id, problems[-1].problem_id) == (first, last)
