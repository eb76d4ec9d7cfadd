"""Figures of an evaluation, drawn with matplotlib into SVG and PNG.

A sampler has the same colour and marker in every figure; colours keep apart for readers with any
of the usual kinds of colour blindness. A figure that an evaluation has nothing for is left out with
a reason. ``rows`` are those of ``rows.jsonl``, of all samplers; ``summary`` is by
``tables.summarise``.
"""

import contextlib
import io
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from experiments import statistics
from experiments.reporting import rows as series
from experiments.reporting import tables
from experiments.reporting.rows import EvaluationFolder
from experiments.statistics import Estimate, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Style(NamedTuple):
    """How a sampler is drawn."""

    colour: str
    marker: str


STYLES = {
    "standard": Style("#222222", "o"),
    "low_temperature": Style("#56B4E9", "s"),
    "uniform_cut": Style("#0072B2", "^"),
    "entropy_cut": Style("#D55E00", "D"),
    "best_of_n": Style("#009E73", "v"),
    "smc": Style("#CC79A7", "P"),
    "power_smc": Style("#661100", "X"),
    "tmc": Style("#E0B000", "p"),
    "multiple_try": Style("#332288", "h"),
    "published_entropy_cut": Style("#A0522D", "d"),
    "published_uniform_cut": Style("#0B3D4F", "<"),
}
_OTHERS = [Style(colour, ">") for colour in ("#7F7F7F", "#BBBB44", "#99DDFF", "#F4C7A1")]
_LOOK: dict[Any, Any] = {
    **dict.fromkeys(("font.size", "axes.titlesize"), 9),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("xtick.color", "ytick.color"), "#444444"),
    **dict.fromkeys(("figure.constrained_layout.w_pad", "figure.constrained_layout.h_pad"), 0.08),
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "axes.titlelocation": "left",
    "axes.edgecolor": "#888888",
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "text.parse_math": False,  # dollars in a trace are dollars
    "svg.hashsalt": "ecmh_jax",  # the same evaluation, the same bytes
}
_MOST_CHAINS = 60  # drawn in one panel
_MOST_LABELS = 14
_CUT_BINS = 20
_CAPTIONS = {
    "accuracy": "Accuracy by sampler; cost: decoded tokens as a multiple of the baseline's.",
    "accuracy_against_cost": "Accuracy against what was decoded for it, rejected tokens included.",
    "acceptance_by_stage": "Accepted steps by stage. Bars: standard errors over problems.",
    "cuts": "Where cuts fall in traces, whose length is the stage's horizon or the final one.",
    "entropy": "Next-token entropy along one trace; dots: the largest tenth of its upward jumps.",
    "log_prob": "log p after every step; dark: mean, where chains that stopped keep their last.",
}


class NothingToDraw(ValueError):  # noqa: N818
    """An evaluation that has nothing for a figure; the message says what is missing."""


class Drawing(NamedTuple):
    """A figure with what belongs under it."""

    name: str
    caption: str
    figure: "Figure"


class Drawn(NamedTuple):
    """The figures of an evaluation, and the names and reasons of those left out."""

    drawings: list[Drawing]
    left_out: list[tuple[str, str]]


@contextlib.contextmanager
def look() -> Iterator[None]:
    """The style of every figure, while it lasts; raises ValueError where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ValueError(
            "figures need matplotlib; install it with: pip install -e '.[evaluate]'"
        ) from error
    with matplotlib.rc_context(_LOOK):
        yield


def styles(names: Collection[str]) -> dict[str, Style]:
    """Returns the styles of samplers; those without one of their own share what is left over."""
    unknown = sorted(set(names) - STYLES.keys())
    return {name: STYLES.get(name) or _OTHERS[unknown.index(name) % len(_OTHERS)] for name in names}


@look()
def draw_accuracy(summary: dict[str, Any]) -> "Figure":
    """Draws the accuracy of each sampler with its interval, its cost beside it."""
    samplers = summary["samplers"]
    if not samplers:
        raise NothingToDraw("there are no rows")
    figure, (axes,) = _new_figure(0.9 + 0.3 * len(samplers))
    looks, ends = styles(samplers), []
    table = [("accuracy, %", "cost", "tokens")]
    for place, row in enumerate(tables.main_table(summary)):
        accuracy = samplers[row["sampler"]]["accuracy"]
        value, errors = _with_bars(accuracy)
        ends += [value, *(100 * bound for bound in accuracy[1:] if bound is not None)]
        axes.errorbar(value, place, xerr=errors, **_bars(looks[row["sampler"]]))
        table.append((f"{value:.1f}", row.get("cost", "-"), row.get("decoded tokens", "-")))
    for place, cells in enumerate(table, start=-1):
        for x, text in zip((1.16, 1.29, 1.41), cells, strict=True):
            y, across = max(place, -0.8), axes.get_yaxis_transform()
            axes.text(x, y, text, transform=across, ha="right", va="center")
    axes.set_yticks(range(len(samplers)), [_printable(name) for name in samplers])
    axes.set_ylim(len(samplers) - 0.5, -0.5)
    axes.set_xlim(max(-2, min(ends) - 4), min(102, max(ends) + 4))
    axes.grid(axis="y", visible=False)
    confidence = summary["resampling"].confidence
    axes.set_xlabel(f"accuracy, % ({confidence:.0%} intervals over problems)")
    return figure


@look()
def draw_accuracy_against_cost(summary: dict[str, Any]) -> "Figure":
    """Draws accuracy over decoded tokens by row."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    costs = {
        name: figures["decoded_tokens"].mean
        for name, figures in summary["samplers"].items()
        if figures["decoded_tokens"] and figures["decoded_tokens"].mean > 0
    }
    if not costs:
        raise NothingToDraw("no sampler decoded a token")
    figure, (axes,) = _new_figure(3.4)
    looks = styles(summary["samplers"])
    for name, cost in costs.items():
        value, errors = _with_bars(summary["samplers"][name]["accuracy"])
        axes.errorbar(cost, value, yerr=errors, label=_printable(name), **_bars(looks[name]))
    axes.set_xscale("log")
    axes.set_xlim(min(costs.values()) / 1.5, max(costs.values()) * 1.5)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    return _finish(figure, axes, "decoded tokens by row, mean (log scale)", "accuracy, %")


@look()
def draw_acceptance_by_stage(rows: Sequence[Row]) -> "Figure":
    """Draws the share of accepted steps by stage, with standard errors over problems."""
    stepped, looks = _stepped(rows)
    figure, (axes,) = _new_figure(3.0)
    last = 1
    for index, (name, of_sampler) in enumerate(stepped.items()):
        ratios = series.acceptance_by_stage(of_sampler)
        last = max(last, *ratios)
        shift = 0.08 * (index - (len(stepped) - 1) / 2)  # bars side by side
        axes.errorbar(
            [stage + shift for stage in ratios],
            [100 * ratio.mean for ratio in ratios.values()],
            yerr=[100 * (ratio.standard_error or 0.0) for ratio in ratios.values()],
            label=_printable(name),
            **_bars(looks[name]) | {"linestyle": "-", "linewidth": 1},
        )
    axes.set_xticks(range(1, last + 1, -(-last // 16)))
    axes.set_ylim(0, 103)
    return _finish(figure, axes, "stage", "accepted steps, %")


@look()
def draw_cuts(rows: Sequence[Row], stage_length: int | None) -> "Figure":
    """Draws where cuts fall in their traces, as a density over the relative length.

    Args:
      rows: of all samplers.
      stage_length: tokens that a stage adds to the horizon; None where unknown.
    """
    stepped, looks = _stepped(rows)
    if stage_length is None:
        raise NothingToDraw("settings.json has no max_new_tokens and num_stages under config")
    figure, (axes,) = _new_figure(3.0)
    edges = np.linspace(0, 100, _CUT_BINS + 1)
    for name, of_sampler in stepped.items():
        look: dict[str, Any] = {"color": looks[name].colour, "baseline": None, "lw": 1.6}
        density = series.cut_density(of_sampler, stage_length, _CUT_BINS)
        axes.stairs(density, edges, label=_printable(name), **look)
    axes.axhline(1, color="#999999", lw=1, ls="--", label="evenly spread")
    axes.set_xlim(0, 100)
    axes.set_ylim(bottom=0)
    return _finish(
        figure, axes, "place of the cut, % of the trace", "cuts, relative to an even spread"
    )


@look()
def draw_entropy(rows: Sequence[Row], row: Row | None, pieces: dict[str, str]) -> "Figure":
    """Draws the entropies of one trace, its largest jumps, and the sampler's mean by position.

    Args:
      rows: of all samplers.
      row: the one to draw, by ``rows.choose_example``.
      pieces: texts of tokens by number, as in ``history.jsonl``; where it lacks some, jumps are
        marked without text.
    """
    if row is None:
        raise NothingToDraw("no row has two tokens with entropies")
    figure, (axes,) = _new_figure(3.2)
    colour = styles({other["sampler"] for other in rows})[row["sampler"]].colour
    entropies = series.as_floats(row["token_entropy"])
    positions = np.arange(1, len(entropies) + 1)
    others = [other for other in rows if other["sampler"] == row["sampler"]]
    means = series.mean_entropies(others, len(entropies))
    label = f"mean of\n{len(others)} trace{'s' * (len(others) > 1)}"
    axes.fill_between(positions, means, color="#DDDDDD", lw=0, label=label)
    axes.plot(positions, entropies, color=colour, lw=1, label="this trace")
    jumps = series.top_jumps(entropies)
    axes.plot(positions[jumps], entropies[jumps], "o", c=colour, ms=4, label="largest jumps")
    labelled: list[int] = []
    for jump in jumps[np.argsort(-entropies[jumps], kind="stable")].tolist():
        text = _printable(pieces.get(str(row["tokens"][jump]), ""), 12)
        is_free = all(abs(jump - other) >= len(entropies) / 40 for other in labelled)
        if text and is_free and len(labelled) < _MOST_LABELS:
            labelled.append(jump)
            axes.annotate(
                text,
                (float(positions[jump]), float(entropies[jump])),
                xytext=(0, 5),
                textcoords="offset points",
                rotation=60,
                rotation_mode="anchor",
                fontsize=8,
            )
    axes.set_xlim(0.5, len(entropies) + 0.5)
    axes.set_ylim(0, max(0.1, 1.25 * float(np.nanmax(entropies))))
    sampler, problem = _printable(row["sampler"]), _printable(row["problem"])
    axes.set_title(f"{sampler}, problem {problem}, seed {row['seed']}")
    return _finish(figure, axes, "token of the completion", "next-token entropy, nats")


@look()
def draw_log_prob(rows: Sequence[Row]) -> "Figure":
    """Draws log p of chains after every step, one panel a sampler, and its mean over problems.

    At most sixty chains are drawn, evenly chosen; the mean is of all.
    """
    stepped, looks = _stepped(rows)
    per_stage = max(step[1] for row in rows for step in row["steps"])
    num_steps = per_stage * max(step[0] for row in rows for step in row["steps"])
    by_sampler = [series.log_prob_paths(some, per_stage, num_steps) for some in stepped.values()]
    if not any(np.isfinite(paths).any() for paths in by_sampler):
        raise NothingToDraw("no step has a finite log p")
    lines = -(-len(stepped) // 3)
    figure, panels = _new_figure(0.6 + 2.4 * lines, lines, min(3, len(stepped)))
    # Lines break where a stage makes the trace longer, if a stage has enough steps for a line.
    gaps = range(per_stage, num_steps, per_stage) if per_stage > 1 else []
    steps = np.insert(np.arange(1.0, num_steps + 1), gaps, np.nan)
    for axes, name, paths in zip(panels, stepped, by_sampler, strict=False):
        shown = paths[np.linspace(0, len(paths) - 1, min(_MOST_CHAINS, len(paths)), dtype=int)]
        shown = np.insert(shown, gaps, np.nan, axis=1)
        means = np.insert(series.mean_path(stepped[name], paths), gaps, np.nan)
        if len(paths) > 1:
            axes.plot(steps, means, color="#222222", lw=1.8, zorder=3)
        axes.plot(steps, shown.T, color=looks[name].colour, lw=0.6, alpha=max(0.35, 1 / len(paths)))
        axes.grid(axis="x", visible=False)
        axes.set_title(f"{_printable(name)} ({len(shown)} of {len(paths)} chains)")
    for axes in panels[len(stepped) :]:
        axes.set_visible(False)
    figure.supxlabel("step (gaps: the next stage, a longer trace)", fontsize=9)
    figure.supylabel("log p of the completion, nats", fontsize=9)
    return figure


def _new_figure(height: float, lines: int = 1, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, height), layout="constrained")  # inches
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    return figure, panels.ravel().tolist()


def _finish(figure: "Figure", axes: "Axes", across: str, upward: str) -> "Figure":
    axes.set_xlabel(across)
    axes.set_ylabel(upward)
    figure.legend(loc="outside right upper")
    return figure


def _stepped(rows: Sequence[Row]) -> tuple[dict[str, list[Row]], dict[str, Style]]:
    """Rows with steps by sampler, and all samplers' styles."""
    stepped = statistics.group_by([row for row in rows if row["steps"]], "sampler")
    if not stepped:
        raise NothingToDraw("no sampler took Metropolis-Hastings steps")
    return stepped, styles({row["sampler"] for row in rows})


def _bars(style: Style) -> dict[str, Any]:
    look = {"color": style.colour, "marker": style.marker, "markersize": 6}
    return look | {"linestyle": "none", "elinewidth": 1.4}


def _with_bars(estimate: Estimate) -> tuple[float, list[list[float]] | None]:
    """A percentage, and how far its interval reaches to either side."""
    value, low, high = estimate
    if low is None or high is None:
        return 100 * value, None
    # A skewed interval may leave out the mean itself by a rounding.
    return 100 * value, [[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]]


def _printable(text: str, longest: int = 40) -> str:
    """Text as the figures' font can show it: visible line ends, no control characters."""
    from matplotlib import font_manager

    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    text = text.replace("\n", "↵").replace("\t", "⇥").strip(" ")
    text = "".join(x if x.isprintable() and ord(x) in known else "□" for x in text[: longest + 1])
    return text if len(text) <= longest else text[: longest - 1] + "…"


def draw_all(evaluation: EvaluationFolder, summary: dict[str, Any] | None = None) -> Drawn:
    """Draws every figure that the evaluation has something for.

    Args:
      evaluation: what to draw.
      summary: made here if not given.

    Raises:
      ValueError: matplotlib is missing.
    """
    numbers, rows = summary or tables.summarise(evaluation), evaluation.rows
    stage_length = series.find_stage_length(evaluation.settings)
    example = series.choose_example(evaluation)
    pieces = {key: text for record in evaluation.history for key, text in record["pieces"].items()}
    recipes: dict[str, Callable[[], Figure]] = {
        "accuracy": lambda: draw_accuracy(numbers),
        "accuracy_against_cost": lambda: draw_accuracy_against_cost(numbers),
        "acceptance_by_stage": lambda: draw_acceptance_by_stage(rows),
        "cuts": lambda: draw_cuts(rows, stage_length),
        "entropy": lambda: draw_entropy(rows, example, pieces),
        "log_prob": lambda: draw_log_prob(rows),
    }
    drawn = Drawn([], [])
    for name, draw in recipes.items():
        try:
            drawn.drawings.append(Drawing(name, _CAPTIONS[name], draw()))
        except NothingToDraw as reason:
            drawn.left_out.append((name, str(reason)))
    return drawn


@look()
def to_svg(figure: "Figure") -> str:
    """Returns the figure as an ``svg`` element, for a file of its own or inside a page."""
    file = io.StringIO()
    none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", metadata=none)
    return file.getvalue()[file.getvalue().index("<svg") :]


@look()
def save_figures(folder: str | Path, drawn: Drawn) -> list[Path]:
    """Writes each figure as SVG and as PNG; returns the paths.

    Raises:
      ValueError: the folder cannot be written to.
    """
    folder, paths = Path(folder).expanduser(), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for drawing in drawn.drawings:
            paths += [folder / f"{drawing.name}.{ending}" for ending in ("svg", "png")]
            paths[-2].write_text(to_svg(drawing.figure), encoding="utf-8")
            drawing.figure.savefig(paths[-1], format="png", dpi=150)
    except OSError as error:
        raise ValueError(f"--output_dir={folder}: {error.strerror}; expected a folder") from error
    return paths


def save_all(folder: str | Path, evaluation: EvaluationFolder) -> list[Path]:
    """Draws and writes every figure; ``draw_all`` says what is left out, and why."""
    return save_figures(folder, draw_all(evaluation))
