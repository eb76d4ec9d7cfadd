r"""The process in which answers are compared by mathematics; ``math_answers`` starts and stops it.

Answers are hostile input: ``9^{9^{9^9}}`` never ends, others take all memory or overflow the stack.
So this process bounds its own memory and processor time, and its parent kills it at a deadline.

Reads JSON Lines from standard input, {"gold", "answer", "seconds"}, and answers each with {"equal"}
or {"error"}. The first line that it writes, {}, says that it is ready.

math-verify compares; what it gets wrong is decided around it:

* points, intervals, sets and matrices are compared element by element, so that (1,2) is not {1,2};
* constants are compared to 60 digits, not to 6 or 15 places, and polynomials exactly;
* R and r are different variables where one answer has both;
* ``2x+1=5`` is not 5, and ``3x+4=0`` not 0, though x=5 and x+y=5 are;
* ``x<2 or x>3`` is an interval's union.
"""

import json
import os
import re
import sys
from itertools import zip_longest
from typing import Any

from experiments.grading import answer_text, math_rules
from experiments.grading.answer_text import Parts

MEMORY_BYTES = 1 << 30
_DIGITS = 60
_SMALLEST_RATIO = 1e-40  # of a difference that is not rounding at _DIGITS digits
_MOST_ELEMENTS = 30
_DEEPEST = 3
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])|\\mp(?![A-Za-z])")
_RELATION = re.compile(r"[<>]|\\[lg]e(?![A-Za-z])")
_WORD = re.compile(r"\\text ?\{[^{}]*\}|\\[A-Za-z]+|[A-Za-z]")


def equal(gold: str, answer: str, depth: int = 0) -> bool:
    """Whether two cleaned answers are equal; the gold one decides what kind of answer is asked."""
    verdict = math_rules.decide(gold, answer)
    if verdict is not None:
        return verdict
    gold_parts, parts = answer_text.parts(gold), answer_text.parts(answer)
    if depth < _DEEPEST and {"matrix", "ordered"} & {gold_parts.kind, parts.kind}:
        if "scalar" not in (gold_parts.kind, parts.kind):
            return _equal_in_order(gold_parts, parts, depth)
    elif depth < _DEEPEST and (
        "unordered" in (gold_parts.kind, parts.kind) or _PLUS_MINUS.search(gold + answer)
    ):
        gold_elements, elements = _elements(gold_parts), _elements(parts)
        if len(gold_elements) == len(elements) > 1 or "{" in (gold[:2] + answer[:2]):
            return _equal_as_sets(gold_elements, elements, depth)
        if len(gold_elements) != len(elements) and not _RELATION.search(gold + answer):
            return False
    return _equal_expressions(gold, answer)


def _equal_in_order(gold: Parts, answer: Parts, depth: int) -> bool:
    if gold.kind == answer.kind == "matrix":
        if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
            return False
    elif gold.kind == answer.kind:
        # Of two elements it may be an interval, whose brackets count.
        if gold.brackets != answer.brackets and len(gold.rows[0]) == 2:
            return False
    elif not all(_is_vector(parts) for parts in (gold, answer)):
        return False  # such as a set
    pairs = zip_longest(
        (element for row in gold.rows for element in row),
        (element for row in answer.rows for element in row),
        fillvalue="",
    )
    return all(equal(one, other, depth + 1) for one, other in pairs)


def _is_vector(parts: Parts) -> bool:
    if parts.kind == "matrix":
        return len(parts.rows) == 1 or all(len(row) == 1 for row in parts.rows)
    return parts.brackets in ("()", "[]")


def _equal_as_sets(gold: list[str], answer: list[str], depth: int) -> bool:
    if len(gold) != len(answer) or len(gold) > _MOST_ELEMENTS:
        return False
    left = list(answer)
    for element in gold:
        match = next((other for other in left if equal(element, other, depth + 1)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _elements(parts: Parts) -> list[str]:
    """Elements without repetitions, each plus-or-minus as the two that it stands for."""
    elements: dict[str, str] = {}
    for element in parts.rows[0]:
        signs = _PLUS_MINUS.findall(element)
        if len(signs) == 1:
            before, after = _PLUS_MINUS.split(element)
            expanded = [f"{before}+{after}" if before.strip() else after, f"{before}-{after}"]
        else:
            expanded = [element]
        for value in expanded:
            elements.setdefault(math_rules.key(value), value)
    return list(elements.values())


def _equal_expressions(gold: str, answer: str) -> bool:
    import math_verify

    if _PLUS_MINUS.search(gold) is None and _is_unsolved(gold, answer):
        return False
    gold, answer = _distinct_letters(gold, answer)
    gold_values = _parse(_prepare(math_rules.bare(gold, answer)))
    values = _parse(_prepare(math_rules.bare(answer, gold)))
    if not gold_values or not values:
        return False
    one, other = gold_values[0], values[0]
    if _is_constant(one) and _is_constant(other):
        return _equal_constants(one, other, answer)
    verdict = _equal_polynomials(one, other)
    if verdict is not None:
        return verdict
    return math_verify.verify(
        _as_set(one, gold),
        _as_set(other, answer),
        timeout_seconds=0,
        allow_set_relation_comp=True,
    )


def _prepare(text: str) -> str:
    # math-verify tells an imaginary i from a variable by its standing alone.
    return answer_text.split_unit(re.sub(r"(?<=\d)i(?![A-Za-z])", " i", text))[0]


def _parse(text: str) -> list[Any]:
    import math_verify
    from latex2sympy2_extended import NormalizationConfig

    # Only LaTeX: the other reader of math-verify evaluates text as Python. Its removal of units
    # takes variables for units.
    latex = math_verify.LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
        ),
    )
    return math_verify.parse(f"${text}$", [latex], fallback_mode="no_fallback", parsing_timeout=0)


def _is_unsolved(gold: str, answer: str) -> bool:
    """Whether the answer is an equation in one unknown, of which gold is merely the right side."""
    if "=" in gold or answer.count("=") != 1:
        return False
    left, right = (_parse(side) for side in answer.split("="))
    if not left or not right or not getattr(left[0], "is_Add", False):
        return False
    constant, _ = left[0].doit().as_coeff_Add()
    return bool(left[0].free_symbols) and (
        right[0].is_zero or (constant != 0 and len(left[0].free_symbols) == 1)
    )


def _distinct_letters(gold: str, answer: str) -> tuple[str, str]:
    """math-verify reads R as r; where an answer holds both, R becomes another variable."""

    def letters(text: str) -> set[str]:
        return {word for word in _WORD.findall(text) if len(word) == 1}

    both = {
        letter
        for text in (gold, answer)
        for letter in letters(text)
        if letter.isupper() and letter.lower() in letters(text)
    }

    def rename(match: re.Match[str]) -> str:
        return f" {match[0].lower()}_{{0}} " if match[0] in both else match[0]

    return _WORD.sub(rename, gold), _WORD.sub(rename, answer)


def _is_constant(value: Any) -> bool:
    import sympy

    return isinstance(value, sympy.Expr) and not value.free_symbols and bool(value.is_finite)


def _exact(value: Any) -> Any:
    """A value with decimals as the quotients that they are, evaluated."""
    import sympy

    return value.replace(
        lambda part: isinstance(part, sympy.Float), lambda part: sympy.Rational(str(part))
    ).doit()


def _equal_polynomials(gold: Any, answer: Any) -> bool | None:
    """Whether two expressions are equal where their difference, multiplied out, shows it."""
    import sympy

    if not isinstance(gold, sympy.Expr) or not isinstance(answer, sympy.Expr):
        return None
    difference = sympy.expand(_exact(gold) - _exact(answer))
    if difference == 0:
        return True
    if difference.is_Rational:
        return False
    if difference.free_symbols and difference.is_polynomial():
        coefficients = sympy.Poly(difference, *difference.free_symbols).coeffs()
        if all(coefficient.is_Rational for coefficient in coefficients):
            return False
    return None


def _equal_constants(gold: Any, answer: Any, text: str) -> bool:
    import sympy

    gold, answer = _exact(gold), _exact(answer)
    if gold == answer:
        return True
    if gold.is_Rational and answer.is_Rational:
        difference_is_zero = False
    else:
        size = max(abs(sympy.N(gold, _DIGITS)), abs(sympy.N(answer, _DIGITS)))
        difference = abs(sympy.N(gold - answer, _DIGITS))
        difference_is_zero = bool(difference <= _SMALLEST_RATIO * size)
    if difference_is_zero:
        return True
    quantity = answer_text.read_quantity(text)
    if quantity is None or not gold.is_real:
        return False
    nearest = sympy.Integer(sympy.floor(gold * 10**quantity.places + sympy.Rational(1, 2)))
    scale = 10**quantity.places
    return quantity.digits >= answer_text.LEAST_DIGITS and quantity.value * scale == int(nearest)


def _as_set(value: Any, text: str) -> Any:
    """Relations joined by "or" as the set of their solutions."""
    import sympy
    from sympy.core.relational import Relational

    if not isinstance(value, sympy.FiniteSet) and type(value).__name__ != "FiniteSet":
        return value
    if "or" not in text or not all(isinstance(part, Relational) for part in value.args):
        return value
    relations: Any = value.args
    return sympy.Union(*(relation.as_set() for relation in relations))


def _bound_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, ValueError, OSError):
        pass  # a system without such limits; the deadline still holds


def _bound_time(seconds: float) -> None:
    """Ends this process even where its parent is gone; the parent's deadline comes first."""
    try:
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        _, hard = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used + seconds) + 2, hard))
    except (ImportError, ValueError, OSError):
        pass


def main() -> None:
    """Answers requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not a reply
    import logging

    logging.disable(logging.CRITICAL)
    import math_verify  # noqa: F401  slow, and before the memory is bounded

    _bound_memory()
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        _bound_time(request["seconds"])
        try:
            reply: dict[str, Any] = {"equal": bool(equal(request["gold"], request["answer"]))}
        except Exception as error:  # MemoryError and RecursionError too: such an answer is wrong
            reply = {"error": type(error).__name__}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
