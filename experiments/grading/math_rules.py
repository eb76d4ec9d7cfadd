"""Which answers are equal by their text alone, and a key under which equal answers meet."""

import re

from experiments.grading import answer_text
from experiments.grading.answer_text import Quantity

_SPARE_SPACE = re.compile(r" (?=[^\w])|(?<=[^\w]) ")
_DEEPEST = 3  # of parts within parts


def decide(gold: str, answer: str) -> bool | None:
    """Compares two answers as far as their text tells.

    Args:
      gold: the reference, cleaned.
      answer: the answer to grade, cleaned.

    Returns:
      Whether they are equal, or None where that needs mathematics.
    """
    if not answer:
        return False
    words = answer_text.plain_words(gold)
    if words is not None:
        return words == answer_text.letters_only(answer)
    if answer_text.plain_words(answer) == answer_text.letters_only(gold):
        return True
    gold_digits, gold_base = answer_text.base(gold)
    digits, base = answer_text.base(answer)
    if gold_base or base:  # the problem says the base, so that an answer may leave it out
        return gold_digits == digits and (not gold_base or not base or gold_base == base)
    gold_unit, unit = answer_text.split_unit(gold)[1], answer_text.split_unit(answer)[1]
    if gold_unit and unit and gold_unit != unit:
        return False
    gold_value = answer_text.read_quantity(bare(gold, answer))
    value = answer_text.read_quantity(bare(answer, gold))
    if gold_value and value:
        return _same_quantity(gold_value, value)
    return True if _key(bare(gold, answer)) == _key(bare(answer, gold)) else None


def key(answer: str) -> str:
    """Returns a text that equal answers share, as far as their text tells.

    Answers with the same key are equal, but for units and names of variables. Equal answers that
    need mathematics to be told equal (sqrt(8) and 2 sqrt(2)) have different keys.

    Args:
      answer: an answer as found in a completion.
    """
    if len(answer) > answer_text.LONGEST:
        return answer
    text = answer_text.without_name(answer_text.clean(answer))
    words = answer_text.plain_words(text)
    return words if words is not None else _key(answer_text.base(text)[0])


def bare(text: str, other: str) -> str:
    """Returns a cleaned answer without a name before it (``x =``) that the other need not have.

    The name stays where the other has another one, or is an equation of another form.

    Args:
      text: a cleaned answer.
      other: the one to compare it with.
    """
    without, other_without = answer_text.without_name(text), answer_text.without_name(other)
    name, other_name = text.removesuffix(without), other.removesuffix(other_without)
    if other_name:
        same = name.replace(" ", "") == other_name.replace(" ", "")
        return without if same or not name else text
    return text if "=" in name and "=" in other else without


def _same_quantity(gold: Quantity, answer: Quantity) -> bool:
    if gold.value == answer.value:
        # 50 stands for 50 %, but 0.5 % is not 0.5.
        return gold.percent == answer.percent or abs(gold.value) >= 1
    if gold.percent != answer.percent:
        return (gold.value / 100 if gold.percent else gold.value) == (
            answer.value / 100 if answer.percent else answer.value
        )
    return answer_text.approximates(answer, gold.value)


def _key(text: str, depth: int = 0) -> str:
    quantity = answer_text.read_quantity(text)
    if quantity:
        return str(quantity.value)
    parts = answer_text.parts(text)
    if parts.kind == "scalar" or depth == _DEEPEST:
        return _SPARE_SPACE.sub("", answer_text.split_unit(text)[0])
    rows = [[_key(element, depth + 1) for element in row] for row in parts.rows]
    if parts.kind == "unordered":
        return "{" + ",".join(sorted(set(rows[0]))) + "}"
    return parts.kind + parts.brackets + ";".join(",".join(row) for row in rows)
