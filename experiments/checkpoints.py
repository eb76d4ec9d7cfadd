"""Checkpoints of a training run, by Orbax: whole or not there, the newest few kept."""

import json
import logging
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

StateType = TypeVar("StateType")

_KEPT = 2
_METRICS = "metrics.jsonl"


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for those being written.

    Attributes:
      folder: the run's; the checkpoints are in a folder of their own inside it.
    """

    def __init__(self, folder: str, settings: dict[str, Any]):
        """Opens ``folder``, making it where it is missing.

        Args:
          folder: what ``--output_dir`` says.
          settings: what the run depends on, as JSON has it; kept in ``settings.json``.

        Raises:
          ValueError: it cannot be written to, or holds a run with other settings.
        """
        logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells of every step it takes
        self.folder = Path(folder).expanduser().absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            _adopt(self.folder / "settings.json", settings, folder)
        except OSError as error:
            raise ValueError(
                f"--output_dir={folder} cannot be written to: {error.strerror}"
            ) from error
        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT)
        self._manager = ocp.CheckpointManager(self.folder / "checkpoints", options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, update: int, state: Any, metrics: list[dict[str, Any]]) -> None:
        """Begins to write a checkpoint; the caller may go on and donate the state.

        Args:
          update: updates so far.
          state: what the next one needs.
          metrics: all rows so far, each with its "update", counted from 1; ``metrics.jsonl``.
        """
        # First, so that no checkpoint is ahead of its metrics.
        path = self.folder / _METRICS
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in metrics), "utf-8")
        temporary.replace(path)
        self._manager.save(update, args=ocp.args.StandardSave(state))

    def restore(self, like: StateType) -> tuple[int, StateType, list[dict[str, Any]]]:
        """Returns the newest checkpoint: its number of updates, its state and its metrics.

        Args:
          like: a state of the same structure, shapes and dtypes; what is returned, with 0 updates,
            where there is no checkpoint.

        Raises:
          ValueError: the newest checkpoint is of another structure, or damaged.
        """
        update = self._manager.latest_step()
        if update is None:
            return 0, like, []
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            restored: Any = self._manager.restore(update, args=ocp.args.StandardRestore(abstract))
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(
                f"--output_dir: checkpoint {update} in {self._manager.directory} cannot be read "
                f"({type(error).__name__}); it is damaged or of other settings: remove it, or "
                "choose another folder"
            ) from error
        lines = (self.folder / _METRICS).read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        return update, restored, [row for row in rows if row["update"] <= update]

    def finish(self, summary: dict[str, Any]) -> None:
        """Writes ``training.json``."""
        text = json.dumps(summary, indent=2) + "\n"
        (self.folder / "training.json").write_text(text, "utf-8")


def _adopt(path: Path, settings: dict[str, Any], folder: str) -> None:
    """Writes the settings, or checks that those of the run that goes on are the same."""
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        return
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected the settings of a run") from error
    if found != settings:
        others = [
            name
            for name, value in settings.items()
            if not isinstance(found, dict) or found.get(name) != value
        ]
        raise ValueError(
            f"--output_dir={folder} holds a run with another {', '.join(others) or 'program'}; "
            "expected the same settings, or another folder"
        )
