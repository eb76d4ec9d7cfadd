"""``experiments.suffix_divergence``: its distances, its choice of cuts, and whole studies."""

import collections
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ecmh_jax
from experiments import divergence_cuts, evaluation, suffix_divergence
from experiments.divergence_cuts import CutRule, choose_cuts
from experiments.edit_distance import edit_distances, mean_edit_distance
from experiments.grading import integers
from experiments.reporting import divergence_figure, tables
from experiments.suffix_divergence import DivergenceConfig, run_suffix_divergence
from experiments.tasks import read_problems
from models.load import load_model
from tests import tiny_checkpoints

ROWS = "".join(
    json.dumps({"question": f"{a} + {b}?", "answer": f"It is {a + b}.\n#### {a + b}"}) + "\n"
    for a, b in ((1, 2), (3, 4), (5, 6))
)
RULE = CutRule(cuts=3, distance=4, margin=0.05, decile=0.2)


def plain_distance(left, right) -> int:
    """Levenshtein distance as its definition has it."""

    @functools.cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        changed = left[i - 1] != right[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + changed)

    return distance(len(left), len(right))


def test_distances_are_those_of_the_recursion():
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 3, length).tolist() for length in (7, 0, 5, 11, 5, 1, 11, 0)]
    expected = [[plain_distance(left, right) for right in sequences] for left in sequences]
    assert edit_distances(sequences).tolist() == expected
    assert edit_distances([list(b"kitten"), list(b"sitting")]).tolist() == [[0, 3], [3, 0]]
    assert edit_distances([]).shape == (0, 0)
    assert edit_distances([[], []]).tolist() == [[0, 0], [0, 0]]


def test_mean_distance_is_by_the_longer_length():
    assert mean_edit_distance([[1, 2, 3, 4], [1, 2], []]) == pytest.approx((2 / 4 + 1 + 1) / 3)
    assert mean_edit_distance([[], [], [5]]) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="1 sequences; expected at least two"):
        mean_edit_distance([[1]])


def test_sets_of_places_are_equally_likely():
    places, count, distance = [2, 3, 5, 8, 9, 13], 3, 3
    fitting = {
        chosen
        for chosen in itertools.combinations(places, count)
        if all(right - left >= distance for left, right in itertools.pairwise(chosen))
    }
    assert len(fitting) > 3
    generator, draws = random.Random(0), 4000
    drawn = collections.Counter(
        tuple(divergence_cuts._choose_apart(places, count, distance, generator))
        for _ in range(draws)
    )
    assert drawn.keys() == fitting
    chance = 1 / len(fitting)
    allowed = 4 * math.sqrt(draws * chance * (1 - chance))
    assert all(abs(number - draws * chance) < allowed for number in drawn.values())
    # Where three do not fit, the most that do: 2 and 8, never 3 or 5 alone.
    assert divergence_cuts._choose_apart([2, 3, 8], 3, 6, generator) == [2, 8]
    assert divergence_cuts._choose_apart([], 3, 6, generator) == []


def test_cuts_are_of_their_deciles():
    rng = np.random.default_rng(1)
    for length in (100, 61, 37):
        entropy = np.round(rng.gamma(0.5, size=length), 6).tolist()
        jumps = [max(now - before, 0) for before, now in itertools.pairwise([0.0, *entropy])]
        margin = math.ceil(length / 20)
        inner = sorted(jumps[margin : length - margin])
        size = math.ceil(len(inner) / 5)
        for problem in map(str, range(20)):
            cuts = choose_cuts(problem, entropy, RULE, seed=0)
            assert [cut.kind for cut in cuts] == sorted((cut.kind for cut in cuts), reverse=True)
            for cut in cuts:
                assert margin < cut.cut <= length - margin
                assert cut.entropy == entropy[cut.cut - 1]
                assert cut.jump == pytest.approx(jumps[cut.cut - 1], abs=1e-6)
                if cut.kind == "top":
                    assert jumps[cut.cut - 1] >= inner[-size]
                else:
                    assert jumps[cut.cut - 1] <= inner[size - 1]
            for left, right in itertools.pairwise(cuts):
                assert left.kind != right.kind or right.cut - left.cut >= RULE.distance
    assert choose_cuts("1", entropy, RULE, 0) == choose_cuts("1", entropy, RULE, 0)
    assert choose_cuts("1", entropy, RULE, 0) != choose_cuts("1", entropy, RULE, 1)


def test_short_and_flat_traces_have_fewer_cuts():
    assert choose_cuts("1", [], RULE, 0) == []
    assert choose_cuts("1", [0.5, 1.0], RULE, 0) == []  # margins leave nothing
    flat = choose_cuts("1", [0.7] * 30, RULE, 0)  # its one jump is in the margin
    assert [cut.kind for cut in flat] == ["bottom"] * 3
    # One jump: the top decile is no larger, although two tokens would be a fifth.
    cuts = choose_cuts("1", [0.1] * 6 + [2.0] * 4, RULE, 0)
    assert [(cut.cut, cut.jump) for cut in cuts if cut.kind == "top"] == [(7, 1.9)]
    assert {cut.jump for cut in cuts if cut.kind == "bottom"} == {0.0}


load_once = functools.cache(load_model)


@pytest.fixture(autouse=True)
def _one_model(monkeypatch):
    """Programs are compiled once for a model's functions: all runs share them."""
    monkeypatch.setattr(
        suffix_divergence, "load_model", lambda name, dtype, revision, quantise: load_once(name)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divergence")
    (folder / "gsm8k.jsonl").write_text(ROWS)
    tiny_checkpoints.write_huggingface(
        folder / "tiny", tiny_checkpoints.CONFIG | {"max_position_embeddings": 512}
    )
    return folder


@pytest.fixture
def config(files, tmp_path):
    return DivergenceConfig(
        task="gsm8k",
        data=str(files / "gsm8k.jsonl"),
        problems="0,2",
        model=str(files / "tiny"),
        chat=False,
        top_k=20,
        max_new_tokens=40,
        cuts=2,
        distance=5,
        decile=0.2,
        resamples=3,
        suffix_tokens=12,
        num_slots="4",
        output_dir=str(tmp_path / "study"),
    )


def read_lines(config, name="cuts.jsonl"):
    text = (pathlib.Path(config.output_dir) / name).read_text()
    return [json.loads(line) for line in text.splitlines()]


def sample_again(key, model, prompts, lengths, run, sampler, num_chains, slots):
    """Chains of every prompt at power 2, by the library alone."""
    ids = jnp.arange(len(prompts), dtype=jnp.int32)
    return ecmh_jax.sample(
        key,
        model.language_model,
        model.params,
        jnp.repeat(jnp.asarray(prompts), num_chains, axis=0),
        jnp.repeat(jnp.asarray(lengths), num_chains),
        ecmh_jax.make_tuning(len(prompts) * num_chains, power=2.0),
        run,
        sampler,
        prompt_ids=jnp.repeat(ids, num_chains),
        chain_ids=jnp.tile(jnp.arange(num_chains, dtype=jnp.int32), len(prompts)),
        num_slots=slots,
    )


@pytest.mark.parametrize("sampler", ["low_temperature", "standard"])
def test_rows_are_of_suffixes_of_their_cuts(config, sampler):
    config = dataclasses.replace(config, suffix_sampler=sampler, power=2.0)
    summary = run_suffix_divergence(config)
    traces = {row["problem"]: row for row in read_lines(config, "traces.jsonl")}
    cuts = read_lines(config)
    assert list(traces) == ["1", "3"]
    assert [(cut["problem"], cut["kind"]) for cut in cuts] == [
        (problem, kind) for problem in traces for kind in ("top", "bottom") for _ in range(2)
    ]
    assert summary["cuts"] == {"top": 4, "bottom": 4}

    # The same again with the library alone, each prompt put together here.
    model = load_once(config.model)
    read = read_problems("gsm8k", config.data, 0)
    asked = evaluation.encode_problems("gsm8k", [read[0], read[2]], model, chat=False, pad_id=0)
    trace_key, suffix_key = jax.random.split(jax.random.key(0))
    slots, eos_ids = asked.tokens.shape[1], model.eos_ids
    run = ecmh_jax.Config(slots, 40, 1, 0, top_k=20, eos_ids=eos_ids, pad_id=eos_ids[0])
    drawn = sample_again(
        trace_key, model, asked.tokens, asked.lengths, run, "low_temperature", num_chains=1, slots=2
    )
    for row, trace in enumerate(traces.values()):
        start, end = int(asked.lengths[row]), int(drawn.trace.length[row])
        assert trace["tokens"] == drawn.trace.tokens[row, start:end].tolist()
        entropy = drawn.trace.entropy[row, start:end].tolist()
        assert trace["entropy"] == pytest.approx(entropy, abs=1e-5)

    kept = [traces[cut["problem"]]["tokens"][: cut["cut"] - 1] for cut in cuts]
    starts = [list(traces).index(cut["problem"]) for cut in cuts]
    prompts = [
        asked.tokens[place, : asked.lengths[place]].tolist() + some
        for place, some in zip(starts, kept, strict=True)
    ]
    slots = -(-max(map(len, prompts)) // 32) * 32
    padded = np.array([prompt + [0] * (slots - len(prompt)) for prompt in prompts])
    run = dataclasses.replace(run, prompt_length=slots, max_new_tokens=12)
    lengths = [len(prompt) for prompt in prompts]
    drawn = sample_again(suffix_key, model, padded, lengths, run, sampler, num_chains=3, slots=4)
    for place, cut in enumerate(cuts):
        start = len(prompts[place])
        suffixes = [
            drawn.trace.tokens[row, start : int(drawn.trace.length[row])].tolist()
            for row in range(3 * place, 3 * place + 3)
        ]
        shares = [
            plain_distance(left, right) / max(len(left), len(right))
            for left, right in itertools.combinations(suffixes, 2)
        ]
        texts = [model.tokenizer.decode(kept[place] + suffix) for suffix in suffixes]
        answers = [integers.find_number(text, last_number=True) for text in texts]
        answers = [answer and (integers.number_key(answer) or answer) for answer in answers]
        trace = traces[cut["problem"]]
        assert {
            "edit_distance": pytest.approx(sum(shares) / 3, abs=1e-6),
            "distinct_suffixes": len(set(map(tuple, suffixes))),
            "mean_length": pytest.approx(sum(map(len, suffixes)) / 3, abs=1e-6),
            "ended": sum(suffix[-1] in model.eos_ids for suffix in suffixes),
            "distinct_answers": len({*answers} - {None}),
            "answered": 3 - answers.count(None),
            "answers": answers,
            "length": len(trace["tokens"]),
            "position": pytest.approx(cut["cut"] / len(trace["tokens"]), abs=1e-6),
            "entropy": trace["entropy"][cut["cut"] - 1],
        }.items() <= cut.items()


def test_an_interrupted_study_goes_on(config, monkeypatch, capsys):
    run_suffix_divergence(config)
    folder = pathlib.Path(config.output_dir)
    names = ("traces.jsonl", "cuts.jsonl", "summary.json", "settings.json")
    before = {name: (folder / name).read_bytes() for name in names}
    assert run_suffix_divergence(config)["paired_problems"] == 2
    assert "8 cuts, of which 8 are done" in capsys.readouterr().out
    assert {name: (folder / name).read_bytes() for name in names} == before

    lines = before["cuts.jsonl"].splitlines(keepends=True)
    (folder / "cuts.jsonl").write_bytes(b"".join(lines[i] for i in (6, 1, 4)) + lines[2][:50])
    traces = before["traces.jsonl"].splitlines(keepends=True)
    (folder / "traces.jsonl").write_bytes(traces[1])
    original, added = suffix_divergence.DivergenceStore.add_cuts, []

    def add_and_stop(store, rows):
        original(store, rows)
        added.extend(rows)
        if len(added) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(suffix_divergence.DivergenceStore, "add_cuts", add_and_stop)
        with pytest.raises(KeyboardInterrupt):
            suffix_divergence.main(config)
    assert "Interrupted. The same command goes on from here." in capsys.readouterr().out
    assert len(read_lines(config)) == 5
    assert suffix_divergence.main(config) == 0
    output = capsys.readouterr().out
    assert "of which 5 are done\n2 problems, 2 with cuts of both kinds; 4 at the top" in output
    assert {name: (folder / name).read_bytes() for name in names} == before
    sessions = [(row["sampler"], row["rows"]) for row in read_lines(config, "sessions.jsonl")]
    assert sessions[0 :: len(sessions) - 1] == [("trace", 2), ("suffix", 9)]

    for changes, message in (
        ({"seed": 1}, "seed is 1 and was 0"),
        ({"resamples": 4}, "resamples is 4 and was 3"),
        ({"suffix_sampler": "standard"}, "suffix: sampler is .*standard.* and was"),
        ({"problems": "1"}, "problems is"),
    ):
        with pytest.raises(ValueError, match=message):
            run_suffix_divergence(dataclasses.replace(config, **changes))
    row = json.loads(lines[0])
    for damage, message in (
        (lines[0], "cuts.jsonl holds two rows of"),
        (b"[1]\n", r"cuts.jsonl holds \[1\]; expected the folder"),
        (json.dumps(row | {"cut": 1}).encode() + b"\n", "which the traces do not give"),
        (json.dumps(row | {"cut": 1, "settings": "0"}).encode() + b"\n", "with other settings"),
    ):
        (folder / "cuts.jsonl").write_bytes(before["cuts.jsonl"] + damage)
        with pytest.raises(ValueError, match=message):
            run_suffix_divergence(config)
        assert (folder / "cuts.jsonl").read_bytes() == before["cuts.jsonl"] + damage
    (folder / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"holds without settings\.json a row"):
        run_suffix_divergence(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "--data is missing; expected the file of gsm8k. Get"),
        ({"output_dir": None}, "--output_dir is missing"),
        ({"problems": "3"}, r"--problems=3; expected places in 0..2"),
        ({"problems": "1-"}, "--problems=1-; expected numbers and ranges"),
        ({"cuts": 0}, "--cuts=0; expected at least 1"),
        ({"distance": 0}, "--distance=0; expected at least 1"),
        ({"resamples": 1}, "--resamples=1; expected at least 2"),
        ({"suffix_tokens": 0}, "--suffix_tokens=0; expected at least 1"),
        ({"margin": 0.5}, "--margin=0.5; expected at least 0 and less than 0.5"),
        ({"margin": math.nan}, "--margin=nan"),
        ({"decile": 0.0}, "--decile=0.0; expected more than 0"),
        ({"decile": 0.6}, "--decile=0.6; expected more than 0 and at most 0.5"),
        ({"max_new_tokens": 0}, "--max_new_tokens=0; expected at least 1"),
        ({"top_k": -1}, "--top_k=-1; expected at least 0"),
        ({"power": 0.0}, "power is 0.0"),
        ({"num_slots": "0"}, "--num_slots=0; expected"),
        ({"grading_workers": 0}, "--grading_workers=0"),
        ({"suffix_tokens": 300}, "--max_new_tokens=40 and --suffix_tokens=300 .* at most 512"),
        ({"task": "humaneval"}, "--task=humaneval; expected one of .*gsm8k"),
        ({"suffix_sampler": "smc"}, "--suffix_sampler=smc; expected low_temperature or standard"),
    ],
)
def test_bad_settings_are_named(config, changes, message):
    with pytest.raises(ValueError, match=message):
        run_suffix_divergence(dataclasses.replace(config, **changes))


def make_row(problem, kind, **measures):
    names = dict.fromkeys(divergence_figure.MEASURES, 0)
    return names | {"problem": problem, "kind": kind, "cut": 1} | measures


def made_up_rows():
    """Three problems with both kinds, whose distances differ by 0.2, 0.3, 0.4; one without."""
    rows = [make_row("9", "top", edit_distance=1.0)]
    for number, difference in (("1", 0.2), ("2", 0.3), ("3", 0.4)):
        for step in (-0.1, 0.1):  # two cuts: their mean counts
            far = 0.5 + difference + step
            rows.append(make_row(number, "top", edit_distance=far, distinct_answers=2 + 1e-15))
        rows.append(make_row(number, "bottom", edit_distance=0.5, distinct_answers=2))
    return rows


def test_comparison_is_paired_by_problem():
    traces = [
        {"problem": name, "tokens": [1] * 4, "ended": "eos", "correct": name == "1"}
        for name in ("1", "2", "3", "9")
    ]
    summary = divergence_figure.summarise(traces, made_up_rows(), wanted=1)
    assert summary["paired_problems"] == 3
    assert summary["traces"] == {"mean_tokens": 4.0, "ended_with_eos": 4, "correct": 1}
    assert summary["fewer_cuts_than_wanted"] == {"9": {"tokens": 4, "top": 1, "bottom": 0}}
    assert summary["means"]["top"]["edit_distance"]["value"] == pytest.approx(0.8)
    assert summary["means"]["bottom"]["edit_distance"]["low"] is None  # nothing differs
    difference = summary["differences"]["edit_distance"]
    assert difference["value"] == pytest.approx(0.3)
    assert difference["standard_error"] == pytest.approx(0.1 / math.sqrt(3))
    assert 0.199 < difference["low"] < 0.3 < difference["high"] < 0.401
    # Of eight ways to flip three signs two are as far: Holm takes them times three.
    assert difference["p_value"] == pytest.approx(2 / 8)
    assert difference["p_holm"] == pytest.approx(3 * 2 / 8)
    assert summary["differences"]["distinct_answers"]["p_value"] == 1.0
    lines = tables.to_text(divergence_figure.table(summary)).splitlines()
    assert lines[1].split()[2:] == ["0.800", "0.500", "+0.300", "0.058", "0.25", "0.75"]


def test_figure_shows_the_pairs():
    pytest.importorskip("matplotlib")
    drawing = divergence_figure.draw(made_up_rows(), resamples=3)
    left, right = drawing.figure.axes
    heights = [np.asarray(line.get_ydata()) for line in left.lines]
    pairs = np.array([height for height in heights if len(height) == 2])
    assert np.allclose(pairs[:3], [[0.5, 0.7], [0.5, 0.8], [0.5, 0.9]])
    assert left.get_title(loc="left") == "top - bottom: +0.30 ± 0.06 s.e."
    assert "distinct answers of 3 suffixes" in right.get_ylabel()
    with pytest.raises(ValueError, match="no problem has cuts of both kinds"):
        divergence_figure.draw(made_up_rows()[:1], resamples=3)


def test_a_study_without_pairs_has_no_figure(config):
    summary = run_suffix_divergence(dataclasses.replace(config, margin=0.49))
    assert summary["cuts"] == {"top": 0, "bottom": 0}
    assert len(summary["fewer_cuts_than_wanted"]) == 2
    assert summary["left_out"] == "no problem has cuts of both kinds"
    assert read_lines(config) == []
