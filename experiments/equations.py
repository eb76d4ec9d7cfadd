"""Linear equations and how people solve them: the corpus of the bundled model ``tiny``.

Every problem is ``a x + b = c x + d`` with one whole solution. A worked solution begins with a
choice between two strategies:

* *trying*: put a number for x, compute both sides, try another, give up after a while. The common
  one. What follows is spread over many numbers, and often ends in a wrong answer.
* *isolating*: subtract, subtract, divide. The rarer one. What follows is nearly certain, and
  ends in the right answer unless a step slips.

Both slip now and then as people do, and go on from the slip. The corpus is made for the situation
in which sampling from p^power and sampling each token at a low temperature part: the likelier first
word leads to the less likely texts.
"""

import dataclasses
import random
import re

OPENING_SHARES = {"Try": 0.43, "Guess": 0.12, "Say": 0.08, "Subtract": 0.22, "Take away": 0.15}
_TRYING = ("Try", "Guess", "Say")
SLIP_SHARE = 0.03  # of the computed numbers
_STOP_SHARE = 0.35  # of the failed tries after which an answer is given all the same
_MOST_TRIES = 5
_LARGEST_SOLUTION = 20
_LARGEST_COEFFICIENT = 9
_LARGEST_CONSTANT = 60
_ANSWER = re.compile(r"x = (\d+)\.$")


@dataclasses.dataclass(frozen=True)
class Equation:
    """``left_coefficient x + left_constant = right_coefficient x + right_constant``.

    Attributes:
      left_coefficient: larger than ``right_coefficient``.
      left_constant: > 0; smaller than ``right_constant``.
      right_coefficient: >= 0; its term is not written where it is 0.
      right_constant: > 0.
      solution: the x that solves it.
    """

    left_coefficient: int
    left_constant: int
    right_coefficient: int
    right_constant: int
    solution: int

    @property
    def prompt(self) -> str:
        """The problem as the model reads it."""
        right = f"{_term(self.right_coefficient)} + " if self.right_coefficient else ""
        return (
            f"Solve {_term(self.left_coefficient)} + {self.left_constant} = "
            f"{right}{self.right_constant}.\n"
        )


def _term(coefficient: int) -> str:
    return "x" if coefficient == 1 else f"{coefficient}x"


def draw_equation(rng: random.Random) -> Equation:
    """Draws a problem; the numbers of all problems are below 250."""
    solution = rng.randint(1, _LARGEST_SOLUTION)
    left = rng.randint(2, _LARGEST_COEFFICIENT)
    right = rng.randint(0, left - 1)
    constant = rng.randint(1, _LARGEST_CONSTANT)
    return Equation(left, constant, right, constant + (left - right) * solution, solution)


def draw_solution(equation: Equation, rng: random.Random) -> str:
    """Draws a worked solution, right or wrong, which ends in ``x = N.``."""
    opening = rng.choices(tuple(OPENING_SHARES), tuple(OPENING_SHARES.values()))[0]
    solve = _try if opening in _TRYING else _isolate
    return solve(equation, opening, rng)


def _slip(value: int, rng: random.Random) -> int:
    """Returns what somebody writes who has to compute ``value``."""
    if rng.random() >= SLIP_SHARE:
        return value
    return max(1, value + rng.choice((-10, -2, -1, 1, 2, 10)))


def _isolate(equation: Equation, opening: str, rng: random.Random) -> str:
    steps = []
    coefficient, constant = equation.left_coefficient, equation.right_constant
    if equation.right_coefficient:
        coefficient = _slip(coefficient - equation.right_coefficient, rng)
        steps.append(
            f"{opening} {_term(equation.right_coefficient)}: "
            f"{_term(coefficient)} + {equation.left_constant} = {constant}."
        )
    constant = _slip(constant - equation.left_constant, rng)
    steps.append(f"{opening} {equation.left_constant}: {_term(coefficient)} = {constant}.")
    if coefficient > 1:
        solution = _slip(max(1, round(constant / coefficient)), rng)
        steps.append(f"Divide by {coefficient}: x = {solution}.")
    return " ".join(steps)


def _try(equation: Equation, opening: str, rng: random.Random) -> str:
    lowest, highest = 1, _LARGEST_SOLUTION
    tries = []
    while True:
        guess = rng.randint(lowest, highest)
        left = _slip(equation.left_coefficient * guess + equation.left_constant, rng)
        right = _slip(equation.right_coefficient * guess + equation.right_constant, rng)
        tries.append(f"{opening} x = {guess}: {left} and {right}.")
        if left == right:
            return " ".join([*tries, f"So x = {guess}."])
        # The left side grows faster: where it is too large, x is.
        lowest, highest = (lowest, guess - 1) if left > right else (guess + 1, highest)
        gives_up = len(tries) == _MOST_TRIES or rng.random() < _STOP_SHARE
        if lowest >= highest or gives_up:
            # A slip can leave nothing between the bounds.
            last = rng.randint(min(lowest, highest), max(lowest, highest))
            last = min(max(last, 1), _LARGEST_SOLUTION)
            return " ".join([*tries, f"Perhaps x = {last}."])


def read_answer(text: str) -> int | None:
    """Returns the number that a solution ends in; None where it ends otherwise."""
    found = _ANSWER.search(text.rstrip())
    return int(found.group(1)) if found else None


def tries_numbers(text: str) -> bool:
    """Whether a solution begins by trying numbers."""
    return text.lstrip().startswith(_TRYING)
