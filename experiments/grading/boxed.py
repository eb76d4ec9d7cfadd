r"""The last answer in a box, ``\boxed{...}`` or ``\fbox{...}``, of a completion."""

import re
from typing import NamedTuple

_TOKEN = re.compile(r"\\(?:[A-Za-z]+|.)|[{}]", re.DOTALL)  # an escaped brace is one token
_BOXES = (r"\boxed", r"\fbox")
_EMPTY = re.compile(r"(?:\s|[{}$]|\\(?:boxed|fbox)(?![A-Za-z]))*")
_LONGEST_EMPTY = 100  # characters; the prompts' own empty boxes have two
# Up to a blank, a dollar sign or the end of the formula; one pair of braces may hold blanks.
_WITHOUT_BRACES = re.compile(r"(?:[^\s${}\\]|\\[^\s)\]]|\{[^{}$]*\})*")
_LONGEST_WITHOUT_BRACES = 200  # characters; so that many boxes in a row stay cheap


class _Box(NamedTuple):
    """Where a box's content begins and ends; ``end`` is None where its brace is never closed."""

    start: int
    end: int | None


def last_boxed(text: str) -> str | None:
    r"""Returns what stands in the last box that is not empty.

    Empty boxes are skipped, because completions repeat the prompt's ``\boxed{{}}``. A last box that
    is never closed is no answer, even after a complete one: the text broke off while it was being
    corrected. Without braces (``\boxed 5``) the box holds what comes up to the next blank or dollar
    sign.

    Args:
      text: a completion.

    Returns:
      The content without surrounding blanks, or None where there is no answer.
    """
    for start, end in reversed(_boxes(text)):
        if end is None:
            return None
        if end - start > _LONGEST_EMPTY or not _EMPTY.fullmatch(text, start, end):
            return text[start:end].strip()
    return None


def _boxes(text: str) -> list[_Box]:
    """Every box in the order in which they begin; one pass, as a completion may nest thousands."""
    boxes: list[_Box] = []
    open_braces: list[int | None] = []  # of each, the index of the box whose it is
    position = 0
    while token := _TOKEN.search(text, position):
        position = token.end()
        word = token[0]
        if word in _BOXES:
            start = position
            while start < len(text) and text[start].isspace():
                start += 1
            if text[start : start + 1] == "{":
                position = start + 1
                open_braces.append(len(boxes))
                boxes.append(_Box(position, None))
            else:
                boxes.append(_Box(start, _end_without_braces(text, start)))
        elif word == "{":
            open_braces.append(None)
        elif word == "}" and open_braces:
            index = open_braces.pop()
            if index is not None:
                boxes[index] = _Box(boxes[index].start, token.start())
    return boxes


def _end_without_braces(text: str, start: int) -> int:
    match = _WITHOUT_BRACES.match(text, start, start + _LONGEST_WITHOUT_BRACES)
    return start + len(match[0].rstrip(".,;:")) if match else start
