"""Flags made from a dataclass, and how a launcher ends."""

import dataclasses

import pytest
from absl import app, flags

from experiments import launch
from experiments.launch import setting


@dataclasses.dataclass(frozen=True)
class ExampleConfig:
    """Every kind of field."""

    example_word: str = setting("a", "A word.")
    example_missing: float | None = setting(None, "Absent by default.")
    example_count: int = setting(3, "A count.")
    example_switch: bool = setting(True, "A switch.")
    example_choice: str | None = setting(None, "One of few.", ("x", "y"))
    example_list: tuple[str, ...] = setting(("p", "q"), "Separated by commas.")
    example_many: tuple[str, ...] = setting((), "Repeated.", repeated=True)


@pytest.fixture(scope="module")
def read():
    return launch.define_flags(ExampleConfig)


@pytest.fixture(autouse=True)
def _flags_as_they_were():
    saved = {}
    yield saved
    for name in dir(flags.FLAGS):
        if name.startswith("example_"):
            flags.FLAGS[name].unparse()


def test_defaults_are_those_of_the_fields(read):
    flags.FLAGS(["program"])
    assert read() == ExampleConfig()


def test_flags_become_fields(read):
    flags.FLAGS(
        [
            "program",
            "--example_word=b",
            "--example_missing=0.5",
            "--example_count=4",
            "--noexample_switch",
            "--example_choice=y",
            "--example_list=r,s,t",
            "--example_many=one, two",
            "--example_many=three",
        ]
    )
    assert read() == ExampleConfig("b", 0.5, 4, False, "y", ("r", "s", "t"), ("one, two", "three"))


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """One field is the argument, the other a flag."""

    folder: str
    example_price: float = setting(2.0, "A flag.")


def test_a_field_may_be_the_argument(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMH_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(launch.jax.config, "update", lambda *_: None)
    mains = []
    monkeypatch.setattr(launch.app, "run", mains.append)
    seen = []
    launch.start(FolderConfig, lambda config: seen.append(config) or 0, argument="folder")
    flags.FLAGS(["program", "--example_price=3"])
    with pytest.raises(SystemExit):
        mains[0](["program", "runs/first"])
    assert seen == [FolderConfig("runs/first", 3.0)]
    with pytest.raises(app.UsageError, match="expected an argument, FOLDER"):
        mains[0](["program"])
    with pytest.raises(app.UsageError, match="unexpected argument 'second'"):
        mains[0](["program", "first", "second"])


def test_a_word_that_is_no_choice(read):
    with pytest.raises(flags.IllegalFlagValueError, match="should be one of <x\\|y>"):
        flags.FLAGS(["program", "--example_choice=z"])


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("power is 0"), "error: power is 0"),
        (FileNotFoundError("no file"), "error: no file"),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_end_in_one_line(error, status, tmp_path, monkeypatch):
    monkeypatch.setenv("ECMH_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(launch.jax.config, "update", lambda *_: None)

    def fail():
        raise error

    with pytest.raises(SystemExit) as raised:
        launch.run_main(["program"], fail)
    assert raised.value.code == status


def test_status_and_compilation_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ECMH_JAX_CACHE", str(tmp_path))
    settings = {}
    monkeypatch.setattr(launch.jax.config, "update", settings.__setitem__)
    with pytest.raises(SystemExit) as raised:
        launch.run_main(["program"], lambda: 7)
    assert raised.value.code == 7
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "compiled")


def test_words_that_are_no_flags():
    with pytest.raises(app.UsageError, match="unexpected argument 'prompt'"):
        launch.run_main(["program", "prompt"], lambda: 0)
