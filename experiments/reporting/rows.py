"""Reads the folder of an evaluation, and reads series off its rows."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import statistics
from experiments.statistics import ClusteredMean, Row

_LARGEST = 2**63  # beyond it a whole number is none of ours

ENDINGS = ("eos", "length", "not_finite")


class EvaluationFolder(NamedTuple):
    """An evaluation as its folder holds it."""

    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    sessions: list[dict[str, Any]]
    history: list[dict[str, Any]]
    torn_lines: int = 0  # last lines that a killed run left unfinished, and that were skipped


def _is_word(value: Any) -> bool:
    """A heading somewhere: no line ends, no lone surrogates."""
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 <= value < _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST)


def _is_step(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 8
        and all(map(_is_whole, value[:4]))
        and isinstance(value[4], bool)
        and all(number is None or _is_number(number) for number in value[5:])
    )


def _are_wholes(value: Any) -> bool:
    """As ``_is_whole`` of each; token arrays are most of a file, so this goes by whole lists."""
    return isinstance(value, list) and (
        not value or (set(map(type, value)) == {int} and min(value) >= 0 and max(value) < _LARGEST)
    )


def _are_numbers(value: Any) -> bool:
    if not isinstance(value, list):
        return False
    kinds = set(map(type, value)) - {float, type(None)}
    return not kinds or (kinds == {int} and all(map(_NUMBER[1], value)))


# What a field may be: the words of an error message, and its check.
_Kind = tuple[str, Callable[[Any], bool]]
_WORD: _Kind = ("text without control characters", _is_word)
_TEXT: _Kind = ("text", lambda value: isinstance(value, str))
_TEXT_OR_NULL: _Kind = ("text or null", lambda value: value is None or isinstance(value, str))
_WHOLE: _Kind = ("a whole number from 0", _is_whole)
_NUMBER: _Kind = ("a number or null", lambda value: value is None or _is_number(value))
_FLAG: _Kind = ("true or false", lambda value: isinstance(value, bool))
_DURATION: _Kind = (
    "seconds from 0",
    lambda value: _is_number(value) and math.isfinite(value) and value >= 0,
)
_ENDING: _Kind = (" or ".join(ENDINGS), lambda value: value in ENDINGS)
_WHOLES: _Kind = ("a list of whole numbers from 0", _are_wholes)
_NUMBERS: _Kind = ("a list of numbers or nulls", _are_numbers)
_STEPS: _Kind = (
    "a list of [stage, step, cut, divergence, accepted, log_ratio, log_prob, mean_entropy]",
    lambda value: isinstance(value, list) and all(map(_is_step, value)),
)
_PIECES: _Kind = (
    "an object of texts by token number",
    lambda value: isinstance(value, dict) and all(map(_TEXT[1], value.values())),
)
_MOVES: _Kind = (
    "a list of objects",
    lambda value: isinstance(value, list) and all(isinstance(move, dict) for move in value),
)

_ROW = {
    **dict.fromkeys(("problem", "sampler"), _WORD),
    **dict.fromkeys(
        (
            *("seed", "num_tokens", "attempted", "accepted", "null_moves"),
            *("proposed_tokens", "decoded_tokens", "replayed_tokens", "saved_tokens"),
        ),
        _WHOLE,
    ),
    **dict.fromkeys(("log_prob", "entropy", "flops"), _NUMBER),
    **dict.fromkeys(("answer", "gold"), _TEXT_OR_NULL),
    "text": _TEXT,
    "tokens": _WHOLES,
    **dict.fromkeys(("token_log_prob", "token_entropy"), _NUMBERS),
    "ended": _ENDING,
    "correct": _FLAG,
    "steps": _STEPS,
}
_SESSION = {
    "sampler": _WORD,
    **dict.fromkeys(("seconds", "compile_seconds"), _DURATION),
    "rows": _WHOLE,
}
_HISTORY = {
    **dict.fromkeys(("problem", "sampler"), _WORD),
    "seed": _WHOLE,
    "pieces": _PIECES,
    "moves": _MOVES,
}


def read_folder(path: str | Path, flag: str = "--output_dir") -> EvaluationFolder:
    """Reads an evaluation.

    A last line that was never finished, as a killed run leaves it, is skipped and counted.

    Args:
      path: the folder. ``settings.json`` and ``rows.jsonl`` must be there.
      flag: what error messages call the folder.

    Raises:
      ValueError: a file is missing, unreadable or malformed, or a (problem, sampler, seed) stands
        there twice; the message names the file and the line.
    """
    folder = Path(path).expanduser()
    source = f"{flag}={path}"
    settings = _parse(_read(folder, "settings.json", source), f"{source}: settings.json")
    rows, torn_rows = _read_lines(folder, "rows.jsonl", _ROW, source)
    _refuse_doubles(rows, source)
    sessions, torn_sessions = _read_lines(folder, "sessions.jsonl", _SESSION, source, True)
    history, torn_history = _read_lines(folder, "history.jsonl", _HISTORY, source, True)
    torn = torn_rows + torn_sessions + torn_history
    return EvaluationFolder(settings, rows, sessions, history, torn)


def _read(folder: Path, name: str, source: str) -> bytes:
    try:
        return (folder / name).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(
            f"{source}: {name} cannot be read ({reason}); expected the folder of an evaluation, "
            "with settings.json and rows.jsonl"
        ) from error


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {error}; expected a JSON object") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {_shorten(value)}; expected a JSON object")
    return value


def _read_lines(
    folder: Path, name: str, kinds: dict[str, _Kind], source: str, may_be_missing: bool = False
) -> tuple[list[dict[str, Any]], int]:
    """The lines of a file and the number of torn ones, 0 or 1."""
    if may_be_missing and not (folder / name).exists():
        return [], 0
    lines = _read(folder, name, source).split(b"\n")
    torn = 0
    if not _is_object(lines[-1]):
        torn = int(bool(lines.pop()))
    records = []
    for number, line in enumerate(lines, start=1):
        where = f"{source}: {name} line {number}"
        record = _parse(line, where)
        for key, (description, fits) in kinds.items():
            if key not in record:
                raise ValueError(f"{where}: no {key!r}; expected {description}")
            if not fits(record[key]):
                raise ValueError(
                    f"{where}: {key} = {_shorten(record[key])}; expected {description}"
                )
        if kinds is _ROW:
            _check_row(record, where)
        records.append(record)
    return records, torn


def _is_object(line: bytes) -> bool:
    """Whether a line without its line end is whole all the same."""
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except (ValueError, RecursionError):
        return False


def _check_row(row: dict[str, Any], where: str) -> None:
    """What the numbers of a row must have to do with each other."""
    lengths = [len(row[key]) for key in ("tokens", "token_log_prob", "token_entropy")]
    if set(lengths) != {row["num_tokens"]}:
        raise ValueError(
            f"{where}: tokens, token_log_prob and token_entropy have {lengths} entries; expected "
            f"num_tokens = {row['num_tokens']} each"
        )
    if not row["accepted"] <= row["attempted"]:
        raise ValueError(
            f"{where}: accepted = {row['accepted']}; expected at most attempted = "
            f"{row['attempted']}"
        )


def _refuse_doubles(rows: Sequence[dict[str, Any]], source: str) -> None:
    lines: dict[tuple, int] = {}
    for number, row in enumerate(rows, start=1):
        key = (row["problem"], row["sampler"], row["seed"])
        if key in lines:
            raise ValueError(
                f"{source}: rows.jsonl lines {lines[key]} and {number} are both problem {key[0]}, "
                f"sampler {key[1]}, seed {key[2]}; expected one row of each"
            )
        lines[key] = number


def _shorten(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def acceptance_by_stage(rows: Sequence[Row]) -> dict[int, ClusteredMean]:
    """Returns the share of accepted steps of each stage that has any, clustered by problem.

    Args:
      rows: of one sampler.
    """
    sums: dict[int, dict[str, list[int]]] = {}
    for row in rows:
        for stage, _, _, _, accepted, *_ in row["steps"]:
            of_problem = sums.setdefault(stage, {}).setdefault(row["problem"], [0, 0])
            of_problem[0] += accepted
            of_problem[1] += 1
    ratios = {
        stage: statistics.clustered_ratio(*zip(*of_stage.values(), strict=True))
        for stage, of_stage in sorted(sums.items())
    }
    return {stage: ratio for stage, ratio in ratios.items() if ratio}


def cut_density(rows: Sequence[Row], stage_length: int, num_bins: int) -> np.ndarray:
    """Returns the density of cuts over the relative length of their traces.

    The length of a trace at a step is the stage's horizon, or the row's own length if that is less;
    of a chain whose length changes in its last stage it is an estimate. A cut is spread over the
    token that it is at, so that short traces leave no bin out.

    Args:
      rows: any, of one step or more.
      stage_length: tokens that a stage adds to the horizon.
      num_bins: of equal width.

    Returns:
      [num_bins], of mean 1.
    """
    cuts = np.array(
        [
            (max(cut, 1), max(min(stage * stage_length, row["num_tokens"]), cut, 1))
            for row in rows
            for stage, _, cut, *_ in row["steps"]
        ]
    )
    ends, lengths = cuts.T
    edges = np.linspace(0, 1, num_bins + 1)
    below = [np.mean(np.clip(edge * lengths - (ends - 1), 0, 1)) for edge in edges]
    return np.diff(below) * num_bins


def top_jumps(entropies: np.ndarray) -> np.ndarray:
    """Returns the indices of the largest tenth (rounded up) of the upward jumps, ascending.

    Args:
      entropies: [T] nats, NaN where unknown; before the first it is 0, as in the law of cuts.
    """
    jumps = np.nan_to_num(np.maximum(np.diff(entropies, prepend=0.0), 0.0))
    ranked = np.argsort(-jumps, kind="stable")[: math.ceil(len(entropies) / 10)]
    return np.sort(ranked[jumps[ranked] > 0])


def as_floats(values: Sequence[float | None]) -> np.ndarray:
    """Returns the values with NaN for null and for what is not finite."""
    array = np.array([math.nan if value is None else value for value in values], float)
    return np.where(np.isfinite(array), array, math.nan)


def mean_entropies(rows: Sequence[Row], length: int) -> np.ndarray:
    """Returns the mean over rows of the entropy at each of ``length`` positions, NaN without any.

    Args:
      rows: any; those that are shorter do not count beyond their end.
      length: of the result.
    """
    sums, counts = np.zeros(length), np.zeros(length)
    for row in rows:
        values = as_floats(row["token_entropy"])[:length]
        known = np.isfinite(values)
        sums[: len(values)] += np.where(known, values, 0)
        counts[: len(values)] += known
    return np.where(counts > 0, sums / np.maximum(counts, 1), math.nan)


def log_prob_paths(rows: Sequence[Row], steps_per_stage: int, num_steps: int) -> np.ndarray:
    """Returns log p after every step of every row: [rows, num_steps] nats, NaN where not attempted.

    Args:
      rows: any.
      steps_per_stage: at least the largest step of any row.
      num_steps: at least the steps of all stages.
    """
    paths = np.full((len(rows), num_steps), math.nan)
    for path, row in zip(paths, rows, strict=True):
        for stage, step, _, _, _, _, log_prob, _ in row["steps"]:
            path[(stage - 1) * steps_per_stage + step - 1] = (
                math.nan if log_prob is None else log_prob
            )
    return np.where(np.isfinite(paths), paths, math.nan)


def mean_path(rows: Sequence[Row], paths: np.ndarray) -> np.ndarray:
    """Returns the mean of paths by step, each problem counted once; a chain that stopped stays.

    Args:
      rows: of which the paths are.
      paths: by ``log_prob_paths``.

    Returns:
      [num_steps] nats; NaN before any chain has begun.
    """
    means = []
    latest = np.full(len(rows), math.nan)
    for values in paths.T:
        latest = np.where(np.isfinite(values), values, latest)
        known = [
            {"problem": row["problem"], "log_prob": value}
            for row, value in zip(rows, latest.tolist(), strict=True)
        ]
        by_problem = statistics.problem_means(known, statistics.QUANTITIES["log_prob"])
        means.append(statistics.clustered_mean(by_problem.values()))
    return np.array([math.nan if mean is None else mean.mean for mean in means])


def find_stage_length(settings: Row) -> int | None:
    """Returns the tokens that a stage adds, None where the settings do not say."""
    config = settings.get("config")
    if not isinstance(config, dict):
        return None
    longest, stages = config.get("max_new_tokens"), config.get("num_stages")
    if type(longest) is int and type(stages) is int and 0 < stages <= longest:
        return longest // stages
    return None


def choose_example(evaluation: EvaluationFolder) -> Row | None:
    """Returns a row worth a look: with history, of entropy_cut, with steps, correct, if there is.

    Returns:
      A row with at least two known entropies; None if there is none.
    """
    keys = ("problem", "sampler", "seed")
    recorded = {tuple(record[key] for key in keys) for record in evaluation.history}
    rows = [
        row for row in evaluation.rows if np.isfinite(as_floats(row["token_entropy"])).sum() >= 2
    ]
    return max(
        rows,
        key=lambda row: (
            tuple(row[key] for key in keys) in recorded,
            row["sampler"] == "entropy_cut",
            bool(row["steps"]),
            row["correct"],
        ),
        default=None,
    )
