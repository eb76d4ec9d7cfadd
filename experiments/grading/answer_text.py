r"""What the text of a mathematical answer says before any mathematics: cleaning, numbers, parts.

Nothing here evaluates an expression; plain numbers are read as exact fractions.
"""

import re
from fractions import Fraction
from typing import Literal, NamedTuple

LONGEST = 1000  # characters of an answer; longer ones are refused unread
LEAST_DIGITS = 6  # of a decimal that stands for an exact value

Kind = Literal["scalar", "ordered", "unordered", "matrix"]


class Parts(NamedTuple):
    """An answer taken apart.

    Attributes:
      kind: "ordered" is a point or an interval, "unordered" a set or a list.
      brackets: of an ordered answer, such as "(]"; else empty.
      rows: the elements; of a matrix one tuple a row, of all else one tuple.
    """

    kind: Kind
    brackets: str
    rows: tuple[tuple[str, ...], ...]


class Quantity(NamedTuple):
    """A plain number.

    Attributes:
      value: as written; 50 for fifty percent.
      percent: whether a percent sign follows.
      digits: significant digits of a decimal fraction; 0 for an integer or a quotient.
      places: digits after the point.
    """

    value: Fraction
    percent: bool
    digits: int
    places: int


_UNICODE = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013", "-"),
        **{"\u00d7": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty "},
        **{"≤": r"\le ", "≥": r"\ge ", "±": r"\pm ", "\u222a": r"\cup ", "∈": r"\in ", "°": ""},
        **{"⟨": "(", "⟩": ")", "\u00a0": " ", "\0": ""},
    }
)
_END = r"(?![A-Za-z])"
_REPLACED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<!\\)\\([()\[\]])", " "),  # \( and \[ around the answer, not \\[2pt] in a matrix
        (r"(?<=\d),\s*\\!\s*(?=\d{3}(?!\d))", ""),  # 10,\!080
        (r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ""),  # 10{,}080
        (r"(?<=\d)(?:\\[!,;: ]|~)+\s*(?=\d{3}(?!\d))", ""),  # 10\,080
        (rf"(?<!\\)\\[!,;:> ]|\\q?quad{_END}|\\displaystyle{_END}|~", " "),
        (rf"\\(?:left|right|[bB]igg?[lr]?){_END}\s*\.?", ""),
        (rf"\\lbrace{_END}", r"\\{"),
        (rf"\\rbrace{_END}", r"\\}"),
        (rf"\\langle{_END}", "("),
        (rf"\\rangle{_END}", ")"),
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        (rf"\\le(?:q|qslant){_END}", r"\\le"),
        (rf"\\ge(?:q|qslant){_END}", r"\\ge"),
        (r"\\(?:mbox|textbf|textrm|textit|textnormal|mathrm|operatorname)\s*\{", r"\\text{"),
        (r"\\(?:mathbf|boldsymbol|mathit)\s*\{([^{}]*)\}", r"\1"),
        (r"\\text\s*\{\s*([-+]?[\d.,/]+)\s*\}", r"\1"),
        (r"√\s*(\d+|\w)", r"\\sqrt{\1}"),
        (r"\\frac\s*([0-9a-zA-Z])\s*([0-9a-zA-Z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9a-zA-Z])\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*([0-9a-zA-Z])", r"\1{\2}"),
        (r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}"),
        (rf"\^\s*\{{\s*\\circ\s*\}}|\^\s*\\circ{_END}|\\degree{_END}", ""),
        (r"\\?[$€£]|\*\*", ""),
        (r"\s+", " "),
        (r"^(-?\d{1,3})((?: \d{3})+)$", lambda match: match[1] + match[2].replace(" ", "")),
    )
)
_OVERLINE = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
_AND = re.compile(
    r"(?:\s*,)?\s*(?:\\text\s*\{\s*(?:,\s*)?(?:and|or)\s*\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z]))\s*",
    re.IGNORECASE,
)
_DECIMAL = re.compile(r"([-+]?) ?(\d{1,3}(?:,\d{3})+|\d*)(?:\.(\d*))?")
_QUOTIENT = re.compile(
    r"([-+]?) ?(?:(\d+) ?)??(?:\\frac ?\{ ?(-?\d+) ?\} ?\{ ?(\d+) ?\}|(\d+) ?/ ?(\d+))"
)
_NAME = re.compile(r"(?:[A-Za-z](?:_\{?\w\}?)?|[a-z]\([a-z]\)) ?(?:=|\\in(?![A-Za-z])) ?")
_BASE = re.compile(r"\(?([0-9][0-9A-F]*)\)? ?_ ?\{? ?(\d{1,2}) ?\}?")
_UNITS = (
    ("mm", "millimeter", "millimeters"),
    ("cm", "centimeter", "centimeters"),
    ("m", "meter", "meters"),
    ("km", "kilometer", "kilometers"),
    ("in", "inch", "inches"),
    ("ft", "foot", "feet"),
    ("yd", "yard", "yards"),
    ("mi", "mile", "miles"),
    ("g", "gram", "grams"),
    ("kg", "kilogram", "kilograms"),
    ("lb", "lbs", "pound", "pounds"),
    ("s", "sec", "second", "seconds"),
    ("min", "mins", "minute", "minutes"),
    ("h", "hr", "hrs", "hour", "hours"),
    ("day", "days"),
    ("week", "weeks"),
    ("year", "years"),
    ("cent", "cents"),
    ("dollar", "dollars"),
)
_UNIT_NAMES = {name: names[0] for names in _UNITS for name in names}
# A single letter is a unit only after digits and a blank: 5m is 5 times m.
_UNIT_IN_TEXT = re.compile(r"(?<=[\d})])\s*\\text ?\{([^{}]*)\}(?: ?\^ ?\{? ?\d ?\}?)?$")
_LONG_NAMES = "|".join(
    sorted((name for name in _UNIT_NAMES if len(name) > 1), key=len, reverse=True)
)
_UNIT_IN_LETTERS = re.compile(
    r"(?<=[\d})]) ?(?:sq(?:uare)?\.? |cubic )?"
    rf"({_LONG_NAMES}|(?<=\d )[mgsh]|(?<= )[a-z]{{4,}}(?: [a-z]+)*)"
    r"\.?(?: ?\^ ?\{? ?\d ?\}?)?$"
)
_TEXT = re.compile(r"\\text ?\{([^{}\\$]*)\}")
_WORDS = re.compile(r"[A-Za-z0-9 ()'.,-]*")
_MATRIX = re.compile(
    r"\\begin ?\{([bpvBV]?matrix|array)\} ?(?:\{[lcr| ]*\})?(.*)\\end ?\{\1\}", re.DOTALL
)
_OPENING, _CLOSING = "([{", ")]}"


def clean(answer: str) -> str:
    r"""Returns the answer in one way of writing: no ``\left``, ``\dfrac``, currency, degree sign.

    Args:
      answer: LaTeX or plain text, up to ``LONGEST`` characters.
    """
    text = answer.translate(_UNICODE)
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text.strip())
    text = _OVERLINE.sub(_repeating_decimal, text)
    text = text.strip().rstrip(".,;").strip()
    # Brackets around everything; thousands of them would keep a parser busy for ever.
    while text[:1] in ("{", "(") and _matching(text) == len(text) - 1:
        if text[0] + text[-1] not in ("{}", "()") or len(_split(text[1:-1])) > 1:
            break
        text = text[1:-1].strip()
    return text


def read_quantity(text: str) -> Quantity | None:
    """Reads a cleaned answer that is one plain number, whatever its unit; 1 4/5 is 9/5."""
    text = split_unit(text)[0]
    body = re.sub(r" ?\\?%$", "", text)
    if match := _DECIMAL.fullmatch(body):
        sign, whole, places = match.groups()
        digits = (whole + (places or "")).replace(",", "")
        if not digits:
            return None
        value = Fraction(int(digits), 10 ** len(places or ""))
        significant = len(digits.lstrip("0")) if places else 0
    elif match := _QUOTIENT.fullmatch(body):
        sign, whole, *quotients = match.groups()
        above, below = (int(part) for part in quotients if part)
        if below == 0 or (whole and above < 0):
            return None
        value, places, significant = int(whole or 0) + Fraction(above, below), "", 0
    else:
        return None
    value = -value if sign == "-" else value
    return Quantity(value, body != text, significant, len(places or ""))


def split_unit(text: str) -> tuple[str, str | None]:
    """Splits the unit off a cleaned answer.

    Returns:
      The answer without it, and the unit in its shortest spelling, or None where it is not known.
    """
    match = _UNIT_IN_TEXT.search(text)
    if match is None:
        match = _UNIT_IN_LETTERS.search(text)
        # After anything but a number, letters may be variables.
        if match is None or not _is_number(text[: match.start()].strip()):
            return text, None
    name = re.sub(r"^(?:square|cubic|sq\.?) ", "", match[1].strip(" .").lower())
    return text[: match.start()].strip(), _UNIT_NAMES.get(name)


def _is_number(text: str) -> bool:
    return bool(text and (_DECIMAL.fullmatch(text) or _QUOTIENT.fullmatch(text)))


def parts(text: str) -> Parts:
    """Takes a cleaned answer apart at its outermost commas."""
    text = _AND.sub(", ", text).strip()
    if match := _MATRIX.fullmatch(text):
        lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", match[2]) if line.strip()]
        rows = tuple(tuple(cell.strip() for cell in line.split("&")) for line in lines)
        return Parts("matrix", "", rows)
    is_set = text.startswith(r"\{") and text.endswith(r"\}") and _matching(text, 1) == len(text) - 1
    if is_set and text[2:-2].strip():
        return Parts("unordered", "", (_split(text[2:-2]),))
    if text[:1] in ("(", "[") and _matching(text) == len(text) - 1:
        elements = _split(text[1:-1])
        if len(elements) > 1:
            return Parts("ordered", text[0] + text[-1], (elements,))
    elements = _split(text)
    if len(elements) > 1 and not _DECIMAL.fullmatch(text):
        return Parts("unordered", "", (elements,))
    return Parts("scalar", "", ((text,),))


def plain_words(text: str) -> str | None:
    r"""Returns a cleaned answer in small letters if it is words (``\text{(B)}``: "b"), else None.

    A single letter or two and three together may be variables; they are words only in ``\text``.
    """
    plain = _TEXT.sub(r" \1 ", text)
    if not _WORDS.fullmatch(plain) or not any(letter.isalpha() for letter in plain):
        return None
    words = re.sub(r"[^a-z0-9]+", " ", plain.lower()).strip()
    in_text = _TEXT.sub("", text).strip(" ().,") == "" and plain != text
    return words if in_text or re.fullmatch(r"[a-z]{4,}(?: [a-z]+)*", words) else None


def letters_only(text: str) -> str:
    """Returns a cleaned answer's letters and digits in small letters, to compare with words."""
    return re.sub(r"[^a-z0-9]+", " ", _TEXT.sub(r" \1 ", text).lower()).strip()


def without_name(text: str) -> str:
    r"""Returns a cleaned answer without ``x =``, ``f(x) =`` or ``x \in`` before it."""
    return _NAME.sub("", text, count=1) if _NAME.match(text) and text.count("=") < 2 else text


def base(text: str) -> tuple[str, str | None]:
    """Returns the digits of a cleaned answer and the base that it names, ("4210", "5")."""
    match = _BASE.fullmatch(text)
    return (match[1], match[2]) if match else (text, None)


def approximates(answer: Quantity, exact: Fraction) -> bool:
    """Whether a decimal is ``exact`` rounded to its places and has enough digits to tell."""
    scale = 10**answer.places
    return answer.digits >= LEAST_DIGITS and answer.value == Fraction(round(exact * scale), scale)


def _repeating_decimal(match: re.Match[str]) -> str:
    whole, fixed, period = match.groups()
    below = (10 ** len(period) - 1) * 10 ** len(fixed)
    above = int((whole + fixed + period) or 0) - int((whole + fixed) or 0)
    return rf"\frac{{{above}}}{{{below}}}"


def _matching(text: str, start: int = 0) -> int:
    """Index of the bracket that closes the one at ``start``; any kind closes any; -1 if none."""
    depth = 0
    for index in range(start, len(text)):
        if text[index] in _OPENING:
            depth += 1
        elif text[index] in _CLOSING:
            depth -= 1
            if depth == 0:
                return index
    return -1


def _split(text: str) -> tuple[str, ...]:
    elements, depth, start = [], 0, 0
    for index, character in enumerate(text):
        if character in _OPENING:
            depth += 1
        elif character in _CLOSING:
            depth -= 1
        elif character in ",;" and depth == 0:
            elements.append(text[start:index].strip())
            start = index + 1
    return (*elements, text[start:].strip())
