"""Evaluations that are killed at any moment end as if nothing had happened."""

import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests import tiny_checkpoints
from tests.test_evaluate import ROWS

KILLS = 8
FLAGS = (
    "--task=gsm8k",
    "--nochat",
    "--samplers=standard,entropy_cut,best_of_n,smc",
    "--option=best_of_n.num_candidates=4",
    "--option=best_of_n.rows=2",
    "--option=smc.num_particles=2",
    "--seeds=0-5",
    "--max_new_tokens=24",
    "--num_stages=3",
    "--steps_per_stage=4",
    "--top_k=20",
    "--num_slots=4",
    "--record_problems=2",
)
FILES = ("rows.jsonl", "history.jsonl", "settings.json", "pieces.json")


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts an evaluation into a folder, in a process of its own."""
    (tmp_path / "gsm8k.jsonl").write_text(ROWS)
    tiny_checkpoints.write_huggingface(
        tmp_path / "tiny", tiny_checkpoints.CONFIG | {"max_position_embeddings": 512}
    )
    monkeypatch.setenv("ECMH_JAX_CACHE", str(tmp_path / "cache"))  # compiled programs stay

    def start(folder: pathlib.Path) -> subprocess.Popen:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "experiments.evaluate", *FLAGS),
                f"--data={tmp_path / 'gsm8k.jsonl'}",
                f"--model={tmp_path / 'tiny'}",
                f"--output_dir={folder}",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    return start


def count_lines(path: pathlib.Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_killed_evaluations_are_byte_identical(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, errors = (process := start(whole)).communicate(timeout=500)
    assert process.returncode == 0, errors.decode()
    rows = count_lines(whole / "rows.jsonl")
    assert rows == 4 * 4 * 6
    rng = np.random.default_rng(0)
    # Between two of the moments at which rows are added, and a little later.
    for goal in np.sort(rng.integers(0, rows, KILLS)):
        process = start(killed)
        deadline = time.monotonic() + 300
        while process.poll() is None and count_lines(killed / "rows.jsonl") < goal:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(rng.uniform(0.0, 0.05))
        before = count_lines(killed / "rows.jsonl")
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert count_lines(killed / "rows.jsonl") >= before
    _, errors = (process := start(killed)).communicate(timeout=500)
    assert process.returncode == 0, errors.decode()
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name
