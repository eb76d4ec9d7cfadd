r"""Numbers as answers, for AIME and GSM8K.

Where a completion's answer is looked for; the first that is found counts:

* the last box (``boxed.last_boxed``), which must hold one number, else the answer is wrong;
* the last ``#### N``, the form of GSM8K's own solutions;
* the last "answer is N" or "answer: N";
* for GSM8K only, the last number of the text. AIME's completions are long and break off in the
  middle of a calculation, whose last number is no answer.
"""

import re
from fractions import Fraction

from experiments.grading.boxed import last_boxed

LONGEST = 1000  # characters of an answer; longer ones are not read

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|\.\d+"
# In a text. A minus sign after a digit, a letter or a bracket is a subtraction or a range, and
# ordinals (the 2nd) are no quantities.
_NUMBER = re.compile(
    rf"(?<![\w.])(?:(?<![\w)\]}}])[-\u2212])?[$€£]?(?:(?<=[$€£])[-\u2212])?"
    rf"(?:{_DIGITS})(?:/\d+)?(?!\d)(?!(?:st|nd|rd|th)\b)"
    r"(?:\s?(?:thousand|million|billion|k)\b)?",
    re.IGNORECASE,
)
_HASHES = re.compile(r"####([^\n]{0,200})")
_ANSWER_IS = re.compile(r"\banswer\b[^\n.:=\d]{0,40}?(?:\bis\b|:|=)([^\n]{0,200})", re.IGNORECASE)

# What LaTeX adds to a number without changing it.
_WRAPPER = re.compile(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox|boldsymbol|bf)\s*\{([^{}]*)\}")
_THIN_SPACE = re.compile(r"\\[,!;: ]|\\q?quad\b|~|\{(?=,\})|(?<=,)\}")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*\{?\d\}?")
_DEGREES = re.compile(r"\^?\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?")
_IN_BRACKETS = re.compile(r"[({\[]([^(){}\[\]]*)[)}\]]")
# One number with at most words, a currency and a unit around it: whatever could change its value
# (x, \pi, ^2, !, a second number) does not match.
_ALONE = re.compile(
    r"(?P<label>[A-Za-z][A-Za-z' ]*:?)? ?"
    r"(?P<sign>[-\u2212] ?)?(?:\\?[$€£] ?)?(?P<minus>[-\u2212])?"
    rf"(?P<whole>{_DIGITS})(?: ?/ ?(?P<below>\d+))?"
    r" ?(?:\\?[%$€£])? ?(?P<scale>(?:thousand|million|billion|k)\b)?"
    r"(?: ?(?:[A-Za-z]{2,}|[mglshLNJWV]\b|(?<= )an? )[A-Za-z /.'-]*)?",
    re.IGNORECASE,
)
_SCALES = {"thousand": 10**3, "k": 10**3, "million": 10**6, "billion": 10**9}


def read_number(text: str) -> Fraction | None:
    r"""Returns the number that an answer states, or None.

    Understood are currencies, thousands separators (``1,080``, ``1{,}080``, ``10\,080``), a full
    stop after it, units, ``25\%`` as 25, ``72.00``, ``144/2``, ``\frac{144}{2}``, ``2 million``,
    ``x = 72``, and ``60 + 12 = 72``, the side of which that is a number counts.

    Args:
      text: an answer, such as the content of a box.
    """
    if len(text) > LONGEST:
        return None
    for side in reversed(text.split("=")):
        if (number := _read_side(side)) is not None:
            return number
    return None


def _read_side(text: str) -> Fraction | None:
    text = _THIN_SPACE.sub("", text).replace(r"\left", "").replace(r"\right", "")
    text = _FRACTION.sub(r"\1/\2", _WRAPPER.sub(r" \1", text))
    text = _DEGREES.sub("", _UNIT_POWER.sub("", text)).replace("*", "")
    text = re.sub(r"\s+", " ", text).strip().removesuffix(".").strip()
    while len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1].strip()
    if brackets := _IN_BRACKETS.fullmatch(text):
        text = brackets[1].strip()
    text = re.sub(r"^(?:minus|negative) ", "-", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=\d) (?=\d{3}(?!\d))", "", text)
    match = _ALONE.fullmatch(text)
    if match is None or (match["sign"] and match["label"] and ":" not in match["label"]):
        return None
    number = Fraction(match["whole"].replace(",", ""))
    if match["below"]:
        if int(match["below"]) == 0:
            return None
        number /= int(match["below"])
    if match["scale"]:
        number *= _SCALES[match["scale"].lower()]
    return -number if match["sign"] or match["minus"] else number


def read_integer(text: str) -> int | None:
    """Returns the integer that an answer states, or None where it states none or another number."""
    number = read_number(text)
    return int(number) if number is not None and number.denominator == 1 else None


def find_number(text: str, last_number: bool) -> str | None:
    """Returns the answer of a completion as it stands there, or None.

    Args:
      text: a completion.
      last_number: whether the last number of the text is an answer where no other is found.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (_HASHES, _ANSWER_IS):
        for match in reversed(list(pattern.finditer(text))):
            # Of an equation the right side, of anything else the first number.
            if numbers := _numbers(match[1].rpartition("=")[2]):
                return numbers[0]
    numbers = _numbers(text) if last_number else []
    return numbers[-1] if numbers else None


def number_key(text: str) -> str | None:
    """Returns the same text for equal numbers ("72", "-5/2"), or None where there is none."""
    number = read_number(text)
    return None if number is None else str(number)


def _numbers(text: str) -> list[str]:
    plain = _FRACTION.sub(r"\1/\2", _THIN_SPACE.sub("", text)).replace(r"\$", "$")
    return [match[0] for match in _NUMBER.finditer(plain)]
