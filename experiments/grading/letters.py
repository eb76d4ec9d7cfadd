r"""The letter that a completion chooses among A, B, C and D.

Where it is looked for; the first that is found counts: the last box; the last "answer is C",
"answer: C", "option C is correct" or "so (C)"; a letter by itself on the last line, or before the
choice that it names. Nothing else is an answer: a completion that broke off has none, and the
article "a" is not one. Inside a box and in brackets a small letter counts, elsewhere a capital.
"""

import re

from experiments.grading.boxed import last_boxed

_LONGEST = 1000  # characters of a box or of the last line that are read
_STYLES = re.compile(r"\\(?:text(?:bf|it|rm|sf|tt)?|math(?:bf|rm|sf|it)|mbox|bf|rm)(?![A-Za-z])")
_ANOTHER = r"(?!\s*(?:and|or|,|&|/|[-\u2013\u2014])\s*\(?[A-Da-d]\b)"  # "A and B" chooses neither
_IN_BOX = re.compile(
    r"(?:(?:the\s+)?(?:answer|option|choice|letter)(?:\s+is)?\s*:?\s+)?"
    rf"\(?\s*([A-D])(?:\s*\))?{_ANOTHER}(?:$|(?<=\)).*|\s*[.:,](?=\s|$).*|\s*[-\u2013\u2014(:].*)",
    re.IGNORECASE | re.DOTALL,
)
_MARKS = r"[*_\s$:\"'`]{0,8}"
_STYLE = r"(?:\\(?:text|mathrm|mathbf|textbf)\{)?"
# A bare A must end its clause: in "the answer is A reaction" it is an article.
_LETTER = (
    rf"{_STYLE}(?:\(\s?([A-Da-d])\s?\)|([B-D])\b(?![-'\u2019]\w)|(A)(?=[.,;:)\]}}*_$\"'`]|\s*(?:$|\n)"
    rf"|\s+(?:because|since|as|due|for|with|which|is)\b|\s*[-\u2013\u2014(])(?!['\u2019]\w)){_ANOTHER}"
)
_ADVERBS = r"(?:\s+(?:here|therefore|thus|hence|then|clearly|most|likely|probably|indeed))*"
_ANSWER_IS = re.compile(
    rf"\b(?i:(?:answer|choice|option)(?:\s+(?:choice|option|letter))?(?:\s+to\s+[^.\n]{{0,60}}?)?"
    rf"{_ADVERBS}(?:\s+(?:is|must\s+be|should\s+be|would\s+be|has\s+to\s+be)\b|{_MARKS}[:=])"
    rf"{_ADVERBS}{_MARKS}(?:(?:the\s+)?(?:option|choice|letter))?){_MARKS}{_LETTER}"
)
_IS_CORRECT = re.compile(
    rf"\b(?i:option|choice|answer){_MARKS}\(?([A-D])\)?{_MARKS}(?i:is|must\s+be|seems)"
    rf"(?i:{_ADVERBS}(?:\s+(?:the|best))*)\s+(?i:correct|right|true|answer|choice|one)\b"
)
_CHOSEN = re.compile(
    r"\b(?i:so|thus|therefore|hence|choose|chose|pick|select|go(?:ing)?\s+with)\s?,?\s?"
    r"(?i:the\s)?(?i:answer\s|option\s|choice\s)?(?i:is\s)?\(([A-Da-d])\)"
)
_LAST_LINE = re.compile(rf"{_MARKS}(?:\(\s?([A-Da-d])\s?\)|([A-D]))[).:]?\.?{_MARKS}")
_CHOICE = re.compile(
    rf"{_MARKS}(?:\(\s?([A-Da-d])\s?\)|([A-D])[).:]){_MARKS}\s"
    r"(?!\s*(?:is|are|was|can|cannot|would|does|has|and|or)\b).*"
)


def find_letter(text: str) -> str | None:
    """Returns "A", "B", "C" or "D", or None where the completion chooses none.

    Args:
      text: a completion.
    """
    boxed = last_boxed(text)
    if boxed is not None and (letter := read_letter(boxed)):
        return letter
    found = [
        match for pattern in (_ANSWER_IS, _IS_CORRECT, _CHOSEN) for match in pattern.finditer(text)
    ]
    if found:
        return _letter(max(found, key=lambda match: match.end()))
    lines = [line for line in text.split("\n") if line.strip()]
    last, before = ([line[:_LONGEST] for line in reversed(lines[-2:])] + ["", ""])[:2]
    if match := _LAST_LINE.fullmatch(last):
        return _letter(match)
    # After another choice, it is a repetition of them that broke off.
    match = None if _CHOICE.fullmatch(before) else _CHOICE.fullmatch(last)
    return _letter(match) if match else None


def read_letter(answer: str) -> str | None:
    """Returns the letter that a box holds, or None.

    Args:
      answer: the content of a box.
    """
    plain = re.sub(r"[{}$*]|\\[,;: ]", "", _STYLES.sub("", answer[:_LONGEST])).strip()
    match = _IN_BOX.fullmatch(plain)
    return match[1].upper() if match else None


def _letter(match: re.Match[str]) -> str:
    return next(group for group in match.groups() if group).upper()
