"""``python -m experiments.report DIR``: an evaluation as tables, figures and one HTML page."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from experiments.grading.grader import same_answer_key
from experiments.launch import setting, start
from experiments.reporting import figures, page, rows, tables


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """One run of the launcher; each field but the first is the flag of that name."""

    folder: str
    reference: str | None = setting(
        None, "The sampler that the others are tested against. Default: entropy_cut."
    )
    baseline: str | None = setting(None, "The sampler whose costs are 1. Default: standard.")
    price_per_million_tokens: float | None = setting(
        None, "Price of a million decoded tokens, in any currency, for the price of a solution."
    )
    max_traces: int = setting(400, "Rows whose tokens the page holds.")


def run_report(config: ReportConfig) -> dict[str, Any]:
    """Writes ``report/`` into the folder of an evaluation.

    Returns:
      {"text": the tables, "page": the page's path, "left_out": [(figure, why)]}.

    Raises:
      ValueError: the folder is not that of an evaluation, or a setting is unusable.
    """
    if config.max_traces < 0:
        raise ValueError(f"--max_traces={config.max_traces}; expected at least 0")
    evaluation = rows.read_folder(config.folder, "DIR")
    task = evaluation.settings.get("task", "")
    summary = tables.summarise(
        evaluation,
        config.reference,
        config.baseline,
        config.price_per_million_tokens,
        functools.partial(same_answer_key, task),
    )
    target = Path(config.folder).expanduser() / "report"
    tables.write_tables(target, summary)
    drawn = figures.draw_all(evaluation, summary)
    figures.save_figures(target, drawn)
    model = evaluation.settings.get("model", {})
    main_table = tables.main_table(summary)
    text = page.build_page(
        title=f"{task}, {model.get('name', 'model')}",
        settings=evaluation.settings,
        table=main_table,
        notes=summary["notes"],
        figures=[(drawing.caption, figures.to_svg(drawing.figure)) for drawing in drawn.drawings],
        rows=evaluation.rows,
        history=evaluation.history,
        pieces=_read_pieces(config.folder),
        max_traces=config.max_traces,
    )
    (target / "index.html").write_text(text, encoding="utf-8")
    both = (main_table, tables.pairwise_table(summary))
    return {
        "text": "\n".join(tables.to_text(table) for table in both if table),
        "page": target / "index.html",
        "left_out": drawn.left_out,
    }


def _read_pieces(folder: str) -> dict[str, str]:
    """Texts of tokens; a folder may lack them, and the page then shows numbers."""
    path = Path(folder).expanduser() / "pieces.json"
    if not path.exists():
        return {}
    try:
        pieces = json.loads(path.read_text(encoding="utf-8"))
        return {str(token): str(text) for token, text in pieces.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"DIR={folder}: pieces.json: {error}; delete the file") from error


def main(config: ReportConfig) -> int:
    """Runs the launcher and prints the tables; returns the exit status."""
    result = run_report(config)
    print(result["text"])
    for name, reason in result["left_out"]:
        print(f"no figure {name}: {reason}")
    print(result["page"])
    return 0


if __name__ == "__main__":
    start(ReportConfig, main, argument="folder")
