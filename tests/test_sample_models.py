"""The launcher on models whose law depends on the length of a run, and on quantised weights."""

import dataclasses

import numpy as np
import pytest

from experiments import text_report
from experiments.sample import SampleConfig, run_sample
from models.families import FAMILIES
from tests import tiny_checkpoints, tiny_families


@pytest.fixture
def config(tmp_path):
    rng = np.random.default_rng(0)
    shapes = tiny_families.weights("phi3", FAMILIES["phi3"].huggingface_names)
    weights = {
        name: rng.normal(size=leaf.shape).astype(np.float32) * 0.3 + ("norm" in name)
        for name, leaf in shapes.items()
    }
    folder = tiny_checkpoints.write_huggingface(tmp_path, tiny_families.CONFIGS["phi3"], weights)
    return SampleConfig(
        model=str(folder),
        prompt=("ab", "hello"),
        chat=False,
        sampler=("low_temperature",),
        num_chains=2,
        num_slots="2",
        max_new_tokens=8,
        num_stages=2,
        steps_per_stage=2,
        top_k=20,
    )


def test_the_law_follows_the_needed_length(config):
    """The tiny model's long factors hold beyond 32 positions; --context_length pins the law."""
    laws, texts = [], []
    for changes in ({}, {"max_new_tokens": 40}, {"context_length": 33}, {"context_length": 20}):
        result = run_sample(dataclasses.replace(config, **changes))
        laws.append(result["model"]["rotary"].partition(" factors")[0])
        texts.append([row["tokens"] for row in result["rows"]])
    assert laws == ["LongRoPE, short", "LongRoPE, long", "LongRoPE, long", "LongRoPE, short"]
    assert texts[3] == texts[0]
    assert texts[2] != texts[0]


def test_a_run_longer_than_the_context_is_refused(config):
    with pytest.raises(ValueError, match="expected at most 128, the context of"):
        run_sample(dataclasses.replace(config, max_new_tokens=128))
    with pytest.raises(ValueError, match=r"--context_length=9; expected 1\d, which"):
        run_sample(dataclasses.replace(config, context_length=9))
    with pytest.raises(ValueError, match=r"--context_length=129; expected .* to 128"):
        run_sample(dataclasses.replace(config, context_length=129))


def test_results_name_quantised_weights(config):
    pytest.importorskip("qwix")
    wide = run_sample(config)
    narrow = run_sample(dataclasses.replace(config, quantise="int8"))
    assert (wide["model"]["weights"], narrow["model"]["weights"]) == ("float32", "int8")
    # A CPU's program widens the matrices again, beside the narrow ones.
    assert narrow["memory"]["weights_bytes"] > wide["memory"]["weights_bytes"]
    assert "float32, int8 weights on" in text_report.describe(narrow, 1.0)
    assert "weights on" not in text_report.describe(wide, 1.0)
