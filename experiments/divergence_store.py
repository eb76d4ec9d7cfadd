"""The folder of a study of suffix divergence while it grows; see ``evaluation_store``.

* ``settings.json``: what determines the rows; a later run into the same folder must have the same.
* ``traces.jsonl``: a row a problem, its trace; ``cuts.jsonl``: a row a cut, appended and synced as
  its last suffix finishes. A complete study is sorted, however often it was interrupted.
* ``sessions.jsonl``: what each run took. ``summary.json``: what a complete study comes to.
"""

import json
from collections.abc import Sequence
from typing import Any

from experiments.divergence_cuts import Cut
from experiments.evaluation_store import EvaluationStore, Row
from experiments.reporting import tables
from experiments.reporting.divergence_figure import MEASURES

_FIELDS = {
    "traces.jsonl": ("settings", "tokens", "entropy", "ended", "correct"),
    "cuts.jsonl": ("settings", *MEASURES),
}


class DivergenceStore(EvaluationStore):
    """A study's folder: as an evaluation's, with traces and cuts in the place of rows.

    Attributes:
      traces: rows of ``traces.jsonl`` by problem.
      cuts: rows of ``cuts.jsonl`` by ``Cut.key``.
    """

    def __init__(self, path: str):
        super().__init__(path)
        self.traces: dict[str, Row] = {}
        self.cuts: dict[tuple[str, int, str], Row] = {}
        try:
            for name, rows in (("traces.jsonl", self.traces), ("cuts.jsonl", self.cuts)):
                self._read_rows(name, rows)
        except ValueError:
            self.close()
            raise

    def __enter__(self) -> "DivergenceStore":
        return self

    def _read_rows(self, name: str, rows: dict[Any, Row]) -> None:
        expected = "expected the folder as a study left it"
        for row in self._read_lines(name):
            try:
                key = row["problem"] if rows is self.traces else _key_of(row)
                known = key in rows
                _ = [row[field] for field in _FIELDS[name]]
            except (KeyError, TypeError) as error:
                text = f"{self._name}: {name} holds {str(row)[:60]}; {expected}"
                raise ValueError(text) from error
            if known or self.settings is None:
                why = "two rows" if known else "without settings.json a row"
                raise ValueError(f"{self._name}: {name} holds {why} of {key}; {expected}")
            rows[key] = row

    def check(self, cuts: Sequence[Cut]) -> None:
        """Raises ValueError unless all rows are of these cuts and of these settings."""
        for name, rows in (("trace", self.traces), ("suffix", self.cuts)):
            for key, row in rows.items():
                if row["settings"] != self.hash_of(name):
                    raise ValueError(
                        f"{self._name}: the row of {key} was made with other settings; expected a "
                        "new folder"
                    )
        if unknown := self.cuts.keys() - {cut.key for cut in cuts}:
            raise ValueError(
                f"{self._name}: cuts.jsonl holds {min(unknown)}, which the traces do not give; "
                "expected the folder as a study left it"
            )

    def add_traces(self, rows: Sequence[Row]) -> None:
        """Appends traces."""
        self._append("traces.jsonl", rows)
        self.traces.update((row["problem"], row) for row in rows)

    def add_cuts(self, rows: Sequence[Row]) -> None:
        """Appends cuts."""
        self._append("cuts.jsonl", rows)
        self.cuts.update((_key_of(row), row) for row in rows)

    def finish(self, traces: Sequence[Row], cuts: Sequence[Row], summary: dict[str, Any]) -> None:
        """Writes the rows of a complete study in this order, and ``summary.json``."""
        for name, rows in (("traces.jsonl", traces), ("cuts.jsonl", cuts)):
            self._replace(name, "".join(json.dumps(row) + "\n" for row in rows))
        self._replace("summary.json", tables.to_json(summary))


def _key_of(row: Row) -> tuple[str, int, str]:
    return row["problem"], row["cut"], row["kind"]
