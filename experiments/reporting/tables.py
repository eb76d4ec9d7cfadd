"""Tables of an evaluation: what each sampler reaches, at which cost, and who differs from whom."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from experiments import statistics
from experiments.reporting.rows import EvaluationFolder
from experiments.statistics import ClusteredMean, Estimate, Resampling, Row

_REFERENCE = "entropy_cut"
_BASELINE = "standard"
_ABSENT = "-"

Table = list[dict[str, str]]  # rows with the same keys: heading -> what stands there


def summarise(
    evaluation: EvaluationFolder,
    reference: str | None = None,
    baseline: str | None = None,
    price_per_million_tokens: float | None = None,
    answer_key: Callable[[str], str] = str,
    resampling: Resampling = statistics.DEFAULT_RESAMPLING,
) -> dict[str, Any]:
    """Returns all figures of an evaluation.

    Args:
      evaluation: what to describe.
      reference: the sampler that the others are tested against. Default: entropy_cut if it is
        there, else no tests.
      baseline: the sampler whose costs are 1. Default: standard if it is there, else no multiples.
      price_per_million_tokens: price of a million decoded tokens, in any currency.
      answer_key: a normal form of answers: those that it makes equal vote together.
      resampling: of the intervals.

    Returns:
      "samplers": figures by name (``statistics.describe_sampler``, with "multiples" of the
      baseline's costs and what a correct answer costs), "pairwise": comparisons with the reference
      (``statistics.compare``, with p-values adjusted by Holm's method), "notes": sentences that
      belong under the tables.

    Raises:
      ValueError: a sampler that was asked for has no row, or the price is not a number from 0.
    """
    by_sampler = statistics.group_by(evaluation.rows, "sampler")
    by_sampler = {name: by_sampler[name] for name in _order(evaluation, list(by_sampler))}
    reference = _choose("reference", reference, _REFERENCE, by_sampler)
    baseline = _choose("baseline", baseline, _BASELINE, by_sampler)
    price = price_per_million_tokens
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise ValueError(f"--price_per_million_tokens={price}; expected a number from 0")
    samplers = {
        name: statistics.describe_sampler(
            rows,
            [session for session in evaluation.sessions if session["sampler"] == name],
            answer_key,
            resampling,
        )
        for name, rows in by_sampler.items()
    }
    for name, figures in samplers.items():
        tokens = _mean(figures["decoded_tokens"])
        solution = cost_of_a_solution(tokens, figures["accuracy"].value)
        figures["decoded_tokens_per_solution"] = solution
        figures["price_per_solution"] = (
            None if price is None or solution is None else solution * price / 1e6
        )
        figures["multiples"] = (
            cost_multiples(by_sampler[name], by_sampler[baseline], figures, samplers[baseline])
            if baseline
            else None
        )
    pairwise = _compare_all(by_sampler, samplers, reference, resampling) if reference else []
    summary = {
        "task": evaluation.settings.get("task"),
        "reference": reference,
        "baseline": baseline,
        "price_per_million_tokens": price,
        "resampling": resampling,
        "torn_lines": evaluation.torn_lines,
        "samplers": samplers,
        "pairwise": pairwise,
    }
    return summary | {"notes": _notes(summary)}


def cost_multiples(
    rows: Sequence[Row], baseline_rows: Sequence[Row], figures: Row, baseline: Row
) -> dict[str, float | None]:
    """Returns mean costs as multiples of the baseline's: ratios of means, not means of ratios.

    Tokens and operations are compared over the problems that both have; seconds by row as they
    stand. A multiple is None where either cost is unknown or the baseline's is 0.

    Args:
      rows: of the sampler.
      baseline_rows: of the baseline.
      figures: of the sampler, by ``statistics.describe_sampler``.
      baseline: the same of the baseline.
    """
    multiples: dict[str, float | None] = {}
    for name in ("decoded_tokens", "flops"):
        quantity = statistics.QUANTITIES[name]
        ours = statistics.problem_means(rows, quantity)
        theirs = statistics.problem_means(baseline_rows, quantity)
        common = [problem for problem in ours if problem in theirs]
        multiples[name] = _ratio(
            sum(ours[problem] for problem in common), sum(theirs[problem] for problem in common)
        )
    return multiples | {"seconds": _ratio(figures["seconds"], baseline["seconds"])}


def cost_of_a_solution(cost: float | None, accuracy: float) -> float | None:
    """Returns what a correct answer costs on average, cost by row / accuracy; None if none is."""
    return cost / accuracy if cost is not None and accuracy > 0 else None


def _compare_all(
    by_sampler: dict[str, list[Row]],
    samplers: dict[str, dict[str, Any]],
    reference: str,
    resampling: Resampling,
) -> list[dict[str, Any]]:
    pairwise = []
    for name, rows in by_sampler.items():
        if name == reference:
            continue
        compared = statistics.compare(by_sampler[reference], rows, resampling)
        if compared:
            multiples = cost_multiples(
                by_sampler[reference], rows, samplers[reference], samplers[name]
            )
            pairwise.append({"sampler": name} | compared | {"multiples": multiples})
    for test in ("mcnemar", "sign_flip"):
        adjusted = statistics.holm([compared[test].p_value for compared in pairwise])
        for compared, p_value in zip(pairwise, adjusted, strict=True):
            compared[f"{test}_holm"] = p_value
    return pairwise


def _order(evaluation: EvaluationFolder, present: list[str]) -> list[str]:
    """Samplers as the settings name them, then others as they come."""
    named = evaluation.settings.get("samplers")
    known = [name for name in named if name in present] if isinstance(named, dict) else []
    return known + [name for name in present if name not in known]


def _choose(flag: str, name: str | None, default: str, present: Mapping[str, Any]) -> str | None:
    if name is not None and name not in present:
        raise ValueError(
            f"--{flag}={name} has no row; expected one of {', '.join(present) or 'none at all'}"
        )
    return name if name is not None else default if default in present else None


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _mean(mean: ClusteredMean | None) -> float | None:
    return None if mean is None else mean.mean


def _notes(summary: dict[str, Any]) -> list[str]:
    resampling, samplers = summary["resampling"], summary["samplers"]
    if not samplers:
        return ["There are no rows."]
    notes = [
        "Each problem counts once, by the mean over its rows. "
        f"Brackets: {resampling.confidence:.0%} BCa bootstrap intervals over problems "
        f"({resampling.num_resamples:,} resamples); ±: standard errors over problems.",
        "Decoded tokens are those drawn from fresh logits, rejected ones included; prompts are "
        "not counted. log p is of whole completions, in nats, under the truncated law.",
    ]
    if summary["baseline"]:
        notes.append(f"Costs are multiples of {summary['baseline']}'s, ratios of means.")
    else:
        notes.append(f"No multiples of costs: {_BASELINE} has no row.")
    if summary["pairwise"]:
        notes.append(
            f"Differences are {summary['reference']} - the other, over the problems and seeds "
            "that both have. p: clustered McNemar test (Durkalski et al. 2003); exact p: all sign "
            "flips of the problems' differences, to be preferred where few problems differ; Holm: "
            f"adjusted for the number of comparisons, {len(summary['pairwise'])}."
        )
    elif not summary["reference"]:
        notes.append(f"No tests: {_REFERENCE} has no row.")
    compared = [summary["reference"], *(pair["sampler"] for pair in summary["pairwise"])]
    unpaired = [name for name in samplers if summary["reference"] and name not in compared]
    if unpaired:
        notes.append(f"Without a problem and seed in common: {', '.join(unpaired)}.")
    counts = {(figures["problems"], *figures["rows_per_problem"]) for figures in samplers.values()}
    if len(counts) > 1 or any(fewest != most for _, fewest, most in counts):
        notes.append(
            "The evaluation is not complete: samplers or problems differ in their rows, so "
            "figures of different samplers may cover different problems. pass@k stops at the "
            "fewest rows of a problem."
        )
    for name, figures in samplers.items():
        failed = figures["ended"].get("not_finite", 0)
        if failed:
            notes.append(f"{name}: {failed} rows ended where the model gave no finite numbers.")
        if not figures["accuracy"].value:
            notes.append(f"{name}: no row is correct, so no cost of a solution.")
    if summary["torn_lines"]:
        notes.append(f"{summary['torn_lines']} unfinished last lines of files were skipped.")
    return notes


def main_table(summary: dict[str, Any]) -> Table:
    """Returns one row a sampler; columns that would be empty throughout are left out."""
    most = max((len(figures["pass_at"]) for figures in summary["samplers"].values()), default=1)
    chances = sorted({2**power for power in range(1, most.bit_length()) if 2**power <= most})
    if most > 1 and most not in chances:
        chances.append(most)
    interval = f"[{summary['resampling'].confidence:.0%}]"
    table = []
    for name, figures in summary["samplers"].items():
        multiples = figures["multiples"] or {}
        fewest, largest = figures["rows_per_problem"]
        by_problem = str(fewest) if fewest == largest else f"{fewest} to {largest}"
        table.append(
            {
                "sampler": name,
                "problems x rows": f"{figures['problems']} x {by_problem}",
                f"accuracy % {interval}": _percent(figures["accuracy"]),
                "cost": _times(multiples.get("decoded_tokens")),
                "decoded tokens": _number(_mean(figures["decoded_tokens"]), ",.0f"),
                **{f"pass@{k} %": _percent(figures["pass_at"].get(k), False) for k in chances},
                f"majority % {interval}": _percent(figures["majority"]),
                "answered %": _percent(figures["answered"], False),
                "log p": _with_error(figures["log_prob"], ".1f"),
                "log p by token": _with_error(figures["log_prob_per_token"], ".3f"),
                "entropy by token": _with_error(figures["entropy_per_token"], ".3f"),
                "tokens": _with_error(figures["num_tokens"], ",.1f"),
                "accepted %": _number(_mean(figures["acceptance"]), ".1%").rstrip("%"),
                "FLOP cost": _times(multiples.get("flops")),
                "time cost": _times(multiples.get("seconds")),
                "seconds": _number(figures["seconds"], ".3g"),
                "tokens by solution": _number(figures["decoded_tokens_per_solution"], ",.0f"),
                "price by solution": _number(figures["price_per_solution"], ".3g"),
            }
        )
    return _without_empty_columns(table)


def pairwise_table(summary: dict[str, Any]) -> Table:
    """Returns one row a comparison with the reference; empty if there is none."""
    interval = f"[{summary['resampling'].confidence:.0%}]"
    table = [
        {
            f"{summary['reference']} against": compared["sampler"],
            "problems": str(compared["problems"]),
            f"accuracy, points {interval}": _percent(compared["accuracy"], sign="+"),
            "cost": _times(compared["multiples"]["decoded_tokens"]),
            "z": _number(compared["mcnemar"].statistic, ".2f"),
            "p": _number(compared["mcnemar"].p_value, ".2g"),
            "p (Holm)": _number(compared["mcnemar_holm"], ".2g"),
            "exact p": _number(compared["sign_flip"].p_value, ".2g"),
            "exact p (Holm)": _number(compared["sign_flip_holm"], ".2g"),
            "log p": _with_error(compared["log_prob"], "+.1f"),
            "tokens": _with_error(compared["num_tokens"], "+,.1f"),
        }
        for compared in summary["pairwise"]
    ]
    return _without_empty_columns(table)


def _without_empty_columns(table: Table) -> Table:
    kept = [key for key in (table[0] if table else ()) if any(row[key] != _ABSENT for row in table)]
    return [{key: row[key] for key in kept} for row in table]


def _number(value: float | None, style: str) -> str:
    return _ABSENT if value is None else format(value, style)


def _times(value: float | None) -> str:
    if value is None:
        return _ABSENT
    return f"{value:.2f}x" if value < 10 else f"{value:,.1f}x"


def _percent(estimate: Estimate | None, interval: bool = True, sign: str = "") -> str:
    if estimate is None:
        return _ABSENT
    text = format(100 * estimate.value, f"{sign}.1f")
    if not interval or estimate.low is None or estimate.high is None:
        return text
    low, high = (format(100 * bound, f"{sign}.1f") for bound in (estimate.low, estimate.high))
    return f"{text} [{low}, {high}]"


def _with_error(mean: ClusteredMean | None, style: str) -> str:
    if mean is None:
        return _ABSENT
    text = format(mean.mean, style)
    if mean.standard_error is None:
        return text
    return f"{text} ± {format(mean.standard_error, style.lstrip('+'))}"


def to_markdown(table: Table) -> str:
    """Returns the table in Markdown, numbers to the right; empty for a table without rows."""
    if not table:
        return ""
    lines = [list(table[0]), *(list(row.values()) for row in table)]
    escaped = [[cell.replace("\\", "\\\\").replace("|", "\\|") for cell in line] for line in lines]
    rule = [":--"] + ["--:"] * (len(table[0]) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in [escaped[0], rule, *escaped[1:]])


def to_text(table: Table) -> str:
    """Returns the table with aligned columns; empty for a table without rows."""
    if not table:
        return ""
    lines = [list(table[0]), *(list(row.values()) for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in lines
    )


def to_json(summary: dict[str, Any]) -> str:
    """Returns the summary as JSON; numbers that are not finite are null."""
    return json.dumps(_plain(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = cast(Any, value)._asdict()
    if isinstance(value, dict):
        return {str(key): _plain(element) for key, element in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(element) for element in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tables(folder: str | Path, summary: dict[str, Any]) -> list[Path]:
    """Writes ``tables.md``, ``tables.txt`` and ``tables.json``; returns their paths.

    Raises:
      ValueError: the folder cannot be written to.
    """
    both = main_table(summary), pairwise_table(summary)
    notes = summary["notes"]
    contents = {
        "tables.md": [*map(to_markdown, both), "".join(f"- {note}\n" for note in notes)],
        "tables.txt": [*map(to_text, both), "".join(f"{note}\n" for note in notes)],
        "tables.json": [to_json(summary)],
    }
    folder = Path(folder).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, parts in contents.items():
            text = "\n".join(part for part in parts if part)
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--output_dir={folder} cannot be written to: {error.strerror}") from error
    return [folder / name for name in contents]
