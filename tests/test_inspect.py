"""``python -m models.inspect``: what it tells, and that it reads no weight."""

import subprocess
import sys

import pytest

from models import gguf_header, inspect
from tests import tiny_checkpoints
from tests.tiny_checkpoints import CONFIG, write_gguf, write_huggingface


def run(capsys, *arguments: str) -> tuple[int, dict[str, str], str]:
    """Exit status, the lines by their first words, and everything."""
    status = inspect.main(list(arguments))
    captured = capsys.readouterr()
    lines = {line[:16].strip(): line[16:] for line in captured.out.splitlines()}
    return status, lines, captured.out + captured.err


@pytest.fixture
def no_weights(monkeypatch):
    def forbidden(*_arguments):
        raise AssertionError("a weight was read")

    monkeypatch.setattr(gguf_header, "read_tensor", forbidden)
    monkeypatch.setattr("models.checkpoint.read_parameters", forbidden)


@pytest.mark.usefixtures("no_weights")
def test_a_folder_and_a_file(tmp_path, capsys):
    status, folder, _ = run(capsys, str(write_huggingface(tmp_path / "model", num_shards=2)))
    assert status == 0
    assert folder["family"] == "llama"
    # 2 x 268 x 32 + 32 + 2 x (32 x (32 + 16 + 16 + 32) + 3 x 32 x 96 + 2 x 32)
    assert folder["parameters"] == "41.9 k"
    assert folder["weights"] == "168 kB in float32, 83.8 kB in bfloat16"
    assert folder["layers"] == "2 of width 32, 4 query and 2 key/value heads of 8"
    assert folder["context"] == "128 tokens"
    # 2 layers x keys and values x 2 heads x 8
    assert folder["cache"] == "256 B a token in float32, 128 B a token in bfloat16"
    assert folder["ends with"] == "2 <|end|>, 0 <|text|>"
    assert folder["chat template"] == "yes"
    assert folder["would load"] == "yes"

    status, file, _ = run(capsys, str(write_gguf(tmp_path / "model.gguf")))
    assert status == 0
    assert file["ends with"] == "2 <|end|>"
    same = ("family", "parameters", "weights", "layers", "vocabulary", "context", "cache")
    assert [file[name] for name in same] == [folder[name] for name in same]


def test_everything_that_would_refuse_to_load(tmp_path, capsys):
    folder = write_huggingface(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"12345678")
    tiny_checkpoints.write_json(folder / "generation_config.json", {"eos_token_id": 10_000})
    status, lines, text = run(capsys, str(folder))
    assert status == 1
    assert lines["would load"] == "no"
    for part in ("tokenizer.json: not a", "model.safetensors: not a", "end-of-sequence id 10000"):
        assert part in text
    tiny_checkpoints.write_json(folder / "config.json", {**CONFIG, "model_type": "mamba"})
    status, _, text = run(capsys, str(folder))
    assert status == 1
    assert "model_type is 'mamba'" in text

    path = tmp_path / "cut.gguf"
    path.write_bytes(write_gguf(tmp_path / "whole.gguf").read_bytes()[:-100])
    status, _, text = run(capsys, str(path))
    assert status == 1
    assert "beyond the end of the file" in text


def test_a_published_shape(capsys):
    status, lines, _ = run(capsys, "random:gemma-3-4b")
    assert status == 0
    assert lines["parameters"] == "3.88 G"
    assert lines["context"] == "131072 tokens; 29 layers see the last 1024"
    assert run(capsys, "random:qwen2.5-math-7b")[1]["context"] == (
        "4096 tokens, longer ones by YaRN"
    )


def test_of_a_hub_id_the_settings_only(tmp_path, capsys, monkeypatch):
    commit = "0" * 39 + "1"
    folder = write_huggingface(tmp_path / commit)
    (folder / "model.safetensors").unlink()
    asked = []

    def download(repo_id, revision, allow_patterns, ignore_patterns):
        asked.append((repo_id, revision, tuple(allow_patterns)))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    status, lines, _ = run(capsys, "owner/name", "--revision=main")
    assert status == 0
    assert lines["model"] == f"owner/name@{commit}"
    assert "weights are not downloaded" in lines["would load"]
    assert asked == [("owner/name", "main", ("*.json", "*.jinja"))]


def test_the_command():
    command = [sys.executable, "-m", "models.inspect"]
    done = subprocess.run([*command, "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("--model=nothing is unknown; expected smollm2-135m")
    assert "Traceback" not in done.stderr
