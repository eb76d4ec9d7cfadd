"""The folder of a run: rows, summary and flags, whole or not there at all."""

import json
import os
import time
from pathlib import Path
from typing import Any

_REST = 20  # after an update of the rows, in its own durations


class RunFolder:
    """Writes a run's rows and summary; every file is replaced as a whole, so none is ever torn."""

    def __init__(self, path: str, flags_text: str):
        """Creates the folder at ``path`` and writes ``flags_text`` to ``flags.txt``.

        Raises:
          ValueError: it cannot be written to, or already holds a run.
        """
        self._path = Path(path).expanduser()
        self._earliest_update = 0.0
        if (self._path / "traces.jsonl").exists():
            raise ValueError(
                f"--output_dir={path} already holds traces.jsonl; expected a new or an empty "
                "folder, so that no finished work is lost"
            )
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._replace("flags.txt", flags_text)
        except OSError as error:
            raise ValueError(
                f"--output_dir={path} cannot be written to: {error.strerror}"
            ) from error

    def update_rows(self, rows: list[dict[str, Any]]) -> None:
        """As ``write_rows``, or not at all where that would take much of the run's time."""
        started = time.perf_counter()
        if started < self._earliest_update:
            return
        self.write_rows(rows)
        # The file is written anew each time: what grows with the rows may not slow the chains.
        ended = time.perf_counter()
        self._earliest_update = ended + _REST * (ended - started)

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Writes ``traces.jsonl``: all chains that have finished."""
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self._replace("traces.jsonl", "".join(lines))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Writes ``summary.json``."""
        self._replace("summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")

    def _replace(self, name: str, text: str) -> None:
        temporary = self._path / f".{name}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path / name)
