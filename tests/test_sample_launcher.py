"""``experiments.sample`` end to end on a tiny model: rows, summary, errors, interrupts."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

import ecmh_jax
from ecmh_jax import chain_queue
from experiments import prompts as prompts_lib
from experiments import run_folder, text_report
from experiments.sample import SampleConfig, run_sample
from models.load import load_model
from tests import tiny_checkpoints

PROMPTS = ("hello", "10 + 7 =", "hell hell")


@pytest.fixture(scope="module", autouse=True)
def _programs_compiled_once(tmp_path_factory):
    """Keeps compiled programs on disk for this file: its runs compile the same few."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(tiny_checkpoints.write_huggingface(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def config(model_folder, tmp_path):
    return SampleConfig(
        model=model_folder,
        prompt=PROMPTS,
        num_chains=3,
        num_slots="5",  # fewer than the 9 chains of a sampler
        max_new_tokens=12,
        num_stages=3,
        steps_per_stage=4,
        top_k=20,
        output_dir=str(tmp_path / "run"),
    )


def read_rows(config):
    with open(f"{config.output_dir}/traces.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def by_chain(rows):
    return {(row["sampler"], row["prompt_id"], row["chain"]): row for row in rows}


def test_folder_holds_every_chain(config):
    result = run_sample(config, "--seed=0\n")
    rows = read_rows(config)
    assert rows == result["rows"]
    assert [(row["sampler"], row["prompt_id"], row["chain"]) for row in rows] == [
        (sampler, prompt, chain)
        for sampler in config.sampler
        for prompt in range(3)
        for chain in range(3)
    ]
    with open(f"{config.output_dir}/summary.json", encoding="utf-8") as file:
        summary = json.load(file)
    assert summary == {key: value for key, value in result.items() if key != "rows"}
    assert not summary["interrupted"]
    with open(f"{config.output_dir}/flags.txt", encoding="utf-8") as file:
        assert file.read() == "--seed=0\n"
    for sampler, numbers in summary["samplers"].items():
        of_sampler = [row for row in rows if row["sampler"] == sampler]
        assert numbers["decoded_tokens"] == sum(row["decoded_tokens"] for row in of_sampler)
        assert numbers["mean_log_prob"] == pytest.approx(
            np.mean([row["log_prob"] for row in of_sampler]), abs=1e-4
        )


def test_what_it_cost(config):
    summary = run_sample(config)
    memory = summary["memory"]
    assert memory["num_slots"] == 5
    assert memory["total_bytes"] == memory["weights_bytes"] + 5 * memory["slot_bytes"]
    for sampler, numbers in summary["samplers"].items():
        rows = [row for row in summary["rows"] if row["sampler"] == sampler]
        for row in rows:
            assert row["proposed_tokens"] == sum(
                row[f"{kind}_tokens"] for kind in ("decoded", "replayed", "saved")
            )
            assert 0 < row["forwards"] <= numbers["forwards"]
        for name in ("proposed_tokens", "decoded_tokens", "flops"):
            assert numbers[name] == sum(row[name] for row in rows) > 0
        # Counted by the device in every decode step, and by each chain for itself.
        assert numbers["slot_utilisation"] == pytest.approx(
            (numbers["decoded_tokens"] + numbers["discarded_tokens"]) / (5 * numbers["forwards"]),
            abs=1e-4,
        )
        assert numbers["effective_tokens_per_second"] >= numbers["tokens_per_second"] > 0
    assert summary["samplers"]["standard"]["standard_samples_per_chain"] == 1.0
    assert summary["samplers"]["entropy_cut"]["standard_samples_per_chain"] > 1.0


def test_samplers_in_rounds(config):
    """Rows, costs and details of samplers that decode several rows for each result."""
    samplers = ("smc", "best_of_n", "multiple_try", "standard")
    config = dataclasses.replace(
        config,
        prompt=PROMPTS[:2],
        sampler=samplers,
        option=(
            "smc.num_particles=3",
            "best_of_n.num_candidates=4",
            "best_of_n.rows=2",
            "multiple_try.num_tries=2",
        ),
    )
    result = run_sample(config)
    rows = read_rows(config)
    assert rows == result["rows"]
    assert len(rows) == 2 * 3 * len(samplers)
    for sampler in samplers[:3]:
        of_sampler = [row for row in rows if row["sampler"] == sampler]
        numbers = result["samplers"][sampler]
        assert numbers["decoded_tokens"] == sum(row["decoded_tokens"] for row in of_sampler) > 0
        assert numbers["slot_utilisation"] is numbers["forwards"] is None
        assert numbers["tokens_per_second"] > 0
        assert bool(numbers["attempted"]) == (sampler == "multiple_try")
        for row in of_sampler:
            assert row["forwards"] is None
            assert bool(row["steps"]) == (sampler == "multiple_try")
    details = {row["sampler"]: row["details"] for row in rows}
    assert set(details["smc"]) == {"log_evidence", "least_ess", "resampled", "num_ancestors"}
    assert details["best_of_n"]["num_used"] == 4
    assert details["standard"] == {}
    assert "smc" in text_report.describe(result, seconds=1.0)


def test_slots_by_themselves(config):
    changes = {"num_slots": "auto", "sampler": ("standard",), "output_dir": None}
    assert run_sample(dataclasses.replace(config, **changes))["memory"]["num_slots"] == 9


def test_rows_are_consistent(config):
    for row in run_sample(config)["rows"]:
        assert row["num_tokens"] == len(row["tokens"]) <= 12
        ends = [token in (0, 2) for token in row["tokens"]]
        assert not any(ends[:-1])
        assert row["ended"] == ("eos" if ends[-1] else "length")
        assert row["attempted"] == len(row["steps"])
        assert row["accepted"] == sum(step[4] for step in row["steps"])
        is_chain = row["sampler"] == "entropy_cut"
        assert (row["attempted"] > 0) == is_chain
        for stage, step, cut, divergence, *_ in row["steps"]:
            assert 1 <= stage <= 3
            assert 1 <= step <= 4
            assert 1 <= cut <= stage * 4
            assert divergence == 0 or divergence >= cut


def test_rows_equal_the_library(config, model_folder):
    rows = by_chain(run_sample(dataclasses.replace(config, num_slots="9"))["rows"])
    model = load_model(model_folder)
    prompts = prompts_lib.encode_prompts(PROMPTS, model, chat=None, pad_id=2)
    prompt_ids, chain_ids = np.repeat(np.arange(3), 3), np.tile(np.arange(3), 3)
    for sampler in config.sampler:
        result = ecmh_jax.sample(
            jax.random.key(0),
            model.language_model,
            model.params,
            prompts.tokens[prompt_ids],
            prompts.lengths[prompt_ids],
            ecmh_jax.make_tuning(9),
            ecmh_jax.Config(
                prompt_length=prompts.tokens.shape[1],
                max_new_tokens=12,
                num_stages=3,
                steps_per_stage=4,
                top_k=20,
                eos_ids=model.eos_ids,
                pad_id=2,
            ),
            sampler,
            prompt_ids,
            chain_ids,
        )
        for index, (prompt, chain) in enumerate(zip(prompt_ids, chain_ids, strict=True)):
            row = rows[sampler, prompt, chain]
            start, end = prompts.lengths[prompt], result.trace.length[index]
            assert row["tokens"] == result.trace.tokens[index, start:end].tolist()
            assert row["accepted"] == result.stats.accepted[index]
            info = jax.tree.map(lambda field, index=index: field[..., index], result.info)
            taken = [tuple(place) for place in np.argwhere(info.attempted)]
            assert len(row["steps"]) == len(taken)
            for place, step in zip(taken, row["steps"], strict=True):
                record = (info.cut, info.divergence, info.accepted)
                assert step[:5] == [place[0] + 1, place[1] + 1, *(r[place] for r in record)]
                assert step[5] == pytest.approx(float(info.log_ratio[place]), abs=1e-5)


def test_a_rerun_repeats_every_row(config):
    first = run_sample(dataclasses.replace(config, output_dir=None))["rows"]
    assert run_sample(dataclasses.replace(config, output_dir=None))["rows"] == first
    other = run_sample(dataclasses.replace(config, output_dir=None, seed=1))["rows"]
    assert [row["tokens"] for row in other] != [row["tokens"] for row in first]


def test_refined_chains_finish_at_the_end(config):
    rows = run_sample(dataclasses.replace(config, refine_finished=True))["rows"]
    refined = [row for row in rows if row["sampler"] == "entropy_cut"]
    assert len(refined) == 9
    assert all(row["attempted"] == 12 for row in refined)


def stop_chains(monkeypatch, error):
    """Raises ``error`` once a chain of the last sampler, but not all of them, has finished."""
    original = chain_queue.run_queue

    def run_queue(rng_key, model, params, chains, config, *arguments):
        for update in original(rng_key, model, params, chains, config, *arguments):
            yield update
            if config.steps_per_stage and update.finished:
                raise error

    monkeypatch.setattr(chain_queue, "run_queue", run_queue)


def test_interrupt_keeps_finished_chains(config, monkeypatch):
    stop_chains(monkeypatch, KeyboardInterrupt)
    result = run_sample(config)
    assert result["interrupted"]
    finished = by_chain(read_rows(config))
    assert result["rows"] == list(finished.values())
    of_chains = [row for row in finished.values() if row["sampler"] == "entropy_cut"]
    assert len(finished) == 18 + len(of_chains)  # both one-stage samplers
    assert 0 < len(of_chains) < 9
    with open(f"{config.output_dir}/summary.json", encoding="utf-8") as file:
        assert json.load(file)["interrupted"]
    text = text_report.describe(result, seconds=1.0)
    assert "Interrupted" in text
    assert "entropy_cut" in text


def test_out_of_memory_names_the_flag(config, monkeypatch):
    stop_chains(monkeypatch, jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"))
    with pytest.raises(ValueError, match=r"--num_slots=5, which was estimated at .* try at most"):
        run_sample(config)
    assert len(read_rows(config)) > 18  # what had finished is kept


def test_a_folder_without_rows_may_be_used_again(config, monkeypatch):
    def run_queue(*arguments):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(chain_queue, "run_queue", run_queue)
        with pytest.raises(ValueError, match="--num_slots=5"):
            run_sample(config)
    run_sample(dataclasses.replace(config, num_slots="2", sampler=("standard",)))
    assert len(read_rows(config)) == 9


def test_another_error_of_the_device_is_not_hidden(config, monkeypatch):
    stop_chains(monkeypatch, jax.errors.JaxRuntimeError("INTERNAL: broken"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        run_sample(config)


def test_report_shows_what_was_asked_for(config):
    text = text_report.describe(run_sample(config), seconds=1.0)
    parts = ("accepted by stage", "cuts by position", "decoded", "busy", "FLOP", "5 slots of")
    for part in (*PROMPTS, *config.sampler, *parts):
        assert part in text


def test_prompts_files(tmp_path):
    plain = tmp_path / "prompts.txt"
    plain.write_text("one\n\n  two\n", "utf-8")
    assert prompts_lib.read_prompts(str(plain)) == ("one", "  two")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"prompt": "a\\nb", "id": 3}\n\n{"prompt": "c"}\n', "utf-8")
    assert prompts_lib.read_prompts(str(rows)) == ("a\nb", "c")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot be read"),
        ("blank.txt", b"\n \n", "holds no prompt"),
        ("latin.txt", b"\xff\xfe\xfa", "cannot be read"),
        ("torn.jsonl", b'{"prompt": "a"}\n{"prom', "line 2"),
        ("other.jsonl", b'{"text": "a"}\n', "line 1"),
        ("list.jsonl", b'["a"]\n', "line 1"),
        ("number.jsonl", b'{"prompt": 3}\n', "line 1"),
        ("empty.jsonl", b'{"prompt": " "}\n', "line 1"),
    ],
)
def test_bad_prompts_file(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        prompts_lib.read_prompts(str(path))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": ("standard", "magic")}, "'magic'; expected one of"),
        ({"sampler": ()}, "--sampler"),
        ({"power": 0.0}, "power is 0.0"),
        ({"num_stages": 5}, "num_stages is 5"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 4000}, "top_k is 4000; expected at most"),
        ({"num_chains": 0}, "--num_chains=0"),
        ({"num_slots": "0"}, "--num_slots=0; expected 'auto' or a number"),
        ({"num_slots": "many"}, "--num_slots=many; expected 'auto' or a number"),
        ({"max_new_tokens": 126}, "lower --max_new_tokens"),
        ({"prompt": ("fine", " \n")}, "prompt 1 is"),
        ({"prompts_file": "x.txt"}, "both given"),
        ({"output_dir": "/dev/null/run"}, "--output_dir=/dev/null/run cannot be written"),
    ],
)
def test_bad_setting(config, changes, message):
    with pytest.raises(ValueError, match=message):
        run_sample(dataclasses.replace(config, **changes))


def test_finished_work_is_not_overwritten(config):
    run_sample(config)
    before = read_rows(config)
    with pytest.raises(ValueError, match=r"already holds traces\.jsonl"):
        run_sample(config)
    assert read_rows(config) == before


def test_rows_are_not_rewritten_all_the_time(tmp_path, monkeypatch):
    # Begun and ended: the first update takes 1 s, so the next is not due before 21 s.
    clock = iter([0.0, 1.0, 20.9, 21.1, 21.2])
    monkeypatch.setattr(run_folder, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    folder, rows = run_folder.RunFolder(str(tmp_path), ""), [{"row": 1}]
    written = []
    for _ in range(3):
        folder.update_rows(rows)
        written.append(len((tmp_path / "traces.jsonl").read_text("utf-8").splitlines()))
        rows.append({"row": len(rows) + 1})
    assert written == [1, 1, 3]
    folder.write_rows(rows)
    assert len((tmp_path / "traces.jsonl").read_text("utf-8").splitlines()) == 4


def test_help_lists_every_field_as_a_flag():
    help_text = subprocess.run(
        [sys.executable, "-m", "experiments.sample", "--help"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    for field in dataclasses.fields(SampleConfig):
        assert f"--{field.name}:" in help_text or f"--[no]{field.name}:" in help_text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_stopped_process_leaves_whole_rows(config, sent, status):
    command = [sys.executable, "-m", "experiments.sample", f"--model={config.model}"]
    command += [f"--prompt={prompt}" for prompt in PROMPTS]
    command += ["--num_chains=3", "--num_slots=3", "--max_new_tokens=96", "--num_stages=32"]
    command += ["--steps_per_stage=400", f"--output_dir={config.output_dir}", "--top_k=20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            if any(row["sampler"] == "low_temperature" for row in read_rows(config)):
                break
        except FileNotFoundError:
            time.sleep(0.01)
    process.send_signal(sent)
    _, error = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in error
    rows = by_chain(read_rows(config))
    assert {("standard", prompt, chain) for prompt in range(3) for chain in range(3)} <= set(rows)
