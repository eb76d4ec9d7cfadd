"""Reading an evaluation's folder, and its tables and figures."""

import json
import math
import subprocess
import sys
import xml.etree.ElementTree
from itertools import combinations

import numpy as np
import pytest

from experiments import statistics
from experiments.reporting import figures, tables
from experiments.reporting import rows as series
from experiments.reporting.rows import EvaluationFolder
from tests import evaluation_rows

QUICK = statistics.Resampling(num_resamples=500)
matplotlib = pytest.importorskip("matplotlib")


def make_evaluation(rows, history=(), sessions=None, **settings):
    """An evaluation that was never written."""
    named = evaluation_rows.make_settings(tuple(dict.fromkeys(row["sampler"] for row in rows)))
    sessions = evaluation_rows.make_sessions(rows) if sessions is None else sessions
    return EvaluationFolder(named | settings, rows, sessions, list(history))


@pytest.fixture(scope="module")
def small():
    rows = evaluation_rows.make_rows(0, 7, 3)
    return make_evaluation(rows, [evaluation_rows.make_history(0, rows[-1])])


@pytest.fixture(scope="module")
def summary(small):
    return tables.summarise(small, price_per_million_tokens=2.0, resampling=QUICK)


def test_made_up_rows_are_consistent_and_depend_on_their_names_alone(small):
    fewer = evaluation_rows.make_rows(0, 2, 1, ("entropy_cut",))
    assert [row for row in small.rows if row in fewer] == fewer
    assert evaluation_rows.make_rows(1, 2, 1, ("entropy_cut",)) != fewer
    for row in small.rows:
        spent = row["decoded_tokens"] + row["replayed_tokens"] + row["saved_tokens"]
        assert spent == row["proposed_tokens"]
        assert len(row["tokens"]) == row["num_tokens"]
        assert row["correct"] == (row["answer"] == row["gold"])
        assert row["entropy"] == pytest.approx(sum(row["token_entropy"]), abs=0.01)
        if row["steps"]:
            assert row["steps"][-1][6] == pytest.approx(row["log_prob"])
    for move in small.history[0]["moves"][1:]:
        terms = move["weight_new"] - move["weight_old"] + move["cut_change"]
        assert move["log_ratio"] == pytest.approx(terms)
        assert move["accepted"] == (move["log_ratio"] >= move["log_uniform"])


def test_a_folder_reads_back_as_it_was_written(small, tmp_path):
    folder = evaluation_rows.write_folder(tmp_path / "run", small.rows, small.history)
    assert series.read_folder(folder) == small
    (folder / "history.jsonl").unlink()
    (folder / "sessions.jsonl").unlink()
    assert series.read_folder(str(folder)) == small._replace(sessions=[], history=[])


def test_a_file_cut_anywhere_loses_no_more_than_its_last_line(tmp_path):
    rows = evaluation_rows.make_rows(0, 2, 1, ("standard",))
    rows[1]["text"] = "d'où ∑ 字"
    folder = evaluation_rows.write_folder(tmp_path, rows)
    whole = (folder / "rows.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    places = {*range(first - 3, first + 3), *range(0, len(whole), 37), *range(len(whole) - 3, 0)}
    start = whole.index("ù".encode())
    for place in sorted(places | set(range(start, start + 9))):
        (folder / "rows.jsonl").write_bytes(whole[:place])
        evaluation = series.read_folder(folder)
        complete = (place >= first - 1) + (place >= len(whole) - 1)
        assert evaluation.rows == rows[:complete]
        ends_cleanly = place in (0, first - 1, first, len(whole) - 1, len(whole))
        assert evaluation.torn_lines == (not ends_cleanly)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"correct": 1}, "correct = 1; expected true or false"),
        ({"seed": -1}, "seed = -1; expected a whole number from 0"),
        ({"seed": True}, "seed = True; expected a whole number"),
        ({"sampler": ""}, "sampler = ''; expected text without control"),
        ({"sampler": "a\nb"}, "expected text without control characters"),
        ({"problem": "\ud800"}, "expected text without control characters"),
        ({"problem": 17}, "problem = 17; expected text"),
        ({"ended": "stop"}, "ended = 'stop'; expected eos or length or not_finite"),
        ({"log_prob": "-3"}, "log_prob = '-3'; expected a number or null"),
        ({"decoded_tokens": 10**400}, "decoded_tokens = 1000"),
        ({"flops": 10**400}, "flops = 1000"),
        ({"answer": 72}, "answer = 72; expected text or null"),
        ({"tokens": "abc"}, "tokens = 'abc'; expected a list of whole numbers"),
        ({"tokens": [3, -1]}, "tokens = .3, -1.; expected a list of whole numbers"),
        ({"tokens": [2**63]}, "tokens = .*expected a list of whole numbers"),
        ({"tokens": [True]}, "tokens = .True.; expected a list of whole numbers"),
        ({"token_entropy": ["1"]}, "token_entropy = .*expected a list of numbers or nulls"),
        ({"token_entropy": [0.5]}, "have .* entries; expected num_tokens"),
        ({"accepted": 9, "attempted": 8}, "accepted = 9; expected at most attempted = 8"),
        ({"steps": [[1, 1, 1, 0, True, 0.0]]}, "steps = .*expected a list of .stage, step, cut"),
        ({"steps": [[1, 1, 1, 0, 1, 0.0, 0.0, 0.0]]}, "steps = .*expected a list of"),
        ({"steps": [[1, 1, 1, 0, True, "0", 0.0, 0.0]]}, "steps = .*expected a list of"),
        ({"seed": None}, "seed = None"),
        ("answer", "no 'answer'; expected text or null"),
        (b"[1]", r"\[1\]; expected a JSON object"),
        (b"{]", "expected a JSON object"),
        (b"", "expected a JSON object"),
        (b'{"text": "\xff"}', "expected a JSON object"),
        (b"[" * 100_000, "expected a JSON object"),
    ],
)
def test_malformed_rows_are_refused_by_file_and_line(change, expected, tmp_path):
    rows = evaluation_rows.make_rows(0, 3, 1, ("standard",))
    folder = evaluation_rows.write_folder(tmp_path, rows)
    lines = (folder / "rows.jsonl").read_bytes().split(b"\n")
    if isinstance(change, bytes):
        lines[1] = change
    elif isinstance(change, str):
        lines[1] = json.dumps({key: rows[1][key] for key in rows[1] if key != change}).encode()
    else:
        lines[1] = json.dumps(rows[1] | change).encode()
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match=f"^--run=.*rows.jsonl line 2: .*{expected}") as caught:
        series.read_folder(folder, flag="--run")
    assert len(str(caught.value)) < 700


def test_numbers_that_are_not_finite_are_read(tmp_path):
    (row,) = evaluation_rows.make_rows(0, 1, 1, ("entropy_cut",))
    row |= {"log_prob": None, "entropy": math.inf}
    row["steps"][0][5:7] = [-math.inf, None]
    folder = evaluation_rows.write_folder(tmp_path, [row])
    assert series.read_folder(folder).rows == [row]


def test_missing_files_and_doubles_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"settings\.json cannot be read"):
        series.read_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"settings\.json cannot be read"):
        series.read_folder("a\0b")
    rows = evaluation_rows.make_rows(0, 2, 2, ("standard",))
    folder = evaluation_rows.write_folder(tmp_path / "twice", [*rows, rows[1]])
    with pytest.raises(ValueError, match=r"lines 2 and 5 are both problem 0, sampler .*, seed 1"):
        series.read_folder(folder)
    (folder / "rows.jsonl").unlink()
    with pytest.raises(ValueError, match=r"rows\.jsonl cannot be read"):
        series.read_folder(folder)
    (folder / "rows.jsonl").mkdir()
    with pytest.raises(ValueError, match=r"rows\.jsonl cannot be read"):
        series.read_folder(folder)


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("sessions", {"sampler": "a", "seconds": -1, "compile_seconds": 0, "rows": 1}, "seconds"),
        ("sessions", {"sampler": "a", "seconds": 1, "compile_seconds": 0}, "no 'rows'"),
        ("history", {"problem": "1", "sampler": "a", "seed": 1, "moves": []}, "no 'pieces'"),
        (
            "history",
            {"problem": "1", "sampler": "a", "seed": 1, "moves": [], "pieces": {"3": 4}},
            "pieces = .*expected an object of texts",
        ),
    ],
)
def test_malformed_sessions_and_history_are_refused(name, record, expected, tmp_path):
    folder = evaluation_rows.write_folder(tmp_path, evaluation_rows.make_rows(0, 1, 1))
    (folder / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=f"{name}.jsonl line 1: .*{expected}"):
        series.read_folder(folder)


def test_cut_density_by_hand():
    step = [1, 1, 1, 1, True, 0.0, -1.0, 0.5]
    row = {"num_tokens": 2, "steps": [step]}
    assert series.cut_density([row], 8, 4).tolist() == [2, 2, 0, 0]
    later = row | {"num_tokens": 40, "steps": [[2, 1, 16, *step[3:]]]}  # the last of 16 tokens
    assert series.cut_density([later], 8, 4).tolist() == [0, 0, 0, 4]
    assert series.cut_density([row, later], 8, 4).tolist() == [1, 1, 0, 2]
    evenly = row | {"num_tokens": 7, "steps": [[1, 1, cut, *step[3:]] for cut in range(1, 8)]}
    assert series.cut_density([evenly], 8, 5) == pytest.approx(np.ones(5))


def test_top_jumps_by_hand():
    entropies = np.array([0.5, 2.0, 0.1, 0.1, 3.0, 2.0, 2.5, np.nan, 4.0, 4.1, 0.0])
    assert series.top_jumps(entropies).tolist() == [1, 4]  # 1.5 and 2.9; the unknown counts not
    assert series.top_jumps(np.array([1.0, 0.5])).tolist() == [0]  # H_0 = 0
    assert series.top_jumps(np.zeros(30)).tolist() == []


def test_mean_entropies_by_hand():
    rows = [{"token_entropy": values} for values in ([1.0, 2.0], [3.0, None, 5.0], [math.nan])]
    assert series.mean_entropies(rows, 4).tolist()[:3] == [2, 2, 5]
    assert math.isnan(series.mean_entropies(rows, 4)[3])


def test_log_prob_paths_by_hand():
    def row(problem, *steps):
        return {"problem": problem, "steps": [[*at, 1, 1, True, 0.0, p, 0.5] for *at, p in steps]}

    rows = [
        row("a", (1, 1, -9.0), (1, 2, -7.0)),  # stops in stage 1
        row("a", (1, 1, -5.0), (1, 2, -5.0), (2, 1, -11.0), (2, 2, None)),
        row("b", (1, 1, -1.0), (1, 2, -3.0), (2, 1, -4.0), (2, 2, -math.inf)),
    ]
    paths = series.log_prob_paths(rows, 2, 4)
    expected = [[-9, -7, np.nan, np.nan], [-5, -5, -11, np.nan], [-1, -3, -4, np.nan]]
    np.testing.assert_array_equal(paths, expected)
    # Each problem once: ((-9 - 5) / 2 - 1) / 2, ...; what stopped stays at its last.
    assert series.mean_path(rows, paths).tolist() == [-4, -4.5, -6.5, -6.5]


def test_acceptance_by_stage_by_hand():
    def row(problem, *accepted):
        return {
            "problem": problem,
            "steps": [[stage, 1, 1, 1, yes, 0.0, 0.0, 0.0] for stage, yes in accepted],
        }

    rows = [row("a", (1, True), (2, True)), row("a", (1, True)), row("b", (1, False), (1, False))]
    ratios = series.acceptance_by_stage(rows)
    assert ratios[1] == pytest.approx((0.5, math.sqrt(2 * 2) / 4, 2))
    assert ratios[2] == (1, None, 1)


def test_the_example_is_one_with_history_before_all_else(small):
    wanted = small.history[0]
    example = series.choose_example(small)
    assert example is not None
    assert all(example[key] == wanted[key] for key in ("problem", "sampler", "seed"))
    without = series.choose_example(small._replace(history=[]))
    assert without is not None
    assert (without["sampler"], without["correct"]) == ("entropy_cut", True)
    assert series.choose_example(small._replace(rows=[])) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_new_tokens": 512, "num_stages": 16}, 32),
        ({"max_new_tokens": 512}, None),
        ({"max_new_tokens": 512, "num_stages": 0}, None),
        ({"max_new_tokens": "512", "num_stages": 16}, None),
        (None, None),
    ],
)
def test_stage_length(config, expected):
    assert series.find_stage_length({"config": config}) == expected


def test_costs_are_ratios_of_means_over_common_problems():
    rows = evaluation_rows.make_rows(0, 3, 1, ("standard", "entropy_cut"))
    costs = {"standard": (10, 20, 30), "entropy_cut": (100, 20, 600)}
    for row in rows:
        row["decoded_tokens"] = costs[row["sampler"]][int(row["problem"])]
        row["flops"] = 7
        row["correct"] = row["problem"] != "1"
    rows = [row for row in rows if (row["sampler"], row["problem"]) != ("standard", "2")]
    sessions = [
        {"sampler": name, "seconds": seconds, "compile_seconds": 9.0, "rows": count}
        for name, seconds, count in (("standard", 4.0, 2), ("entropy_cut", 9.0, 3))
    ]
    evaluation = make_evaluation(rows, sessions=sessions)
    summary = tables.summarise(evaluation, price_per_million_tokens=0.5, resampling=QUICK)
    figures_of = summary["samplers"]["entropy_cut"]
    assert figures_of["multiples"]["decoded_tokens"] == pytest.approx(120 / 30)
    assert figures_of["multiples"]["seconds"] == pytest.approx(3 / 2)
    assert summary["samplers"]["standard"]["multiples"]["decoded_tokens"] == 1
    assert figures_of["decoded_tokens_per_solution"] == pytest.approx(240 / (2 / 3))
    assert figures_of["price_per_solution"] == pytest.approx(360 * 0.5 / 1e6)
    cells = tables.main_table(summary)[1]
    assert (cells["cost"], cells["FLOP cost"], cells["time cost"]) == ("4.00x", "1.00x", "1.50x")
    assert any("not complete" in note for note in summary["notes"])
    against = tables.summarise(evaluation, "standard", "entropy_cut", resampling=QUICK)
    assert against["samplers"]["standard"]["multiples"]["decoded_tokens"] == pytest.approx(0.25)
    assert [pair["sampler"] for pair in against["pairwise"]] == ["entropy_cut"]
    assert against["pairwise"][0]["multiples"]["decoded_tokens"] == pytest.approx(0.25)


def test_comparisons_are_adjusted_as_one_family(small, summary):
    pairs = summary["pairwise"]
    assert [pair["sampler"] for pair in pairs] == [
        name for name in evaluation_rows.SAMPLERS if name != "entropy_cut"
    ]
    for test in ("mcnemar", "sign_flip"):
        expected = statistics.holm([pair[test].p_value for pair in pairs])
        assert [pair[f"{test}_holm"] for pair in pairs] == expected
    ours, theirs = (
        [row for row in small.rows if row["sampler"] == name] for name in ("entropy_cut", "smc")
    )
    compared = statistics.compare(ours, theirs, QUICK)
    assert compared is not None
    assert pairs[-1] | compared == pairs[-1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"reference": "tmc"}, "--reference=tmc has no row; expected one of standard, low"),
        ({"baseline": "tmc"}, "--baseline=tmc has no row; expected one of"),
        ({"price_per_million_tokens": -1.0}, "--price_per_million_tokens=-1.0; expected"),
        ({"price_per_million_tokens": math.nan}, "--price_per_million_tokens=nan; expected"),
    ],
)
def test_what_an_evaluation_does_not_have_is_refused(arguments, expected, small):
    with pytest.raises(ValueError, match=expected):
        tables.summarise(small, resampling=QUICK, **arguments)


def test_every_accuracy_stands_beside_its_cost(summary):
    for table, column in ((tables.main_table(summary), 2), (tables.pairwise_table(summary), 2)):
        headings = list(table[0])
        assert headings[column].startswith("accuracy")
        assert headings[column + 1] == "cost"
        assert all(list(row) == headings for row in table)


def test_cells_are_those_of_the_summary(summary):
    row = tables.main_table(summary)[3]
    figures_of = summary["samplers"]["entropy_cut"]
    value, low, high = (100 * number for number in figures_of["accuracy"])
    assert row["sampler"] == "entropy_cut"
    assert row["problems x rows"] == "7 x 3"
    assert row["accuracy % [95%]"] == f"{value:.1f} [{low:.1f}, {high:.1f}]"
    assert row["cost"] == f"{figures_of['multiples']['decoded_tokens']:.2f}x"
    assert row["pass@2 %"] == f"{100 * figures_of['pass_at'][2].value:.1f}"
    assert "pass@3 %" in row
    assert "pass@1 %" not in row
    assert row["accepted %"] == f"{100 * figures_of['acceptance'].mean:.1f}"
    mean, error, _ = figures_of["log_prob"]
    assert row["log p"] == f"{mean:.1f} ± {error:.1f}"
    pair = tables.pairwise_table(summary)[0]
    assert pair["entropy_cut against"] == "standard"
    assert pair["z"] == f"{summary['pairwise'][0]['mcnemar'].statistic:.2f}"
    assert pair["p (Holm)"] == f"{summary['pairwise'][0]['mcnemar_holm']:.2g}"


def test_formats(tmp_path, summary):
    table = [{"sampler": "a|b\\", "cost": "1.00x"}, {"sampler": "c", "cost": "12.5x"}]
    assert tables.to_markdown(table) == (
        "| sampler | cost |\n| :-- | --: |\n| a\\|b\\\\ | 1.00x |\n| c | 12.5x |\n"
    )
    assert tables.to_text(table) == "sampler   cost\na|b\\     1.00x\nc        12.5x\n"
    assert tables.to_markdown([]) == tables.to_text([]) == ""
    paths = tables.write_tables(tmp_path / "new", summary)
    assert [path.name for path in paths] == ["tables.md", "tables.txt", "tables.json"]
    written = json.loads(paths[2].read_text())
    accuracy = summary["samplers"]["smc"]["accuracy"]
    assert written["samplers"]["smc"]["accuracy"] == accuracy._asdict()
    assert written["samplers"]["smc"]["pass_at"]["3"]["low"] is not None
    assert written["samplers"]["standard"]["acceptance"] is None
    for path in paths[:2]:
        assert all(note in path.read_text() for note in summary["notes"])
    with pytest.raises(ValueError, match="cannot be written to"):
        tables.write_tables(paths[0], summary)


def test_json_has_no_numbers_that_are_not_finite():
    assert json.loads(tables.to_json({"a": [math.nan, -math.inf, 1.5]})) == {"a": [None, None, 1.5]}


def lightness(colour, kind):
    """CIE Lab of a colour as readers of a kind see it (Machado et al. 2009, severity 1)."""
    values = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    seen = {
        "usual": np.eye(3),
        "protan": [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        "deutan": [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ],
    }
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ np.clip(np.array(seen[kind]) @ linear, 0, 1) / (0.9505, 1, 1.089)
    root = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("kind", ["usual", "protan", "deutan"])
def test_colours_keep_apart(kind):
    seen = {name: lightness(style.colour, kind) for name, style in figures.STYLES.items()}
    for one, other in combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 15, (one, other)
    assert len({style.marker for style in figures.STYLES.values()}) == len(figures.STYLES)


def test_unknown_samplers_have_styles_too():
    looks = figures.styles(["zeta", "entropy_cut", "alpha"])
    assert looks["entropy_cut"] == figures.STYLES["entropy_cut"]
    assert looks["zeta"] != looks["alpha"]
    assert figures.styles(["alpha", "zeta"])["zeta"] == looks["zeta"]


def test_every_figure_is_drawn_and_shows_the_numbers(small, summary):
    drawn = figures.draw_all(small, summary)
    assert drawn.left_out == []
    by_name = {drawing.name: drawing.figure for drawing in drawn.drawings}
    axes = by_name["accuracy"].axes[0]
    for place, (name, container) in enumerate(
        zip(summary["samplers"], axes.containers, strict=True)
    ):
        point, _, (bars,) = container
        value, low, high = (100 * number for number in summary["samplers"][name]["accuracy"])
        assert point.get_xydata()[0] == pytest.approx((value, place))
        assert bars.get_segments()[0][:, 0] == pytest.approx((low, high))
        assert point.get_color() == figures.STYLES[name].colour
    shown = {text.get_text() for text in axes.texts}
    assert {row["cost"] for row in tables.main_table(summary)} < shown
    axes = by_name["accuracy_against_cost"].axes[0]
    for name, (point, *_) in zip(summary["samplers"], axes.containers, strict=True):
        assert point.get_xdata()[0] == summary["samplers"][name]["decoded_tokens"].mean
        assert point.get_color() == figures.STYLES[name].colour
    axes = by_name["acceptance_by_stage"].axes[0]
    of_sampler = [row for row in small.rows if row["sampler"] == "uniform_cut"]
    ratios = series.acceptance_by_stage(of_sampler)
    heights = [100 * ratio.mean for ratio in ratios.values()]
    assert axes.containers[0][0].get_ydata() == pytest.approx(heights)
    axes = by_name["entropy"].axes[0]
    example = series.choose_example(small)
    assert example is not None
    assert axes.lines[0].get_ydata() == pytest.approx(example["token_entropy"])
    jumps = series.top_jumps(np.array(example["token_entropy"]))
    pieces = small.history[0]["pieces"]
    texts = {pieces[str(example["tokens"][jump])].strip() for jump in jumps}
    assert {text.get_text() for text in axes.texts} <= texts
    assert axes.texts
    panels = by_name["log_prob"].axes
    assert [axes.get_title(loc="left").split()[0] for axes in panels] == [
        "uniform_cut",
        "entropy_cut",
    ]
    for drawing in drawn.drawings:
        for axes in drawing.figure.axes:
            assert axes.get_xlabel() or drawing.name == "log_prob"


def test_saved_figures_are_plain_and_the_same_every_time(small, tmp_path):
    before = dict(matplotlib.rcParams)
    paths = figures.save_all(tmp_path / "one", small)
    again = {drawing.name: drawing.figure for drawing in figures.draw_all(small).drawings}
    assert len(paths) == 12
    for path in paths:
        assert path.stat().st_size > 5000
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            continue
        assert figures.to_svg(again[path.stem]) == path.read_text()
        root = xml.etree.ElementTree.fromstring(path.read_text())
        tags = {element.tag.split("}")[1] for element in root.iter()}
        assert tags <= {"svg", "defs", "style", "g", "path", "use", "clipPath", "rect"}
        for element in root.iter():
            links = [value for key, value in element.attrib.items() if key.endswith("href")]
            assert all(link.startswith("#") for link in links)
    assert dict(matplotlib.rcParams) == before
    with pytest.raises(ValueError, match="--output_dir="):
        figures.save_all(paths[0], small)


def test_figures_without_anything_to_show_are_left_out_with_a_reason():
    nothing = figures.draw_all(make_evaluation([]))
    assert nothing.drawings == []
    assert len(nothing.left_out) == 6
    plain = make_evaluation(evaluation_rows.make_rows(0, 4, 1, ("standard",)))
    drawn = figures.draw_all(plain)
    assert [drawing.name for drawing in drawn.drawings] == [
        *("accuracy", "accuracy_against_cost", "entropy")
    ]
    assert all("Metropolis-Hastings" in reason for _, reason in drawn.left_out)
    stepped = evaluation_rows.make_rows(0, 4, 1, ("entropy_cut",))
    for row in stepped:
        row["steps"] = [[*step[:6], None, None] for step in row["steps"]]
    assert dict(figures.draw_all(make_evaluation(stepped, config={})).left_out) == {
        "cuts": "settings.json has no max_new_tokens and num_stages under config",
        "log_prob": "no step has a finite log p",
    }


def test_awkward_evaluations_are_drawn_and_tabled(tmp_path):
    one = evaluation_rows.make_rows(0, 1, 1, ("entropy_cut",))
    wrong = evaluation_rows.make_rows(1, 4, 2, ("standard", "entropy_cut"))
    for row in wrong:
        row |= {"correct": False, "answer": None}
    broken = evaluation_rows.make_rows(2, 3, 2, ("cost$_{x}|", "entropy_cut", "日本"))
    for row in broken:
        row |= {"log_prob": None, "ended": "not_finite", "flops": None}
        row["token_entropy"] = [None] * row["num_tokens"]
        row["steps"] = [[*step[:5], -math.inf, math.nan, None] for step in row["steps"]]
    empty = evaluation_rows.make_rows(3, 3, 1, ("standard",))
    for row in empty:
        row |= {"tokens": [], "token_entropy": [], "num_tokens": 0, "decoded_tokens": 0}
    for number, rows in enumerate([one, wrong, broken, empty]):
        evaluation = make_evaluation(rows, sessions=[])
        summary = tables.summarise(evaluation, price_per_million_tokens=1.0, resampling=QUICK)
        for drawing in figures.draw_all(evaluation, summary).drawings:
            assert figures.to_svg(drawing.figure)
        tables.write_tables(tmp_path / str(number), summary)
        rows_of_text = tables.to_text(tables.main_table(summary)).splitlines()
        assert len(rows_of_text) == 1 + len(summary["samplers"])
    solutions = tables.summarise(make_evaluation(wrong), resampling=QUICK)
    assert "tokens by solution" not in tables.main_table(solutions)[0]
    assert any("no row is correct" in note for note in solutions["notes"])


def test_tokens_of_any_text_are_drawn(small):
    rows = [row for row in small.rows if row["sampler"] == "entropy_cut"]
    texts = [
        "$\\frac{1}{$",
        "\n\n",
        "\ud800",
        "日本",
        "\0",
        "\u202eabc",
        "</svg><script>",
        "  ",
        "a" * 99,
    ]
    for text in texts:
        pieces = {str(token): text for token in range(len(evaluation_rows.WORDS) + 1)}
        figure = figures.draw_entropy(rows, rows[0], pieces)
        svg = figures.to_svg(figure)
        xml.etree.ElementTree.fromstring(svg)
        assert "<script" not in svg
        assert bool(figure.axes[0].texts) == bool(text.strip(" "))


def test_no_global_state_of_pyplot_is_touched():
    program = (
        "import sys; from tests import evaluation_rows, test_reporting;"
        "from experiments.reporting import figures;"
        "rows = evaluation_rows.make_rows(0, 2, 1, ('entropy_cut',));"
        "drawn = figures.draw_all(test_reporting.make_evaluation(rows));"
        "figures.to_svg(drawn.drawings[0].figure);"
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_without_matplotlib_the_error_says_what_to_install(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"pip install -e '.\[evaluate\]'"):
        figures.draw_all(small)
