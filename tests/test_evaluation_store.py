"""The folder of an evaluation: what is kept, what is refused, what a killed run leaves."""

import itertools
import json

import pytest

from experiments.evaluation_store import EvaluationStore, key_of

SETTINGS = {"task": "gsm8k", "seed": 0, "samplers": {"smc": {"power": 4.0}, "tmc": {"power": 4.0}}}


def make_row(store, sampler="smc", problem="1", seed=0, **others):
    return {
        "sampler": sampler,
        "problem": problem,
        "seed": seed,
        "settings": store.hash_of(sampler),
        **others,
    }


@pytest.fixture
def folder(tmp_path):
    return str(tmp_path / "evaluation")


def open_store(folder, settings=SETTINGS):
    store = EvaluationStore(folder)
    try:
        store.adopt(settings)
    except ValueError:
        store.close()
        raise
    return store


def test_rows_are_there_again(folder):
    with open_store(folder) as store:
        assert store.rows == {}
        store.add([make_row(store, text="a\u2028b\ud800")], [{**key(), "moves": []}])
        store.add([make_row(store, "tmc", seed=3)])
    with open_store(folder) as store:
        assert set(store.rows) == {("smc", "1", 0), ("tmc", "1", 3)}
        assert store.rows["smc", "1", 0]["text"] == "a\u2028b\ud800"


def key(sampler="smc", problem="1", seed=0):
    return {"sampler": sampler, "problem": problem, "seed": seed}


def test_every_torn_end_is_forgiven(folder, tmp_path):
    """Wherever a kill cuts the file, what was whole stays and the rest is written again."""
    with open_store(folder) as store:
        rows = [make_row(store, seed=seed, text="x" * seed) for seed in range(3)]
        store.add(rows)
    path = tmp_path / "evaluation" / "rows.jsonl"
    data = path.read_bytes()
    for size in range(len(data) + 1):
        path.write_bytes(data[:size])
        whole = data[:size].count(b"\n")
        with open_store(folder) as store:
            assert list(store.rows.values()) == rows[:whole]
            store.add(rows[whole:])
        assert path.read_bytes() == data


def test_history_without_its_row_goes(folder, tmp_path):
    with open_store(folder) as store:
        store.add([make_row(store)], [key()])
        store._append("history.jsonl", [key(seed=1)])  # killed before the row
    with open_store(folder) as store:
        store.add([make_row(store, seed=1)], [key(seed=1)])
    lines = (tmp_path / "evaluation" / "history.jsonl").read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [0, 1]


def test_sorted_rows_do_not_depend_on_their_history(folder, tmp_path):
    wanted = [("smc", "2", 0), ("smc", "1", 0), ("tmc", "2", 0)]
    contents = set()
    for number, order in enumerate(itertools.permutations(wanted)):
        place = f"{folder}{number}"
        with open_store(place) as store:
            for sampler, problem, seed in order:
                store.add([make_row(store, sampler, problem, seed)])
            store.sort(wanted)
        with open_store(place) as store:
            assert [key_of(row) for row in store.rows.values()] == wanted
        contents.add((tmp_path / f"evaluation{number}" / "rows.jsonl").read_text())
    assert len(contents) == 1


def test_arms_may_be_added(folder, tmp_path):
    with open_store(folder) as store:
        store.add([make_row(store)])
        before = store.hash_of("smc")
    more = SETTINGS | {"samplers": {"standard": {"power": 4.0}}}
    with open_store(folder, more) as store:
        assert store.hash_of("smc") == before
        assert len({store.hash_of(name) for name in ("smc", "tmc", "standard")}) == 3
    written = json.loads((tmp_path / "evaluation" / "settings.json").read_text())
    assert list(written["samplers"]) == ["smc", "tmc", "standard"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS | {"seed": 1}, "seed is 1 and was 0"),
        (SETTINGS | {"new": 1}, "new is 1 and was null"),
        (SETTINGS | {"samplers": {"smc": {"power": 2.0}}}, r"smc: power is 2.0 and was 4.0"),
    ],
)
def test_settings_never_mix(folder, settings, message):
    with open_store(folder):
        pass
    with pytest.raises(ValueError, match=f"--output_dir=.*holds rows of other settings.*{message}"):
        open_store(folder, settings)
    with open_store(folder):
        pass


def test_one_process_at_a_time(folder):
    with open_store(folder), pytest.raises(ValueError, match="in use by another process"):
        EvaluationStore(folder)
    with open_store(folder):
        pass


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("settings.json", "{", "settings.json is not that of an evaluation"),
        ("settings.json", "[]", "settings.json is not that of an evaluation"),
        ("settings.json", "{}", "settings.json is not that of an evaluation"),
        ("settings.json", None, "holds rows.jsonl but no settings.json"),
        ("rows.jsonl", "{}\n", "expected rows of an evaluation"),
        ("rows.jsonl", "7\n", "expected rows of an evaluation"),
        ("rows.jsonl", "{\n", "a line that is not JSON"),
    ],
)
def test_other_files_are_refused(folder, tmp_path, name, text, message):
    with open_store(folder) as store:
        store.add([make_row(store)])
    path = tmp_path / "evaluation" / name
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=f"--output_dir=.*{message}"):
        open_store(folder)


def test_rows_of_unknown_settings_are_refused(folder, tmp_path):
    with open_store(folder) as store:
        store.add([make_row(store) | {"settings": "0123456789ab"}])
    with pytest.raises(ValueError, match="a row of settings 0123456789ab"):
        open_store(folder)


def test_doubled_rows_are_refused(folder, tmp_path):
    with open_store(folder) as store:
        store.add([make_row(store)])
    path = tmp_path / "evaluation" / "rows.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(ValueError, match=r"holds two rows of \('smc', '1', 0\)"):
        open_store(folder)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--output_dir=.*cannot be written to"):
        EvaluationStore(str(tmp_path / "file" / "inside"))
