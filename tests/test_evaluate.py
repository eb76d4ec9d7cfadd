"""``experiments.evaluate``, ``sweep`` and ``report`` end to end on a tiny model."""

import dataclasses
import json
import pathlib

import jax
import pytest

from experiments import evaluation_flags, report, sweep
from experiments.evaluate import EvaluateConfig, run_evaluate
from experiments.sweep import SweepConfig, run_sweep
from tests import tiny_checkpoints

ROWS = "".join(
    json.dumps({"question": f"{a} + {b}?", "answer": f"It is {a + b}.\n#### {a + b}"}) + "\n"
    for a, b in ((1, 2), (3, 4), (5, 6), (7, 8))
)


@pytest.fixture(scope="module", autouse=True)
def compiled_programs(tmp_path_factory):
    """Keeps compiled programs on disk for this file: its runs compile the same few."""
    folder = str(tmp_path_factory.mktemp("compiled"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (folder, 0.0), strict=True):
        jax.config.update(name, value)
    yield folder
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "gsm8k.jsonl").write_text(ROWS)
    tiny_checkpoints.write_huggingface(
        folder / "tiny", tiny_checkpoints.CONFIG | {"max_position_embeddings": 512}
    )
    return folder


@pytest.fixture
def config(files, tmp_path):
    return EvaluateConfig(
        task="gsm8k",
        data=str(files / "gsm8k.jsonl"),
        problems="0,2-3",
        model=str(files / "tiny"),
        chat=False,
        samplers=("standard", "entropy_cut", "best_of_n"),
        option=("best_of_n.num_candidates=6", "best_of_n.rows=3"),
        seeds="0-1",
        max_new_tokens=12,
        num_stages=3,
        steps_per_stage=3,
        top_k=20,
        num_slots="4",
        record_problems=2,
        output_dir=str(tmp_path / "run"),
    )


def read_lines(config, name="rows.jsonl"):
    text = (pathlib.Path(config.output_dir) / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_rows_of_a_whole_evaluation(config, capsys):
    result = run_evaluate(config)
    assert result == {"added": 18, "rows": 18, "complete": True}
    rows = read_lines(config)
    assert [(row["sampler"], row["problem"], row["seed"]) for row in rows] == [
        (sampler, problem, seed)
        for sampler in config.samplers
        for problem in ("1", "3", "4")
        for seed in (0, 1)
    ]
    spent = {}
    for row in rows:
        assert len(row["tokens"]) == row["num_tokens"] <= 12
        assert row["log_prob"] == pytest.approx(sum(row["token_log_prob"]), abs=1e-2)
        assert row["entropy"] == pytest.approx(sum(row["token_entropy"]), abs=1e-2)
        assert row["gold"] in ("3", "11", "15")
        assert row["correct"] == (row["answer"] == row["gold"])
        assert bool(row["steps"]) == (row["sampler"] == "entropy_cut")
        if row["steps"]:
            assert row["steps"][-1][6] == pytest.approx(row["log_prob"], abs=1e-3)
        spent[row["sampler"], row["problem"], row["seed"]] = row["decoded_tokens"]
    for (sampler, *chain), tokens in spent.items():
        if sampler == "best_of_n":  # matched, unless all six candidates were not enough
            budget = spent["entropy_cut", *chain]
            assert tokens < budget + 12
            assert tokens >= min(budget, 6 * 1)
    assert len({row["settings"] for row in rows}) == 3
    sessions = read_lines(config, "sessions.jsonl")
    assert [session["sampler"] for session in sessions] == list(config.samplers)
    assert [session["rows"] for session in sessions] == [6, 6, 6]
    # Once more: nothing is left to do.
    before = (pathlib.Path(config.output_dir) / "rows.jsonl").read_bytes()
    assert run_evaluate(config)["added"] == 0
    assert (pathlib.Path(config.output_dir) / "rows.jsonl").read_bytes() == before
    assert "18 chains, of which 18 are done" in capsys.readouterr().out


def test_history_tells_the_rows(config):
    run_evaluate(dataclasses.replace(config, samplers=("entropy_cut",), option=()))
    rows = {(row["problem"], row["seed"]): row for row in read_lines(config)}
    history = read_lines(config, "history.jsonl")
    assert [(chain["problem"], chain["seed"]) for chain in history] == [("1", 0), ("3", 0)]
    for chain in history:
        row = rows[chain["problem"], chain["seed"]]
        steps = [move for move in chain["moves"] if move["kind"] == "step"]
        assert [
            [move["stage"], move["step"], move["cut"], move["divergence"], move["accepted"]]
            for move in steps
        ] == [step[:5] for step in row["steps"]]
        for move in steps:
            assert move["accepted"] == (move["log_ratio"] >= move["log_uniform"])
            terms = move["weight_new"] - move["weight_old"] + move["cut_change"]
            assert terms == pytest.approx(move["log_ratio"], abs=1e-3)
        current = None
        for move in chain["moves"]:
            if move["kind"] == "extension":
                current = move["tokens"]
                continue
            assert move["current_tokens"] == current
            if move["accepted"]:
                current = move["proposal_tokens"]
        # What follows the last step is an extension, if anything.
        assert row["tokens"][: len(current)] == current
        assert {str(token) for token in row["tokens"][: len(current)]} <= set(chain["pieces"])


def test_a_longer_evaluation_keeps_its_rows(config):
    first = dataclasses.replace(config, samplers=("entropy_cut",), option=(), seeds="1")
    run_evaluate(first)
    assert [row["seed"] for row in read_lines(config)] == [1, 1, 1]
    few = read_lines(config)
    result = run_evaluate(config)
    assert result == {"added": 15, "rows": 18, "complete": True}
    assert [row for row in read_lines(config) if row in few] == few
    # The order in which chains were run does not show.
    other = dataclasses.replace(config, output_dir=config.output_dir + "_at_once")
    run_evaluate(other)
    assert read_lines(config) == read_lines(other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 1 and was 0"),
        ({"problems": "0,2"}, "problems is"),
        ({"power": 3.0}, "power is 3.0 and was 4.0"),
        ({"num_slots": "5"}, "num_slots is 5 and was 4"),
    ],
)
def test_settings_that_differ_never_mix(config, changes, message):
    config = dataclasses.replace(config, samplers=("standard",), option=(), problems="0")
    if "problems" in changes:
        changes = {"problems": "1"}
    run_evaluate(config)
    before = read_lines(config)
    with pytest.raises(ValueError, match=message):
        run_evaluate(dataclasses.replace(config, **changes))
    assert read_lines(config) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "--data is missing; expected the file of gsm8k. Get"),
        ({"output_dir": None}, "--output_dir is missing"),
        ({"samplers": ("entropy",)}, "--samplers: 'entropy'; expected some of entropy_cut"),
        ({"samplers": ()}, "--samplers is empty"),
        ({"samplers": ("smc", "smc")}, "--samplers=smc,smc; expected each once"),
        ({"seeds": "1-"}, "--seeds=1-; expected numbers and ranges"),
        ({"seeds": "3-1"}, "--seeds=3-1; expected ranges that rise"),
        ({"seeds": "1,0-2"}, "--seeds=1,0-2; expected each number once"),
        ({"problems": "4"}, r"--problems=4; expected places in 0..3"),
        ({"record_problems": -1}, "--record_problems=-1; expected at least 0"),
        ({"num_stages": 5}, "num_stages"),
        ({"max_new_tokens": 1200}, "lower --max_new_tokens"),
        ({"power": 0.0}, "power is 0.0"),
        ({"option": ("smc.num_particles=2",)}, "--option=smc.num_particles=2"),
    ],
)
def test_bad_settings_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        run_evaluate(dataclasses.replace(config, **changes))


def test_numbers_are_read():
    assert evaluation_flags.parse_numbers("seeds", "0-2,7, 5") == (0, 1, 2, 7, 5)


def test_a_sweep_is_one_program(config, files, tmp_path):
    values = {
        name: getattr(config, name)
        for name in ("task", "data", "model", "chat", "max_new_tokens", "num_stages", "top_k")
    }
    grid = SweepConfig(
        **values,
        problems="0-1",
        seeds="0-1",
        num_slots="4",
        power=("2", "4"),
        cut_power=("0", "4"),
        steps_per_stage=("3",),
        output_dir=str(tmp_path / "sweep"),
    )
    assert run_sweep(grid) == {"added": 16, "rows": 16, "complete": True}
    rows = read_lines(grid)
    names = [sweep.name_of("entropy_cut", point) for point in sweep.grid(grid)]
    assert names[1] == "entropy_cut[power=2,cut_power=4,steps_per_stage=3]"
    assert list(dict.fromkeys(row["sampler"] for row in rows)) == names
    # A point is what an evaluation with its settings is.
    alone = dataclasses.replace(
        config, samplers=("entropy_cut",), option=(), power=2.0, cut_power=0.0, problems="0-1",
        record_problems=0, output_dir=str(tmp_path / "alone"),
    )  # fmt: skip
    run_evaluate(alone)
    first = [row["tokens"] for row in rows if row["sampler"] == names[0]]
    assert first == [row["tokens"] for row in read_lines(alone)]


def test_bad_grids_are_named(config):
    with pytest.raises(ValueError, match="--power=2,two; expected numbers"):
        sweep.grid(SweepConfig(power=("2", "two")))
    with pytest.raises(ValueError, match=r"--power=2,2\.0; expected each value once"):
        sweep.grid(SweepConfig(power=("2", "2.0")))
    assert sweep.grid(SweepConfig()) == [{}]


def test_report_of_an_evaluation(config):
    pytest.importorskip("matplotlib")
    run_evaluate(config)
    result = report.run_report(report.ReportConfig(config.output_dir, max_traces=5))
    target = pathlib.Path(config.output_dir) / "report"
    page = result["page"].read_text()
    assert "entropy_cut" in result["text"]
    assert "best_of_n" in page
    assert {"index.html", "tables.md", "accuracy.svg"} <= {path.name for path in target.iterdir()}
    with pytest.raises(ValueError, match="DIR="):
        report.run_report(report.ReportConfig(str(target)))
