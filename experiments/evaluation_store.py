"""The folder of an evaluation while it grows: rows are added, never lost, never doubled.

* ``settings.json``: what determines the rows. A later run into the same folder must have the same,
  except that it may add arms and seeds.
* ``rows.jsonl``: a row a chain, appended and synced as chains finish. A line that a killed run left
  torn is taken away. Once the evaluation is complete the file is sorted, so that it does not depend
  on how often the evaluation was interrupted.
* ``pieces.json``: the texts of the rows' tokens by their ids.
* ``history.jsonl``: every step of some chains, for the trace viewer.
* ``sessions.jsonl``: what each run took, apart because rows are reproducible and times are not.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Key = tuple[str, str, int]  # sampler (the arm's name), problem, seed


def hash_settings(settings: dict[str, Any]) -> str:
    """Returns 12 hexadecimal digits that stand for the settings."""
    return hashlib.sha256(_canonical(settings).encode()).hexdigest()[:12]


def key_of(row: Row) -> Key:
    """Who a row is, within its folder."""
    return row["sampler"], row["problem"], row["seed"]


class EvaluationStore:
    """An evaluation's folder, open for writing by this process alone.

    Attributes:
      settings: what determines the rows, as in ``settings.json``.
      rows: those that are there, by their keys.
    """

    def __init__(self, path: str):
        """Creates or opens the folder.

        Raises:
          ValueError: it cannot be written to, another process has it open, or its files are not
            those of an evaluation.
        """
        self._path = Path(path).expanduser()
        self._name = f"--output_dir={path}"
        try:
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self._path / ".lock", "w", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"{self._name} cannot be written to: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(
                f"{self._name} is in use by another process; expected a folder of its own, or to "
                "wait for that process"
            ) from error
        self.rows: dict[Key, Row] = {}
        try:
            self.settings: dict[str, Any] | None = self._read_settings()
            for row in self._read_lines("rows.jsonl"):
                self.rows[self._checked_key(row)] = row
        except ValueError:
            self.close()
            raise

    def close(self) -> None:
        """Lets other processes have the folder."""
        self._lock.close()

    def __enter__(self) -> "EvaluationStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def adopt(self, settings: dict[str, Any]) -> None:
        """Takes a run's settings over; arms that earlier runs had stay.

        Args:
          settings: with the run's arms by name under "samplers".

        Raises:
          ValueError: the folder's rows were made with other settings; names each that differs.
        """
        earlier = self.settings
        if earlier is not None:
            different = [
                f"{name} is {_brief(settings.get(name))} and was {_brief(earlier.get(name))}"
                for name in sorted({*settings, *earlier} - {"samplers"})
                if settings.get(name) != earlier.get(name)
            ] + [
                f"{name}: {field} is {_brief(arm.get(field))} and was {_brief(old.get(field))}"
                for name, arm in settings["samplers"].items()
                if (old := earlier["samplers"].get(name)) is not None
                for field in sorted({*arm, *old})
                if arm.get(field) != old.get(field)
            ]
            if different:
                raise ValueError(
                    f"{self._name} holds rows of other settings; expected the same, or a new "
                    f"folder: {'; '.join(different[:5])}"
                )
            settings = settings | {"samplers": earlier["samplers"] | settings["samplers"]}
        if settings != earlier:
            self._replace("settings.json", json.dumps(settings, indent=2) + "\n")
        self.settings = settings
        hashes = {self.hash_of(name) for name in settings["samplers"]}
        for row in self.rows.values():
            if row["settings"] not in hashes:
                raise ValueError(
                    f"{self._name}: rows.jsonl holds a row of settings {row['settings']}, which "
                    "are not those of settings.json; expected rows that belong together"
                )
        self._forget_history_without_rows()

    def hash_of(self, name: str) -> str:
        """Returns the hash of what determines the rows of an arm."""
        assert self.settings is not None
        common = {key: value for key, value in self.settings.items() if key != "samplers"}
        return hash_settings(common | {"samplers": {name: self.settings["samplers"][name]}})

    def add(self, rows: Sequence[Row], history: Sequence[Row] = ()) -> None:
        """Appends rows, and before them the history of some: a row is whole once it is there."""
        self._append("history.jsonl", history)
        self._append("rows.jsonl", rows)
        self.rows.update((self._checked_key(row), row) for row in rows)

    def add_pieces(self, pieces: dict[str, str]) -> None:
        """Adds texts of tokens to ``pieces.json``."""
        path = self._path / "pieces.json"
        try:
            known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ValueError(f"{self._name}: pieces.json: {error}; delete the file") from error
        merged = known | pieces
        if merged != known:
            ordered = dict(sorted(merged.items(), key=lambda item: int(item[0])))
            self._replace("pieces.json", json.dumps(ordered) + "\n")

    def add_session(self, session: Row) -> None:
        """Appends what a run of one arm took."""
        self._append("sessions.jsonl", [session])

    def sort(self, keys: Iterable[Key]) -> None:
        """Writes all rows in the order of ``keys``, those of earlier runs' other arms first."""
        order = {key: place for place, key in enumerate(keys)}
        rows = sorted(self.rows.values(), key=lambda row: (order.get(key_of(row), -1), key_of(row)))
        self._replace("rows.jsonl", _lines(rows))
        history = sorted(
            self._read_lines("history.jsonl"),
            key=lambda row: (order.get(key_of(row), -1), key_of(row)),
        )
        if history:
            self._replace("history.jsonl", _lines(history))

    def _forget_history_without_rows(self) -> None:
        """A run that was killed between the two files will write that history again."""
        history = self._read_lines("history.jsonl")
        kept = [record for record in history if key_of(record) in self.rows]
        if len(kept) != len(history):
            self._replace("history.jsonl", _lines(kept))

    def _checked_key(self, row: Row) -> Key:
        try:
            key = key_of(row)
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{self._name}: rows.jsonl holds {_brief(row)}; expected rows of an evaluation"
            ) from error
        if key in self.rows:
            raise ValueError(f"{self._name}: rows.jsonl holds two rows of {key}; expected one")
        return key

    def _read_settings(self) -> dict[str, Any] | None:
        path = self._path / "settings.json"
        if not path.exists():
            if (self._path / "rows.jsonl").exists():
                raise ValueError(
                    f"{self._name} holds rows.jsonl but no settings.json; expected both or none"
                )
            return None
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(settings["samplers"], dict):
                raise TypeError
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self._name}: settings.json is not that of an evaluation; expected a new folder"
            ) from error
        return settings

    def _read_lines(self, name: str) -> list[Row]:
        """Reads JSON lines; a last one that is torn is taken away from the file."""
        path = self._path / name
        if not path.exists():
            return []
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) != len(data):
            os.truncate(path, len(whole))
        try:
            return [json.loads(line) for line in whole.decode().splitlines()]
        except ValueError as error:
            raise ValueError(
                f"{self._name}: {name} holds a line that is not JSON: {error}; expected the file "
                "as an evaluation left it"
            ) from error

    def _append(self, name: str, rows: Sequence[Row]) -> None:
        if rows:
            with open(self._path / name, "a", encoding="utf-8") as file:
                file.write(_lines(rows))
                file.flush()
                os.fsync(file.fileno())

    def _replace(self, name: str, text: str) -> None:
        temporary = self._path / f".{name}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self._path / name)


def _lines(rows: Iterable[Row]) -> str:
    # In ASCII: no character of a text ends a line, and a lone surrogate can be written.
    return "".join(json.dumps(row) + "\n" for row in rows)


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
