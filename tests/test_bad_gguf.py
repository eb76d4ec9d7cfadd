"""GGUF files that are broken, hostile or of a kind that is not supported: one clear error each.

The corpus is loaded in one process that has little memory and is watched; ``bad_corpus`` says how.
"""

import random

import numpy as np
import pytest

from models import checkpoint, gguf_header, gguf_reader
from models.families import GGUF_FAMILIES
from tests import bad_corpus, bad_gguf_models, bad_ggufs, tiny_families
from tests.tiny_checkpoints import write_gguf


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    paths = {}
    for architecture in GGUF_FAMILIES:
        path = folder / f"good {architecture}.gguf"
        paths[architecture] = tiny_families.write_gguf(
            path, *tiny_families.gguf_parts(architecture)
        )
    for name, (data, _) in bad_ggufs.CASES.items():
        paths[name] = folder / f"bytes {name}.gguf"
        paths[name].write_bytes(data)
    for name, (architecture, change, _) in bad_gguf_models.CASES.items():
        metadata, tensors = tiny_families.gguf_parts(architecture)
        change(metadata, tensors)
        paths[name] = tiny_families.write_gguf(folder / f"{name}.gguf", metadata, tensors)
    return paths, bad_corpus.load_all(list(paths.values()))


@pytest.mark.parametrize("architecture", GGUF_FAMILIES)
def test_good_gguf(corpus, architecture):
    paths, results = corpus
    bad_corpus.check_control(results[paths[architecture]])


@pytest.mark.parametrize("name", bad_ggufs.CASES)
def test_bad_bytes(corpus, name):
    paths, results = corpus
    bad_corpus.check(results[paths[name]], paths[name], bad_ggufs.CASES[name][1])


@pytest.mark.parametrize("name", bad_gguf_models.CASES)
def test_bad_model(corpus, name):
    paths, results = corpus
    bad_corpus.check(results[paths[name]], paths[name], bad_gguf_models.CASES[name][2])


def test_truncated_gguf_is_refused_at_every_length(tmp_path):
    data = write_gguf(tmp_path / "whole.gguf").read_bytes()
    path = tmp_path / "part.gguf"
    lengths = {*range(0, 200, 7), *range(200, len(data), len(data) // 100), len(data) - 1}
    for length in sorted(lengths):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"part\.gguf"):
            gguf_header.read_header(path)


@pytest.mark.parametrize("architecture", GGUF_FAMILIES)
def test_flipped_gguf_is_read_or_refused(tmp_path, monkeypatch, architecture):
    """Flipped bytes are refused or harmless; nothing but ValueError comes out."""
    monkeypatch.setattr(checkpoint, "read_parameters", lambda *arguments: {})
    path = tmp_path / "flipped.gguf"
    tiny_families.write_gguf(path, *tiny_families.gguf_parts(architecture))
    data = path.read_bytes()
    header = gguf_header.read_header(path)
    weights_start = min(info.offset for info in header.tensors.values())
    dice = random.Random(architecture)
    refused = 0
    for _ in range(100):
        flipped = bytearray(data)
        for _ in range(dice.choice([1, 4, 40])):
            flipped[dice.randrange(weights_start)] = dice.choice([0, 1, 127, 255])
        path.write_bytes(flipped)
        try:
            gguf_reader.read_gguf(path, np.dtype(np.float32), lambda path, leaf: leaf)
        except ValueError as error:
            bad_corpus.check_message(error, path)
            refused += 1
    assert refused > 10
