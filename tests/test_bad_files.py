"""Model folders that are broken, hostile or not supported: one clear error each.

The corpus is loaded in one process that has little memory and is watched; ``bad_corpus`` says how.
"""

import copy
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from models import checkpoint, huggingface_config, huggingface_reader
from models.config import TransformerConfig
from tests import (
    bad_configs,
    bad_corpus,
    bad_folders,
    bad_safetensors,
    bad_tokenizers,
    tiny_families,
)
from tests.tiny_checkpoints import write_json

FOLDERS = {
    f"{kind}_{name}": case
    for kind, cases in (
        ("file", bad_folders.CASES),
        ("tokenizer", bad_tokenizers.CASES),
        ("weights", bad_safetensors.CASES),
    )
    for name, case in cases.items()
}
# What asks transformers to run a model's own code; of no meaning here.
OWN_CODE = {
    "auto_map": {"AutoModelForCausalLM": "modeling_own.Own", "AutoConfig": "modeling_own.Config"},
    "trust_remote_code": True,
}
MUTANTS = 60  # a family
ODD_VALUES = (
    *(None, True, False, 0, -1, 1, 2, 3, 7, 1 << 31, 1 << 63, 10**400, 0.0, -0.5, 1e-320, 1e308),
    *(float("nan"), float("inf"), "", "x", "8", "\ud800", "llama", [], [1], [[]], {}, {"a": 1}),
)


def copy_linked(good: Path, folder: Path) -> None:
    """A folder whose config.json alone may be written."""
    folder.mkdir()
    for path in good.iterdir():
        (shutil.copy if path.name == "config.json" else os.link)(path, folder / path.name)


def write_corpus(folder: Path) -> dict[str, Path]:
    """Writes every bad folder, and a good one of every family."""
    paths = {}
    for family in tiny_families.CONFIGS:
        paths[family] = tiny_families.write_huggingface(folder / family, family)
        # Were code of a model ever run, it would be this.
        (folder / family / "modeling_own.py").write_text("raise SystemExit('ran remote code')")
    for name, (family, change, _) in bad_configs.CASES.items():
        paths[name] = folder / name
        copy_linked(folder / family, folder / name)
        values = copy.deepcopy(tiny_families.CONFIGS[family])
        change(tiny_families.settings(values))
        write_json(folder / name / "config.json", values)
    for name, (change, _) in FOLDERS.items():
        paths[name] = folder / name
        shutil.copytree(folder / "llama", folder / name)
        change(folder / name)
    paths["own_code"] = folder / "own_code"
    copy_linked(folder / "llama", folder / "own_code")
    write_json(folder / "own_code" / "config.json", {**tiny_families.CONFIGS["llama"], **OWN_CODE})
    return paths


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    paths = write_corpus(tmp_path_factory.mktemp("corpus"))
    return paths, bad_corpus.load_all(list(paths.values()))


@pytest.mark.parametrize("name", [*tiny_families.CONFIGS, "own_code"])
def test_good_folder(corpus, name):
    paths, results = corpus
    bad_corpus.check_control(results[paths[name]])


@pytest.mark.parametrize("name", bad_configs.CASES)
def test_bad_config(corpus, name):
    paths, results = corpus
    bad_corpus.check(results[paths[name]], paths[name], bad_configs.CASES[name][2])


@pytest.mark.parametrize("name", FOLDERS)
def test_bad_folder(corpus, name):
    paths, results = corpus
    bad_corpus.check(results[paths[name]], paths[name], FOLDERS[name][1])


def test_a_link_is_followed(corpus, tmp_path):
    """The hub's own cache consists of links, so these may lead out of a model's folder."""
    paths, _ = corpus
    for path in paths["llama"].iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = huggingface_reader.read_huggingface(
        tmp_path, np.dtype(np.float32), lambda path, leaf: leaf
    ).config
    assert config.family == "llama"


def read_or_refuse(folder: Path) -> bool:
    """Reads config.json; returns whether it was refused, as it must be if it is bad."""
    try:
        config = huggingface_config.read_config(folder)
    except ValueError as error:
        bad_corpus.check_message(error, folder / "config.json")
        return True
    assert isinstance(config, TransformerConfig)
    return False


def spoil(values, dice: random.Random) -> None:
    """Changes one value, at whatever depth, or drops it."""
    keys = list(values) if isinstance(values, dict) else list(range(len(values)))
    key = dice.choice(keys)
    if isinstance(values[key], (dict, list)) and values[key] and dice.random() < 0.7:
        spoil(values[key], dice)
    elif dice.random() < 0.1:
        del values[key]
    else:
        values[key] = dice.choice(ODD_VALUES)


@pytest.mark.parametrize("family", tiny_families.CONFIGS)
def test_mutated_config_is_read_or_refused(tmp_path, family):
    dice = random.Random(family)
    refused = 0
    for _ in range(MUTANTS):
        values = copy.deepcopy(tiny_families.CONFIGS[family])
        for _ in range(dice.choice([1, 1, 3])):
            spoil(values, dice)
        write_json(tmp_path / "config.json", values)
        refused += read_or_refuse(tmp_path)
    assert MUTANTS // 4 < refused < MUTANTS


@pytest.mark.parametrize("family", tiny_families.CONFIGS)
def test_flipped_config_is_read_or_refused(tmp_path, family):
    dice = random.Random(family)
    text = json.dumps(tiny_families.CONFIGS[family]).encode()
    refused = 0
    for _ in range(MUTANTS):
        flipped = bytearray(text)
        for _ in range(dice.choice([1, 2])):
            flipped[dice.randrange(len(text))] = dice.choice(b'0159-.eE",:[]{}\\\xff \x00')
        (tmp_path / "config.json").write_bytes(flipped)
        refused += read_or_refuse(tmp_path)
    assert MUTANTS // 4 < refused < MUTANTS


def test_flipped_safetensors_header_is_read_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "read_parameters", lambda *arguments: {})
    folder = tiny_families.write_huggingface(tmp_path / "model", "llama")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    dice = random.Random(0)
    refused = 0
    for _ in range(200):
        flipped = bytearray(data)
        for _ in range(dice.choice([1, 1, 3])):
            flipped[dice.randrange(size)] = dice.choice([0, 1, 34, 44, 48, 57, 91, 93, 127, 255])
        path.write_bytes(flipped)
        try:
            huggingface_reader.read_huggingface(folder, np.dtype(np.float32), lambda _, leaf: leaf)
        except ValueError as error:
            bad_corpus.check_message(error, folder)
            refused += 1
    assert refused > 150
