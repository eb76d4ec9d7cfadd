"""The launcher that trains ``tiny``: interrupted runs, settings, bad flags."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import train_tiny, training
from experiments.equation_corpus import draw_problems
from experiments.train_tiny import TrainConfig
from models.load import load_model

SMALL = TrainConfig(
    num_examples=64, num_steps=5, batch_size=8, num_layers=1, width=32, checkpoint_every=2
)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_an_interrupted_run_ends_like_a_whole_one(tmp_path, monkeypatch):
    whole = dataclasses.replace(SMALL, output_dir=str(tmp_path / "whole"))
    summary = train_tiny.run_train_tiny(whole)
    stopped = dataclasses.replace(SMALL, output_dir=str(tmp_path / "stopped"))
    draw_batches, drawn = training.draw_batches, []

    def stop_after_four(*arguments):
        for batch in draw_batches(*arguments):
            if len(drawn) == 4:
                raise KeyboardInterrupt
            drawn.append(batch)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(training, "draw_batches", stop_after_four)
        with pytest.raises(KeyboardInterrupt):
            train_tiny.run_train_tiny(stopped)
    assert not (tmp_path / "stopped/model.safetensors").exists()
    resumed = train_tiny.run_train_tiny(stopped)
    assert resumed["loss"] == summary["loss"]
    assert [row["update"] for row in read_metrics(tmp_path / "stopped")] == [2, 4, 5]
    assert train_tiny.run_train_tiny(stopped) == resumed  # nothing is left to do
    for name in ("model.safetensors", "tokenizer.json", "config.json", "held_out.jsonl"):
        found = (tmp_path / "stopped" / name).read_bytes()
        assert found == (tmp_path / "whole" / name).read_bytes()


def test_the_folder_is_a_model_with_its_problems(tmp_path):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path / "model"), num_steps=1)
    summary = train_tiny.run_train_tiny(config)
    model = load_model(config.output_dir, "float32")
    assert sum(leaf.size for leaf in _leaves(model.params)) == summary["parameters"]
    prompt = "Solve 3x + 4 = 19.\n"
    ids = model.tokenizer.encode(prompt)
    assert model.tokenizer.decode(ids) == prompt
    assert model.eos_ids == (0,)
    rows = [
        json.loads(row) for row in (tmp_path / "model/held_out.jsonl").read_text().split("\n")[:-1]
    ]
    problems = draw_problems(0, 1000, held_out=True)
    assert [(row["problem"], row["answer"]) for row in rows] == [
        (problem.prompt, problem.solution) for problem in problems
    ]


def _leaves(tree):
    return [
        np.asarray(leaf)
        for branch in tree.values()
        for leaf in (branch.values() if isinstance(branch, dict) else [branch])
    ]


def test_other_settings_do_not_mix(tmp_path):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path), num_steps=1)
    train_tiny.run_train_tiny(config)
    with pytest.raises(ValueError, match="holds a run with another width, seed"):
        train_tiny.run_train_tiny(dataclasses.replace(config, seed=1, width=64))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(tmp_path):
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path))
    train_tiny.run_train_tiny(config)
    for path in (tmp_path / "checkpoints/5").rglob("*"):
        if path.is_file() and path.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"checkpoint 5 .* cannot be read"):
        train_tiny.run_train_tiny(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dir": None}, "--output_dir is missing"),
        ({"width": 33}, "--width=33; expected a multiple of 32"),
        ({"num_steps": 0}, "--num_steps=0; expected >= 1"),
        ({"num_examples": 7}, "--num_examples=7; expected at least --batch_size"),
        ({"learning_rate": float("inf")}, "--learning_rate=inf"),
        ({"seed": 1 << 31}, "--seed=2147483648"),
    ],
)
def test_bad_flags_are_named(tmp_path, change, message):
    config = dataclasses.replace(SMALL, **({"output_dir": str(tmp_path)} | change))
    with pytest.raises(ValueError, match=message):
        train_tiny.run_train_tiny(config)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    config = dataclasses.replace(SMALL, output_dir=str(tmp_path / "file/model"))
    with pytest.raises(ValueError, match=r"--output_dir=.* cannot be written to"):
        train_tiny.run_train_tiny(config)
