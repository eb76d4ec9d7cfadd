"""What the cuts of ``experiments.suffix_divergence`` come to: means, paired differences, a figure.

``rows`` are those of ``cuts.jsonl``. Each problem counts once, by its means over its cuts of a
kind, and only where it has cuts of both kinds.
"""

import collections
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments import statistics
from experiments.divergence_cuts import KINDS
from experiments.reporting import figures
from experiments.reporting.figures import Drawing, NothingToDraw
from experiments.statistics import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUTCOMES = ("edit_distance", "distinct_answers", "distinct_suffixes")
CIRCUMSTANCES = ("position", "entropy", "jump", "mean_length", "ended", "answered", "correct")
MEASURES = (*OUTCOMES, *CIRCUMSTANCES)
CAPTION = (
    "What follows a cut, by whether next-token entropy jumps up there. Grey: the means of one "
    "problem; bars: 95 % intervals over problems."
)
_STEPS = 1000  # the exact test sees differences as whole parts of the largest
_EPSILON = 1e-9
_STYLES = {"top": figures.STYLES["entropy_cut"], "bottom": figures.STYLES["uniform_cut"]}
_LABELS = {
    "edit_distance": "edit distance of two suffixes,\nby the longer one's length",
    "distinct_answers": "distinct answers of {resamples} suffixes",
}


def pair(rows: Sequence[Row], measure: str) -> dict[str, tuple[float, float]]:
    """Returns the means of each problem that has both: over its top cuts, over its bottom cuts."""
    top, bottom = (
        statistics.problem_means(
            [row for row in rows if row["kind"] == kind], operator.itemgetter(measure)
        )
        for kind in KINDS
    )
    return {problem: (top[problem], bottom[problem]) for problem in top if problem in bottom}


def summarise(traces: Sequence[Row], rows: Sequence[Row], wanted: int) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
      traces: rows of ``traces.jsonl``.
      rows: the cuts.
      wanted: cuts of each kind that a trace should have.
    """
    counts = collections.Counter((row["problem"], row["kind"]) for row in rows)
    return {
        "problems": len(traces),
        "traces": {
            "mean_tokens": float(np.mean([len(trace["tokens"]) for trace in traces])),
            "ended_with_eos": sum(trace["ended"] == "eos" for trace in traces),
            "correct": sum(trace["correct"] for trace in traces),
        },
        "cuts": {kind: sum(row["kind"] == kind for row in rows) for kind in KINDS},
        "fewer_cuts_than_wanted": {
            trace["problem"]: {"tokens": len(trace["tokens"])}
            | {kind: counts[trace["problem"], kind] for kind in KINDS}
            for trace in traces
            if any(counts[trace["problem"], kind] < wanted for kind in KINDS)
        },
        **compare(rows),
    }


def compare(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the means of both kinds and the paired differences top - bottom.

    "p_value" is of the exact sign-flip test, with differences rounded to a thousandth of the
    largest: exact where a problem has as many cuts of both kinds. "p_holm" is adjusted for all the
    outcomes.
    """
    pairs = {measure: pair(rows, measure) for measure in MEASURES}
    summary: dict[str, Any] = {
        "paired_problems": len(pairs["edit_distance"]),
        "means": {kind: {} for kind in KINDS},
        "differences": {},
    }
    if not summary["paired_problems"]:
        return summary
    for measure, of_problems in pairs.items():
        values = np.array(list(of_problems.values()))
        differences = values[:, 0] - values[:, 1]
        scores = np.column_stack([values, differences])
        estimates = statistics.bootstrap(scores, bounds=None)
        for name, column, estimate in zip((*KINDS, None), scores.T, estimates, strict=True):
            mean = statistics.clustered_mean(column)
            assert mean is not None
            described = estimate._asdict() | {"standard_error": mean.standard_error}
            if name is None:
                summary["differences"][measure] = described
            else:
                summary["means"][name][measure] = described
        if measure in OUTCOMES:
            test = statistics.sign_flip_test(_in_steps(differences))
            summary["differences"][measure]["p_value"] = test.p_value
    outcomes = [summary["differences"][measure] for measure in OUTCOMES]
    adjusted = statistics.holm([outcome["p_value"] for outcome in outcomes])
    for outcome, p_value in zip(outcomes, adjusted, strict=True):
        outcome["p_holm"] = p_value
    return summary


def _in_steps(differences: np.ndarray) -> list[int]:
    largest = np.abs(differences).max()
    if largest < _EPSILON:  # rounding errors are no differences
        return [0] * len(differences)
    return np.rint(differences / largest * _STEPS).astype(int).tolist()


def table(summary: dict[str, Any]) -> list[dict[str, str]]:
    """Returns a line for each measure, for ``tables.to_text``; ``summary`` is by ``summarise``."""
    lines = []
    for measure, difference in summary["differences"].items():
        error = difference["standard_error"]
        lines.append(
            {
                "mean over problems": measure.replace("_", " "),
                **{kind: f"{summary['means'][kind][measure]['value']:.3f}" for kind in KINDS},
                "difference": f"{difference['value']:+.3f}",
                "± s.e.": "-" if error is None else f"{error:.3f}",
                "p": f"{difference['p_value']:.2g}" if "p_value" in difference else "",
                "p (Holm)": f"{difference['p_holm']:.2g}" if "p_holm" in difference else "",
            }
        )
    return lines


def draw(rows: Sequence[Row], resamples: int) -> Drawing:
    """Draws edit distance and distinct answers, top against bottom, paired by problem.

    Args:
      rows: the cuts.
      resamples: suffixes of each cut.

    Raises:
      NothingToDraw: no problem has cuts of both kinds.
      ValueError: matplotlib is missing.
    """
    summary = compare(rows)
    if not summary["paired_problems"]:
        raise NothingToDraw("no problem has cuts of both kinds")
    with figures.look():
        figure = _new_figure()
        for axes, (measure, label) in zip(figure.axes, _LABELS.items(), strict=True):
            _draw_panel(axes, pair(rows, measure), measure, summary)
            axes.set_ylabel(label.format(resamples=resamples))
        across = "jump of entropy at the cut (grey: one problem's means; bars: 95 % intervals)"
        figure.supxlabel(across, fontsize=9)
        return Drawing("suffix_divergence", CAPTION, figure)


def _new_figure() -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 3.6), layout="constrained")  # inches
    figure.subplots(1, 2, sharex=True)
    return figure


def _draw_panel(
    axes: "Axes",
    of_problems: dict[str, tuple[float, float]],
    measure: str,
    summary: dict[str, Any],
) -> None:
    places = {"bottom": 0, "top": 1}
    for top, bottom in of_problems.values():
        axes.plot([places["bottom"], places["top"]], [bottom, top], color="#BBBBBB", lw=0.8)
    for kind, place in places.items():
        mean, style = summary["means"][kind][measure], _STYLES[kind]
        errors = None
        if mean["low"] is not None:
            errors = [
                [max(0.0, mean["value"] - mean["low"])],
                [max(0.0, mean["high"] - mean["value"])],
            ]
        look: Any = {"color": style.colour, "marker": style.marker, "markersize": 7}
        axes.errorbar(place, mean["value"], yerr=errors, zorder=3, elinewidth=2, capsize=4, **look)
    difference = summary["differences"][measure]
    error = difference["standard_error"]
    spread = "" if error is None else f" ± {error:.2f} s.e."
    axes.set_title(f"top - bottom: {difference['value']:+.2f}{spread}")
    axes.set_xticks(list(places.values()), ["bottom decile", "top decile"])
    axes.set_xlim(-0.35, 1.35)
    axes.set_ylim(bottom=0)
    axes.grid(axis="x", visible=False)
