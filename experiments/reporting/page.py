"""One static HTML page of an evaluation: settings, table, figures and a viewer of its traces.

The page is one file that needs no network and no server. What comes out of a model is hostile until
shown otherwise: it travels as JSON in which no character can end the element, reaches the document
as text only, and a content security policy allows this page's own script, style and figures and
nothing else.
"""

import base64
import hashlib
import html
import json
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.reporting import viewer_data

_FOLDER = pathlib.Path(__file__).parent
# What HTML cannot hold, or what turns the order of the text around it.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_NOTHING = "\u2013"
_DASHES = {"\u2212": "-", "\u2013": "-", "\u2014": "-", "\u00d7": "x", ",": ""}
_NUMBER = re.compile(
    r"[<>≤≥~≈x$€]?\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s?([kMGTP](?![A-Za-z]))?"
)
_THOUSANDS = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def build_page(
    title: str,
    settings: dict[str, Any],
    table: list[dict[str, Any]],
    notes: list[str],
    figures: list[tuple[str, str]],
    rows: list[dict[str, Any]],
    history: list[dict[str, Any]],
    pieces: dict[str, str] | None = None,
    max_traces: int = 400,
    max_history_tokens: int = 1_000_000,
) -> str:
    """Returns the page as the text of one HTML file, to be written as UTF-8.

    Args:
      title: heading of the page.
      settings: what determined the evaluation, as in ``settings.json``.
      table: rows of the table of samplers, the same keys in each; values str, number or None.
      notes: sentences that stand below the table.
      figures: caption and SVG text of each figure.
      rows: as in ``rows.jsonl``; every one can be chosen in the viewer.
      history: as in ``history.jsonl``; chains whose every step can be seen.
      pieces: text of tokens by id, for tokens that no history names; others are shown by number.
      max_traces: rows that bring text and tokens, those with history first, then whole problems.
        The page says how many of the rest show their outcome only.
      max_history_tokens: tokens of history that the page holds, shared prefixes not counted twice;
        chains beyond it are left out whole, and the page says so.

    Raises:
      ValueError: the data are not of the form described; the message names the place.
    """
    _check_table(table)
    viewer_data.check_rows(rows)
    viewer_data.check_history(history)
    chains = viewer_data.pack_chains(history, rows, max_history_tokens)
    shown, outcomes_only = viewer_data.choose_rows(rows, chains, max_traces)
    texts = {token: text for chain in history for token, text in chain["pieces"].items()}
    data = {
        "rows": shown,
        "history": chains,
        "pieces": viewer_data.pieces_in_use(shown, chains, texts | (pieces or {})),
    }
    style = (_FOLDER / "page.css").read_text(encoding="utf-8")
    script = "".join(
        (_FOLDER / name).read_text(encoding="utf-8") for name in ("page.js", "page_chain.js")
    )
    values = {
        "policy": (
            f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; "
            "img-src data:; base-uri 'none'; form-action 'none'"
        ),
        "title": _text(title),
        "style": style,
        "facts": _facts(settings),
        "settings": "".join(
            f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
            for name, value in _flatten(settings)
        ),
        "results": _results(table, notes),
        "figures": _figures(figures),
        "omissions": _omissions(len(rows), outcomes_only, len(history), len(chains)),
        "data": embed_json(data),
        "script": script,
    }
    template = (_FOLDER / "page.html").read_text(encoding="utf-8")
    return re.sub(r"{{(\w+)}}", lambda found: values[found.group(1)], template)


def embed_json(value: Any) -> str:
    """Returns JSON in ASCII that no HTML parser can take for markup.

    Numbers that JSON does not know are written as the strings "NaN", "Infinity" and "-Infinity".

    Raises:
      ValueError: ``value`` holds something else than JSON's own kinds.
    """
    text = json.dumps(_finite(value), allow_nan=False, separators=(",", ":"))
    # ensure_ascii has taken care of U+2028, of lone surrogates and of everything else above 127.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, str | bool | int | float):
        return value
    raise ValueError(f"{value!r} of type {type(value).__name__}; expected what JSON can hold")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(value: Any) -> str:
    """Escapes text of the static part; what cannot be seen there becomes its number."""
    return html.escape(_UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", str(value)))


def _flatten(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{name}.")
        elif isinstance(value, str):
            yield f"{prefix}{name}", value
        else:
            yield f"{prefix}{name}", json.dumps(value, default=str)


def _facts(settings: dict[str, Any]) -> str:
    """The line below the heading: what was asked of which model."""
    facts = []
    for name, keys in (("task", ()), ("model", ("name",)), ("data", ("file", "rows"))):
        value = settings.get(name)
        if isinstance(value, dict):
            parts = [value[key] for key in keys if value.get(key) is not None]
            value = ", ".join(f"{part} rows" if isinstance(part, int) else part for part in parts)
        if value:
            facts.append(f"<span><b>{name.capitalize()}</b> {_text(value)}</span>")
    return f'<p class="facts">{"".join(facts)}</p>' if facts else ""


def _check_table(table: Sequence[dict[str, Any]]) -> None:
    for place, row in enumerate(table):
        if list(row) != list(table[0]):
            raise ValueError(
                f"row {place} of the table has the keys {list(row)}; expected {list(table[0])}"
            )


def _sort_number(value: Any) -> float | None:
    """The number that a cell starts with, by which its column is sorted."""
    if isinstance(value, int | float):
        return float(value) if math.isfinite(value) else None
    found = _NUMBER.match(_plain(value)) if isinstance(value, str) else None
    if not found:
        return None
    number = float(found.group(1)) * 1000.0 ** _THOUSANDS[found.group(2) or ""]
    return number if math.isfinite(number) else None


def _plain(cell: str) -> str:
    return cell.translate(str.maketrans(_DASHES)).strip()


def _results(table: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    if not table and not notes:
        return ""
    parts = ['<section aria-labelledby="results-heading"><h2 id="results-heading">Results</h2>']
    if table:
        numbers = {name: [_sort_number(row[name]) for row in table] for name in table[0]}
        numeric = {
            name: any(number is not None for number in column)
            and all(
                number is not None or row[name] is None or _plain(str(row[name])) in ("", "-")
                for number, row in zip(column, table, strict=True)
            )
            for name, column in numbers.items()
        }
        parts.append(
            '<div class="scroll" tabindex="0" role="region" aria-label="Results by sampler">'
            '<table id="table"><thead><tr>'
        )
        for name in table[0]:
            kind = ' class="number"' if numeric[name] else ""
            parts.append(f'<th scope="col"{kind}><button type="button">{_text(name)}</button></th>')
        parts.append("</tr></thead><tbody>")
        for place, row in enumerate(table):
            cells = []
            for column, (name, value) in enumerate(row.items()):
                tag = "td" if column else 'th scope="row"'
                kind = f' class="number" data-sort="{numbers[name][place]}"' * numeric[name]
                cells.append(
                    f"<{tag}{kind}>{_text(_NOTHING if value is None else value)}</{tag[:2]}>"
                )
            parts.append(f"<tr>{''.join(cells)}</tr>")
        parts.append("</tbody></table></div>")
    if notes:
        items = "".join(f"<li>{_text(note)}</li>" for note in notes)
        parts.append(f'<ul class="notes">{items}</ul>')
    return "".join(parts) + "</section>"


def _figures(figures: Sequence[tuple[str, str]]) -> str:
    """Figures as images: an SVG in an image runs no script and loads nothing."""
    parts = []
    for caption, svg in figures:
        if "<svg" not in svg:
            raise ValueError(f"figure {caption!r} starts with {svg[:40]!r}; expected SVG")
        coded = base64.b64encode(svg.encode("utf-8", "replace")).decode()
        parts.append(
            f'<figure><img alt="{_text(caption)}" src="data:image/svg+xml;base64,{coded}">'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )
    if not parts:
        return ""
    return (
        '<section aria-labelledby="figures-heading"><h2 id="figures-heading">Figures</h2>'
        f'<div class="figures">{"".join(parts)}</div></section>'
    )


def _omissions(rows: int, outcomes_only: int, chains: int, chains_held: int) -> str:
    """What the page leaves out, to bound its size."""
    sentences = []
    if outcomes_only:
        sentences.append(
            f"Of {rows:,} traces this page holds the text and tokens of {rows - outcomes_only:,}; "
            f"the other {outcomes_only:,} show their outcome only. All are in rows.jsonl."
        )
    if chains_held < chains:
        sentences.append(
            f"Of {chains:,} chains with recorded steps this page holds {chains_held:,}. "
            "All are in history.jsonl."
        )
    return f'<p class="omissions">{" ".join(sentences)}</p>' if sentences else ""
