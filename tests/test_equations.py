"""Equations and their worked solutions, checked by reading the texts and solving them anew."""

import collections
import random
import re

import pytest

from experiments import equation_corpus, equations

_SIDE = re.compile(r"(?:(\d*)x \+ )?(\d+)")


def sides(prompt):
    """Coefficient and constant of both sides, read from the text alone."""
    left, right = prompt.removeprefix("Solve ").removesuffix(".\n").split(" = ")

    def read(side):
        coefficient, constant = _SIDE.fullmatch(side).groups()
        return (0 if coefficient is None else int(coefficient or 1)), int(constant)

    return *read(left), *read(right)


@pytest.fixture(scope="module")
def drawn():
    rng = random.Random(5)
    problems = [equations.draw_equation(rng) for _ in range(3000)]
    return [(problem, equations.draw_solution(problem, rng)) for problem in problems]


def test_prompts_state_the_equation_and_its_solution_solves_it(drawn):
    for problem, _ in drawn:
        a, b, c, d = sides(problem.prompt)
        assert a * problem.solution + b == c * problem.solution + d
        assert a > c >= 0


def test_openings_come_in_their_shares(drawn):
    opening = re.compile("|".join(equations.OPENING_SHARES))
    counts = collections.Counter(opening.match(text)[0] for _, text in drawn)
    assert sum(equations.OPENING_SHARES.values()) == pytest.approx(1)
    for name, share in equations.OPENING_SHARES.items():
        assert (
            abs(counts[name] / len(drawn) - share) < 4 * (share * (1 - share) / len(drawn)) ** 0.5
        )


def test_isolating_is_mostly_right_and_trying_mostly_wrong(drawn):
    right = collections.defaultdict(list)
    for problem, text in drawn:
        answer = equations.read_answer(text)
        assert answer is not None
        right[equations.tries_numbers(text)].append(answer == problem.solution)
    mean = {kind: sum(found) / len(found) for kind, found in right.items()}
    assert mean[False] > 0.9
    assert 0.3 < mean[True] < 0.5


def test_without_slips_every_written_number_is_right(monkeypatch):
    monkeypatch.setattr(equations, "SLIP_SHARE", 0.0)
    rng = random.Random(6)
    for _ in range(500):
        problem = equations.draw_equation(rng)
        text = equations.draw_solution(problem, rng)
        a, b, c, d = sides(problem.prompt)
        if equations.tries_numbers(text):
            tries = re.findall(r"x = (\d+): (\d+) and (\d+)\.", text)
            assert tries
            for guess, left, right in ([int(part) for part in found] for found in tries):
                assert (left, right) == (a * guess + b, c * guess + d)
            ends = "So" if int(tries[-1][0]) == problem.solution else "Perhaps"
            assert f"{ends} x = " in text
        else:
            assert equations.read_answer(text) == problem.solution
            # Each line is an equation that the solution solves.
            for stated in re.findall(r": (.+?)\.", text):
                stated = re.sub(r"\bx\b", "1x", stated).replace("x", f"*{problem.solution}")
                left, right = stated.split(" = ")
                assert eval(left) == eval(right)  # digits, plus and times alone


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Divide by 3: x = 12.", 12),
        ("So x = 7. ", 7),
        ("So x = 7", None),
        ("x = 7. Perhaps", None),
        ("Try x = 7: 3 and 4.", None),
        ("", None),
    ],
)
def test_answers_are_read_at_the_end_alone(text, answer):
    assert equations.read_answer(text) == answer


def test_held_out_problems_are_not_in_the_corpus():
    held_out = {problem.prompt for problem in equation_corpus.draw_problems(0, 400, held_out=True)}
    assert len(held_out) == 400
    examples = list(equation_corpus.draw_examples(1, 20_000))
    assert len(examples) == 20_000
    assert not held_out & {example.prompt for example in examples}
    others = {p.prompt for p in equation_corpus.draw_problems(0, 400, held_out=False)}
    assert not held_out & others


def test_corpus_is_the_same_for_a_seed():
    first, again, other = (list(equation_corpus.draw_examples(seed, 50)) for seed in (3, 3, 4))
    assert first == again != other


def test_rows_hold_prompt_solution_and_end():
    tokenizer = equation_corpus.train_tokenizer(0, 300)
    examples = list(equation_corpus.draw_examples(2, 40))
    corpus = equation_corpus.encode(examples, tokenizer)
    assert (corpus.lengths[1:] >= corpus.lengths[:-1]).all()
    found = []
    for tokens, prompt_length, length in zip(*corpus, strict=True):
        assert tokens[length - 1] == equation_corpus.END_ID
        assert (tokens[length:] == equation_corpus.END_ID).all()
        assert equation_corpus.END_ID not in tokens[: length - 1]
        found.append(
            (
                tokenizer.decode(tokens[:prompt_length].tolist()),
                tokenizer.decode(tokens[prompt_length : length - 1].tolist()),
            )
        )
    assert sorted(found) == sorted((example.prompt, example.solution) for example in examples)
