"""Bad model folders: ``name -> (what is done to a good Llama folder, part of the message)``.

Here are the small files; ``bad_configs`` has the values of config.json, ``bad_tokenizers``
tokenizer.json and ``bad_safetensors`` the weights.
"""

import copy
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from tests import tiny_families
from tests.tiny_checkpoints import write_json

Case = tuple[Callable[[Path], Any], str]
INDEX = "model.safetensors.index.json"
BOM = "\ufeff"


def write(name: str, contents: str | bytes) -> Callable[[Path], Any]:
    """Returns a change that writes one file."""
    data = contents.encode() if isinstance(contents, str) else contents
    return lambda folder: (folder / name).write_bytes(data)


def remove(name: str) -> Callable[[Path], Any]:
    """Returns a change that removes one file."""
    return lambda folder: (folder / name).unlink()


def sparse(name: str, size: int) -> Callable[[Path], Any]:
    """Returns a change that makes a file long; the zeros take no room on a disk."""
    return lambda folder: os.truncate(folder / name, size)


def link(name: str, target: str) -> Callable[[Path], Any]:
    """Returns a change that puts a symbolic link in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return change


def as_folder(name: str) -> Callable[[Path], Any]:
    """Returns a change that puts a folder in a file's place."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def pipe(name: str) -> Callable[[Path], Any]:
    """Returns a change that puts a pipe in a file's place: whoever opens it waits forever."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


# --- index.json -------------------------------------------------------------------------------


def index(contents: Any) -> Callable[[Path], Any]:
    """Returns a change after which only an index says where the weights are."""

    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        write_json(folder / INDEX, contents)

    return change


def shard(name: Any) -> Callable[[Path], Any]:
    """Returns a change after which an index names one shard."""
    return index({"weight_map": {"model.norm.weight": name}})


def in_two_shards(folder: Path) -> None:
    """Stores a tensor twice."""
    index({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})(folder)
    extra = {"model.norm.weight": np.ones(32, np.float32)}
    safetensors.numpy.save_file(extra, folder / "model-2.safetensors")


def many_long_headers(folder: Path) -> None:
    """Gives the same long header, without tensors, many names."""
    header = json.dumps({"__metadata__": {"a": "x" * 900_000}}).encode()
    (folder / "model-0.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    names = [f"model-{number}.safetensors" for number in range(2, 2000)]
    index({"weight_map": {name: name for name in ["model-0.safetensors", *names]}})(folder)
    for name in names:
        (folder / name).symlink_to("model-0.safetensors")


_PLAIN = "expected the plain name of a .safetensors file"
_INDEX_CASES: Mapping[str, Case] = {
    "index_without_map": (index({}), "weight_map is missing"),
    "index_map_list": (index({"weight_map": ["model-1.safetensors"]}), "weight_map is missing"),
    "index_map_empty": (index({"weight_map": {}}), "weight_map is missing"),
    "index_map_text": (index({"weight_map": "model-1.safetensors"}), "weight_map is missing"),
    "index_list": (index([]), "holds a JSON list"),
    "index_no_json": (
        lambda folder: (shard("x")(folder), write(INDEX, "{")(folder)),
        "not valid JSON",
    ),
    "index_folder": (
        lambda folder: (remove("model.safetensors")(folder), as_folder(INDEX)(folder)),
        "no model.safetensors and no model.safetensors.index.json",
    ),
    "shard_above": (shard("../model.safetensors"), f"'../model.safetensors'; {_PLAIN}"),
    "shard_of_a_neighbour": (shard("../mistral/model.safetensors"), _PLAIN),
    "shard_far_above": (shard("../" * 40 + "etc/x.safetensors"), _PLAIN),
    "shard_absolute": (shard("/etc/x.safetensors"), f"'/etc/x.safetensors'; {_PLAIN}"),
    "shard_below": (shard("a/b.safetensors"), "'a/b.safetensors'"),
    "shard_through_itself": (shard("./model-1.safetensors"), "'./model-1.safetensors'"),
    "shard_windows": (shard("..\\b.safetensors"), _PLAIN),
    "shard_drive": (shard("C:b.safetensors"), _PLAIN),
    "shard_home": (shard("~.safetensors"), _PLAIN),
    "shard_dots": (shard(".."), _PLAIN),
    "shard_hidden": (shard("..safetensors"), _PLAIN),
    "shard_empty": (shard(""), f"''; {_PLAIN}"),
    "shard_pickle": (shard("model.bin"), _PLAIN),
    "shard_url": (shard("https://example.com/x.safetensors"), _PLAIN),
    "shard_nul": (shard("a\0.safetensors"), r"'a\x00.safetensors'"),
    "shard_newline": (shard("a.safetensors\n"), r"'a.safetensors\n'"),
    "shard_unicode": (shard("m\u043edel.safetensors"), _PLAIN),
    "shard_surrogate": (shard("\ud800.safetensors"), _PLAIN),
    "shard_long": (shard("a" * 5000 + ".safetensors"), _PLAIN),
    "shard_number": (shard(3), f"3; {_PLAIN}"),
    "shard_null": (shard(None), f"None; {_PLAIN}"),
    "shard_list": (shard(["model-1.safetensors"]), _PLAIN),
    "shard_missing": (shard("other.safetensors"), "other.safetensors: no such shard"),
    "shard_index_itself": (shard(INDEX), _PLAIN),
    "shards_by_the_thousand": (
        index({"weight_map": {str(i): f"model-{i}.safetensors" for i in range(2, 20_000)}}),
        "model-10.safetensors: no such shard",
    ),
    "shards_with_long_headers": (many_long_headers, "its header has 900027 bytes; expected 1.."),
    "shard_is_a_folder": (
        lambda folder: (shard("a.safetensors")(folder), (folder / "a.safetensors").mkdir()),
        "a.safetensors: no such shard",
    ),
    "shard_is_a_pipe": (
        lambda folder: (shard("a.safetensors")(folder), pipe("a.safetensors")(folder)),
        "a.safetensors: no such shard",
    ),
    "shard_links_to_nothing": (
        lambda folder: (shard("a.safetensors")(folder), link("a.safetensors", "gone")(folder)),
        "a.safetensors: no such shard",
    ),
    "shard_links_to_itself": (
        lambda folder: (
            shard("a.safetensors")(folder),
            link("a.safetensors", "a.safetensors")(folder),
        ),
        "a.safetensors: no such shard",
    ),
    "shard_links_to_a_device": (
        lambda folder: (shard("a.safetensors")(folder), link("a.safetensors", "/dev/zero")(folder)),
        "a.safetensors: no such shard",
    ),
    "in_two_shards": (in_two_shards, "is in model-1.safetensors too"),
    "only_pickles": (
        lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin but no model.safetensors; pickle",
    ),
    "pickle_index": (
        lambda folder: (
            (folder / "model.safetensors").rename(folder / "consolidated.00.pth"),
            write_json(folder / "pytorch_model.bin.index.json", {"weight_map": {"a": "b.bin"}}),
        ),
        "consolidated.00.pth but no model.safetensors; pickle",
    ),
    "no_weights": (remove("model.safetensors"), "no model.safetensors"),
}

# --- the other files --------------------------------------------------------------------------


def gemma(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Returns a change that makes config.json a spoilt one of Gemma 3."""

    def write_config(folder: Path) -> None:
        values = copy.deepcopy(tiny_families.CONFIGS["gemma3"])
        change(values)
        write_json(folder / "config.json", values)

    return write_config


_CONFIG = json.dumps(tiny_families.CONFIGS["llama"])
_TEMPLATE = "tokenizer_config.json"
_OTHER_CASES: Mapping[str, Case] = {
    "config_missing": (remove("config.json"), "config.json: no such file"),
    "config_folder": (as_folder("config.json"), "config.json: no such file"),
    "config_pipe": (pipe("config.json"), "config.json: no such file"),
    "config_loop": (link("config.json", "config.json"), "config.json: no such file"),
    "config_device": (link("config.json", "/dev/zero"), "config.json: no such file"),
    "config_vast": (sparse("config.json", 1 << 40), "config.json: has 1099511627776 bytes"),
    "config_empty": (write("config.json", ""), "config.json: not valid JSON"),
    "config_open": (write("config.json", "{"), "config.json: not valid JSON"),
    "config_truncated": (write("config.json", _CONFIG[:-9]), "config.json: not valid JSON"),
    "config_two": (write("config.json", _CONFIG * 2), "config.json: not valid JSON"),
    "config_deep": (write("config.json", "[" * 100_000), "config.json: not valid JSON"),
    "config_deep_objects": (write("config.json", '{"a":' * 100_000), "config.json: not valid JSON"),
    "config_nearly_too_deep": (
        write("config.json", '{"model_type":' + "[" * 900 + "]" * 900 + "}"),
        "model_type is [[[...]]]",
    ),
    "config_objects": (write("config.json", "[" + "{}," * 1_390_000 + "{}]"), "JSON list"),
    "config_list": (write("config.json", "[]"), "JSON list"),
    "config_text": (write("config.json", '"llama"'), "JSON str"),
    "config_null": (write("config.json", "null"), "JSON NoneType"),
    "config_twice": (write("config.json", '{"a": 1, "a": 2}'), "'a' occurs twice"),
    "config_twice_inside": (
        write("config.json", _CONFIG.replace('"factor"', '"factor": 1, "factor"')),
        "'factor' occurs twice",
    ),
    "config_twice_long": (
        write("config.json", f'{{"{"x" * 1_000_000}": 1, "{"x" * 1_000_000}": 2}}'),
        "xxx' occurs twice",
    ),
    "config_long_number": (write("config.json", f'{{"a": {"9" * 6000}}}'), "not valid JSON"),
    "config_not_utf8": (write("config.json", b'{"model_type": "\xff"}'), "config.json: not UTF-8"),
    "config_utf16": (write("config.json", _CONFIG.encode("utf-16")), "config.json: not UTF-8"),
    "config_bom": (write("config.json", BOM + _CONFIG), "config.json: not valid JSON"),
    "config_zeros": (write("config.json", bytes(4096)), "config.json: not valid JSON"),
    "text_config_missing": (gemma(lambda values: values.pop("text_config")), "text_config is None"),
    "text_config_list": (gemma(lambda values: values.update(text_config=[])), "text_config is []"),
    "text_config_text": (
        gemma(lambda values: values.update(text_config="x")),
        "text_config is 'x'",
    ),
    "text_config_of_another": (
        gemma(lambda values: values["text_config"].update(model_type="t5")),
        "model_type of text_config is 't5'",
    ),
    "text_config_quantised": (
        gemma(lambda values: values.update(quantization_config={"bits": 4})),
        "quantization_config is {'bits': 4}",
    ),
    "text_config_tied_text": (
        gemma(lambda values: values.update(tie_word_embeddings="no")),
        "tie_word_embeddings is 'no'",
    ),
    "generation_no_json": (write("generation_config.json", "eos"), "not valid JSON"),
    "generation_list": (write("generation_config.json", "[2]"), "JSON list"),
    "generation_deep": (write("generation_config.json", '{"a":' * 9999), "not valid JSON"),
    "eos_beyond": (write("generation_config.json", '{"eos_token_id": [2, 263]}'), "id 263"),
    "eos_negative": (write("generation_config.json", '{"eos_token_id": -1}'), "id -1"),
    "eos_text": (write("generation_config.json", '{"eos_token_id": "2"}'), "id '2'"),
    "eos_bool": (write("generation_config.json", '{"eos_token_id": true}'), "id True"),
    "eos_fraction": (write("generation_config.json", '{"eos_token_id": 2.0}'), "id 2.0"),
    "eos_object": (write("generation_config.json", '{"eos_token_id": {"a": 2}}'), "id {'a': 2}"),
    "eos_lists": (write("generation_config.json", '{"eos_token_id": [[2]]}'), "id [2]"),
    "eos_huge": (write("generation_config.json", f'{{"eos_token_id": {10**300}}}'), "id 100000"),
    "template_no_json": (write(_TEMPLATE, "{% for %}"), "tokenizer_config.json: not valid JSON"),
    "template_file_list": (write(_TEMPLATE, "[]"), "JSON list"),
    "template_number": (write(_TEMPLATE, '{"chat_template": 3}'), "chat_template is 3"),
    "template_object": (write(_TEMPLATE, '{"chat_template": {"a": 1}}'), "chat_template is {'a'"),
    "template_of_numbers": (write(_TEMPLATE, '{"chat_template": [3]}'), "chat_template is [3]"),
    "template_names": (
        write(_TEMPLATE, '{"chat_template": [{"name": [], "template": "x"}]}'),
        "chat_template is [{",
    ),
    "template_default_number": (
        write(_TEMPLATE, '{"chat_template": [{"name": "default", "template": 3}]}'),
        "chat_template is 3",
    ),
    "template_bos_number": (
        write(_TEMPLATE, '{"chat_template": "x", "bos_token": 3}'),
        "bos_token is 3",
    ),
    "template_eos_list": (
        write(_TEMPLATE, '{"chat_template": "x", "eos_token": {"content": []}}'),
        "eos_token is []",
    ),
    "template_vast": (sparse(_TEMPLATE, 1 << 40), "has 1099511627776 bytes"),
    "jinja_not_utf8": (write("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja: not UTF-8"),
    "jinja_vast": (
        lambda folder: (
            write("chat_template.jinja", "")(folder),
            sparse("chat_template.jinja", 1 << 40)(folder),
        ),
        "chat_template.jinja: has 1099511627776 bytes",
    ),
}

CASES: Mapping[str, Case] = {**_INDEX_CASES, **_OTHER_CASES}
