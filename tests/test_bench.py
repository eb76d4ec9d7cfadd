"""``experiments.bench``: that it measures what it says, not how fast."""

import dataclasses
import importlib.util
import json
import math

import numpy as np
import pytest

from experiments import decode_bench, samplers_bench
from experiments.bench import BenchConfig, run_bench
from models.checkpoint import leaf_shapes
from models.huggingface_config import parse_config
from tests import tiny_checkpoints
from tests.tiny_checkpoints import CONFIG

HAS_REFERENCE = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(tiny_checkpoints.write_huggingface(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(autouse=True)
def _little_to_measure(monkeypatch):
    monkeypatch.setattr(decode_bench, "_COPY_BYTES", 1 << 16)
    monkeypatch.setattr(decode_bench, "_MATMUL_SIZE", 32)


@pytest.fixture
def config(model_folder, tmp_path):
    return BenchConfig(
        model=model_folder,
        batch_sizes=("1", "3"),
        cache_slots=40,
        top_k=20,
        repeats=1,
        reference=False,
        output=str(tmp_path / "figures.json"),
    )


def test_figures_and_their_file(config, capsys):
    result = run_bench(config)
    with open(config.output, encoding="utf-8") as file:
        written = json.load(file)
    assert written["rows"] == result["rows"]
    assert written["machine"]["platform"] == "cpu"
    assert [row["batch_size"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row["tokens_per_second"] == pytest.approx(row["batch_size"] / row["step_seconds"])
        assert row["share_of_ceiling"] == pytest.approx(
            row["tokens_per_second"] / row["ceiling_tokens_per_second"]
        )
        assert "ratio_to_reference" not in row
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 3
    assert "copy" in printed[0]
    assert "token law" in printed[2]


@pytest.mark.skipif(not HAS_REFERENCE, reason="needs the extra parity")
def test_reference_is_timed_where_it_is_installed(config):
    (row,) = run_bench(
        dataclasses.replace(config, batch_sizes=("2",), reference=True, output=None)
    )["rows"]
    assert row["ratio_to_reference"] == pytest.approx(
        row["tokens_per_second"] / row["reference_tokens_per_second"]
    )


@pytest.mark.slow
def test_engine_and_lockstep_sample_the_same(model_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One two three.\nThe cat sat.\n")
    config = BenchConfig(
        what="engine",
        model=model_folder,
        forms=("lockstep", "engine"),
        prompts_file=str(prompts),
        num_chains=3,
        num_slots=4,
        num_stages=2,
        stage_length=5,
        steps_per_stage=2,
        top_k=20,
        repeats=1,
        usual_proposals=2 if HAS_REFERENCE else 0,
    )
    result = run_bench(config)
    lockstep, engine = result["forms"]
    for form in (lockstep, engine):
        assert form["equal_traces"] == form["chains"] == 6
        assert form["attempted"] == lockstep["attempted"]
        assert form["proposed"] >= form["decoded"] + form["replayed"]
    assert lockstep["ratio_to_lockstep"] == 1
    assert engine["decoded"] < lockstep["decoded"]
    assert engine["replayed"] > 0
    assert lockstep["replayed"] == lockstep["saved"] == lockstep["discarded"] == 0
    assert engine["share_of_ideal"] <= 1
    # The peak is what the arguments take and the row through which rows are copied.
    memory = result["memory"]
    assert memory["peak"] >= memory["weights"] + memory["banks"]
    assert memory["peak"] < memory["weights"] + 2 * memory["banks"]
    if HAS_REFERENCE:
        usual = result["usual_way"]
        assert usual["proposals_of_the_run"] == engine["attempted"]
        assert usual["ratio_to_usual_way"] == pytest.approx(
            usual["seconds_per_proposal"] * engine["attempted"] / engine["seconds"]
        )
    assert len(capsys.readouterr().out.splitlines()) > 10


@pytest.mark.parametrize("tied", [False, True])
def test_products_of_a_step_count_every_matrix_once(tied):
    config = dataclasses.replace(
        parse_config(CONFIG, "here"), query_key_value_bias=True, post_norms=True, tied_head=tied
    )
    sizes = {path[-1]: [] for path, _ in leaf_shapes(config)}
    for path, shape in leaf_shapes(config):
        sizes[path[-1]].append(math.prod(shape) if len(shape) == 2 else 0)
    # Looking a token up multiplies nothing, but a tied embedding is the head as well.
    looked_up = 0 if tied else sum(sizes["embedding"])
    assert config.matrix_elements == sum(map(sum, sizes.values())) - looked_up


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": ("1", "many")}, "--batch_sizes=1,many"),
        ({"batch_sizes": ("0",)}, "--batch_sizes=0"),
        ({"cache_slots": 32}, "--cache_slots=32"),
        ({"repeats": 0}, "--repeats=0"),
        ({"model": "nowhere"}, "--model=nowhere"),
        ({"what": "engine", "forms": ("lockstep", "magic")}, "--forms=lockstep,magic"),
        ({"what": "engine", "num_slots": 0}, "--num_slots=0"),
        ({"what": "engine", "usual_proposals": 1}, "--usual_proposals=1"),
    ],
)
def test_bad_setting(config, changes, message):
    with pytest.raises(ValueError, match=message):
        run_bench(dataclasses.replace(config, **changes))


@pytest.fixture(scope="module")
def samplers_figures(tmp_path_factory):
    """Four samplers at equal tokens on a tiny model, and what was printed."""
    folder = tmp_path_factory.mktemp("samplers")
    model = str(tiny_checkpoints.write_huggingface(folder / "tiny"))
    output, prompts = folder / "figures.json", folder / "prompts.txt"
    prompts.write_text("One two three.\nThe cat sat.\nNot this one.\n")
    config = BenchConfig(
        what="samplers",
        model=model,
        prompts_file=str(prompts),
        samplers=("smc", "best_of_n", "low_temperature", "multiple_try"),
        num_prompts=2,
        num_chains=2,
        num_slots=8,
        num_stages=2,
        stage_length=6,
        steps_per_stage=4,
        num_tries=2,
        output=str(output),
    )
    run_bench(config)
    return json.loads(output.read_text())


@pytest.mark.slow
def test_samplers_spend_what_the_reference_spends(samplers_figures):
    table, chains = samplers_figures["samplers"], samplers_figures["chains"]
    assert list(table) == ["entropy_cut", "smc", "best_of_n", "low_temperature", "multiple_try"]
    for sampler, row in table.items():
        of_sampler = [chain for chain in chains if chain["sampler"] == sampler]
        assert len(of_sampler) == 4
        decoded = np.array([chain["decoded_tokens"] for chain in of_sampler])
        assert row["decoded_tokens"] == pytest.approx(decoded.mean())
        log_prob = np.array([chain["log_prob"] for chain in of_sampler])
        assert row["mean_log_prob"] == pytest.approx(log_prob.mean())
    reference = [chain for chain in chains if chain["sampler"] == "entropy_cut"]
    best = [chain for chain in chains if chain["sampler"] == "best_of_n"]
    for own, other in zip(best, reference, strict=True):
        # The candidate that crosses the budget counts, and no other after it.
        assert other["decoded_tokens"] <= own["decoded_tokens"] < other["decoded_tokens"] + 12
    assert table["entropy_cut"]["difference"] == 0.0
    assert table["entropy_cut"]["of_the_reference"] == 1.0
    assert table["low_temperature"]["of_the_reference"] < 0.7
    assert table["smc"]["acceptance"] is None
    assert table["smc"]["mean_least_ess"] > 0


def test_differences_are_paired_by_prompt():
    def row(log_prob, text="The answer is 5."):
        return {
            "log_prob": log_prob,
            "text": text,
            "num_tokens": 4,
            "attempted": 0,
            "accepted": 0,
            "decoded_tokens": 10,
            "details": {},
        }

    rows = {
        "entropy_cut": [row(-1.0), row(-3.0), row(-10.0), row(-12.0)],
        "smc": [row(-2.0), row(-6.0, "It is 7."), row(-13.0), row(-15.0, "No idea.")],
    }
    setting = samplers_bench._Setting(None, None, 3)
    numbers = samplers_bench.describe("smc", setting, rows, 2.0, num_chains=2)
    assert numbers["difference"] == pytest.approx(-2.5)  # -2 and -3 by prompt
    assert numbers["difference_standard_error"] == pytest.approx(0.5)
    assert numbers["distinct_answers"] == 1.5
    assert numbers["mean_log_prob_per_token"] == pytest.approx(-2.25)
