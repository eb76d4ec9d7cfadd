"""What the page's trace viewer needs of the rows and of the history, checked and made small."""

from collections.abc import Sequence
from typing import Any

_OUTCOME = ("problem", "sampler", "seed", "answer", "gold", "correct", "num_tokens", "ended")
_TRACE = (
    *("text", "tokens", "token_log_prob", "token_entropy", "log_prob", "entropy"),
    *("attempted", "accepted", "null_moves"),
)
_STEP = (
    *("cut", "divergence", "accepted", "stopped", "log_uniform", "log_ratio"),
    *("weight_new", "weight_old", "cut_change"),
)
_TRACES_OF_MOVE = ("trace", "current", "proposal")  # as packed here
_CHAIN = ("problem", "sampler", "seed", "prompt")


def key_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Returns what a row and the history of its chain have in common."""
    return record["problem"], record["sampler"], record["seed"]


def check_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where a row lacks what the viewer shows."""
    for place, row in enumerate(rows):
        where = f"row {place} of rows.jsonl"
        _need(row, (*_OUTCOME, *_TRACE), where)
        _need_lists(row, ("tokens", "token_entropy", "token_log_prob"), where)


def check_history(history: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError where a chain lacks what the viewer shows, or does not fit together."""
    for place, chain in enumerate(history):
        where = f"chain {place} of history.jsonl"
        _need(chain, (*_CHAIN, "pieces", "moves"), where)
        for number, move in enumerate(chain["moves"]):
            _check_move(move, f"{where}, move {number}")


def _check_move(move: dict[str, Any], where: str) -> None:
    _need(move, ("stage", "step", "kind"), where)
    if move["kind"] == "extension":
        _need_lists(move, ("tokens", "entropy"), where)
    elif move["kind"] == "step":
        _need(move, _STEP, where)
        for name in ("current", "proposal"):
            _need_lists(move, (f"{name}_tokens", f"{name}_entropy"), where)
        longest = len(move["current_tokens"])
        for name, least in (("cut", 1), ("divergence", 0)):
            if not least <= move[name] <= longest:
                raise ValueError(
                    f"{where}: {name}={move[name]}; expected {least} to {longest}, the last token"
                )
    else:
        raise ValueError(f"{where}: kind={move['kind']!r}; expected extension or step")


def _need(record: dict[str, Any], names: Sequence[str], where: str) -> None:
    missing = [name for name in names if name not in record]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _need_lists(record: dict[str, Any], names: Sequence[str], where: str) -> None:
    """Holds that the named entries are lists of the same length."""
    _need(record, names, where)
    for name in names:
        if not isinstance(record[name], list):
            raise ValueError(f"{where}: {name}={record[name]!r}; expected a list")
    lengths = [len(record[name]) for name in names]
    if len(set(lengths)) > 1:
        raise ValueError(f"{where}: {', '.join(names)} have {lengths} entries; expected as many")


def choose_rows(
    rows: Sequence[dict[str, Any]], chains: Sequence[dict[str, Any]], max_traces: int
) -> tuple[list[dict[str, Any]], int]:
    """Strips what the viewer does not need, to bound the page's size.

    Args:
      rows: all of them.
      chains: those with recorded steps.
      max_traces: rows that keep text and tokens, those of ``chains`` first, then whole problems.

    Returns:
      The rows in their order, and how many of them lost text and tokens.
    """
    recorded = {key_of(chain) for chain in chains}
    problems = dict.fromkeys(record["problem"] for record in (*chains, *rows))
    order = {problem: place for place, problem in enumerate(problems)}
    by_use = sorted(
        range(len(rows)),
        key=lambda place: (key_of(rows[place]) not in recorded, order[rows[place]["problem"]]),
    )
    chosen = set(by_use[: max(max_traces, 0)])
    kept = [
        {name: row[name] for name in (*_OUTCOME, *(_TRACE if place in chosen else ()))}
        for place, row in enumerate(rows)
    ]
    return kept, len(rows) - len(chosen)


def pieces_in_use(
    rows: Sequence[dict[str, Any]], chains: Sequence[dict[str, Any]], texts: dict[str, str]
) -> dict[str, str]:
    """Returns those of ``texts``, by token id, that a trace of ``rows`` or ``chains`` has."""
    traces = [row for row in rows if "tokens" in row]
    moves = [move for chain in chains for move in chain["moves"]]
    traces += [move[name] for move in moves for name in _TRACES_OF_MOVE if name in move]
    used = {str(token) for trace in traces for token in trace["tokens"]}
    return {token: text for token, text in texts.items() if token in used}


def pack_chains(
    history: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]], max_tokens: int
) -> list[dict[str, Any]]:
    """Packs the chains of ``rows``: each trace less what it shares with the one before it.

    Args:
      history: chains as in ``history.jsonl``.
      rows: those that can be chosen.
      max_tokens: tokens that all packed chains together may hold; a chain beyond is left out.
    """
    wanted = {key_of(row) for row in rows}
    packed, total = [], 0
    for chain in history:
        if key_of(chain) not in wanted:
            continue
        moves = _pack_moves(chain["moves"])
        size = sum(len(m[name]["tokens"]) for m in moves for name in _TRACES_OF_MOVE if name in m)
        if total + size <= max_tokens:
            packed.append({name: chain[name] for name in _CHAIN} | {"moves": moves})
            total += size
    return packed


def _pack_moves(moves: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    packed = []
    trace: list[tuple[int, float]] = []  # the chain's own, after each move
    for move in moves:
        entry = {name: move[name] for name in ("stage", "step", "kind")}
        if move["kind"] == "extension":
            extended = _read_trace(move, "")
            entry["trace"] = _shorten(extended, trace)
            trace = extended
        else:
            current, proposal = _read_trace(move, "current_"), _read_trace(move, "proposal_")
            entry |= {name: move[name] for name in _STEP}
            entry["current"] = _shorten(current, trace)
            entry["proposal"] = _shorten(proposal, current)
            trace = proposal if move["accepted"] else current
        packed.append(entry)
    return packed


def _read_trace(move: dict[str, Any], prefix: str) -> list[tuple[int, float]]:
    return list(zip(move[f"{prefix}tokens"], move[f"{prefix}entropy"], strict=True))


def _shorten(
    trace: Sequence[tuple[int, float]], reference: Sequence[tuple[int, float]]
) -> dict[str, Any]:
    """Returns a trace as the tokens that it keeps of ``reference`` and what follows them."""
    keep = 0
    while keep < min(len(trace), len(reference)) and trace[keep] == reference[keep]:
        keep += 1
    rest = trace[keep:]
    return {"keep": keep, "tokens": [t for t, _ in rest], "entropy": [h for _, h in rest]}
