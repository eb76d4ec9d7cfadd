"""Model folders that are broken, hostile or not supported: one clear error each."""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from models import huggingface_reader, load
from tests import tiny_checkpoints
from tests.tiny_checkpoints import CONFIG, write_huggingface, write_json

FAR = 1 << 40


def set_config(**changes):
    return lambda folder: write_json(folder / "config.json", {**CONFIG, **changes})


def drop_config(name):
    kept = {key: value for key, value in CONFIG.items() if key != name}
    return lambda folder: write_json(folder / "config.json", kept)


def write(name, text):
    return lambda folder: (folder / name).write_text(text, "utf-8")


def set_weights(**changes):
    def change(folder):
        weights = {**tiny_checkpoints.random_weights(CONFIG), **changes}
        kept = {name: values for name, values in weights.items() if values is not None}
        safetensors.numpy.save_file(kept, folder / "model.safetensors")

    return change


def rewrite_safetensors(edit):
    def change(folder):
        path = folder / "model.safetensors"
        path.write_bytes(edit(path.read_bytes()))

    return change


def repeat_a_name(data):
    (length,) = struct.unpack_from("<Q", data)
    header = data[8 : 8 + length].decode().rstrip()
    values = json.loads(header)
    again = json.dumps({"model.norm.weight": values["model.norm.weight"]})[1:-1]
    header = f"{header[:-1]},{again}}}".encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def shard_named(name):
    def change(folder):
        (folder / "model.safetensors").unlink()
        write_json(
            folder / "model.safetensors.index.json",
            {"weight_map": {"model.norm.weight": name}},
        )

    return change


def in_two_shards(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    extra = {"model.norm.weight": np.ones(32, np.float32)}
    safetensors.numpy.save_file(extra, folder / "model-2.safetensors")
    names = ["model-1.safetensors", "model-2.safetensors"]
    write_json(
        folder / "model.safetensors.index.json",
        {"weight_map": dict(zip(("a", "b"), names, strict=True))},
    )


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD_FOLDERS = {
    # name: (what is done to a good folder, the file or setting that the message names)
    "no_config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config_is_no_json": (write("config.json", "{"), "config.json: not valid JSON"),
    "config_is_deep": (write("config.json", "[" * 100_000), "config.json: not valid JSON"),
    "config_is_a_list": (write("config.json", "[]"), "JSON list"),
    "config_twice": (write("config.json", '{"a": 1, "a": 2}'), "'a' occurs twice"),
    "config_long_number": (write("config.json", f'{{"a": {"9" * 6000}}}'), "config.json"),
    "model_type": (set_config(model_type="mamba"), "model_type is 'mamba'; supported are llama"),
    "no_model_type": (drop_config("model_type"), "model_type is None"),
    "no_hidden_size": (drop_config("hidden_size"), "hidden_size is missing"),
    "no_layers": (drop_config("num_hidden_layers"), "num_hidden_layers is missing"),
    "text_size": (set_config(hidden_size="32"), "hidden_size is '32'"),
    "bool_size": (set_config(hidden_size=True), "hidden_size is True"),
    "negative_size": (set_config(intermediate_size=-1), "feed_forward_size is -1"),
    "zero_heads": (set_config(num_attention_heads=0, head_dim=None), "num_attention_heads"),
    "fraction": (set_config(num_hidden_layers=2.0), "num_hidden_layers is 2.0"),
    "infinite_epsilon": (set_config(rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
    "odd_head": (set_config(head_dim=7), "head_size is 7"),
    "heads_do_not_divide": (set_config(num_key_value_heads=3), "num_kv_heads 3"),
    "absurd_layers": (set_config(num_hidden_layers=FAR), f"{FAR} layers"),
    "absurd_width": (set_config(hidden_size=FAR), "has shape"),
    "absurd_vocabulary": (set_config(vocab_size=FAR), "model.embed_tokens.weight"),
    "rope_scaling": (
        set_config(rope_scaling={"rope_type": "llama3", "factor": 8.0}),
        "rope_scaling is {'rope_type': 'llama3'",
    ),
    "old_rope_scaling": (
        set_config(rope_scaling={"type": "linear", "factor": 2.0}),
        "only 'default' is supported",
    ),
    "new_rope_scaling": (
        set_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
        "rope_parameters",
    ),
    "rope_scaling_text": (set_config(rope_scaling="yarn"), "rope_scaling is 'yarn'"),
    "attention_bias": (set_config(attention_bias=True), "attention_bias is True"),
    "mlp_bias": (set_config(mlp_bias=True), "mlp_bias is True"),
    "activation": (set_config(hidden_act="gelu"), "hidden_act is 'gelu'"),
    "quantised": (set_config(quantization_config={"bits": 4}), "quantization_config"),
    "mistral_window": (set_config(model_type="mistral"), "sliding_window is 4096"),
    "eos_beyond": (write("generation_config.json", '{"eos_token_id": [2, 268]}'), "id 268"),
    "eos_text": (write("generation_config.json", '{"eos_token_id": "2"}'), "id '2'"),
    "no_tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer_is_no_json": (write("tokenizer.json", "{}"), "tokenizer.json: not a tokenizer"),
    "tokenizer_too_large": (set_config(vocab_size=200), "ids up to 262"),
    "template_is_a_number": (write("tokenizer_config.json", '{"chat_template": 3}'), "is 3"),
    "only_pickles": (only_pickles, "pytorch_model.bin but no model.safetensors; pickle"),
    "no_weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "missing_tensor": (
        set_weights(**{"model.norm.weight": None}),
        "'model.norm.weight' is missing",
    ),
    "no_head": (set_weights(**{"lm_head.weight": None}), "'lm_head.weight' is missing"),
    "wrong_shape": (
        set_weights(**{"model.norm.weight": np.ones(31, np.float32)}),
        "shape (31,); expected (32,)",
    ),
    "a_bias": (
        set_weights(**{"model.layers.0.self_attn.q_proj.bias": np.ones(32, np.float32)}),
        "q_proj.bias",
    ),
    "stored_as_float64": (
        set_weights(**{"model.norm.weight": np.ones(32, np.float64)}),
        "stored as F64",
    ),
    "truncated": (rewrite_safetensors(lambda data: data[:-1]), "model.safetensors"),
    "header_cut": (rewrite_safetensors(lambda data: data[:30]), "model.safetensors"),
    "empty_weights": (rewrite_safetensors(lambda data: b""), "model.safetensors"),
    "header_length": (
        rewrite_safetensors(lambda data: struct.pack("<Q", FAR) + data[8:]),
        "model.safetensors",
    ),
    "header_text": (
        rewrite_safetensors(lambda data: data[:8] + b"x" + data[9:]),
        "model.safetensors",
    ),
    "name_twice": (rewrite_safetensors(repeat_a_name), "'model.norm.weight' occurs twice"),
    "shard_above": (shard_named("../model.safetensors"), "'../model.safetensors'"),
    "shard_absolute": (shard_named("/etc/x.safetensors"), "'/etc/x.safetensors'"),
    "shard_below": (shard_named("a/b.safetensors"), "'a/b.safetensors'"),
    "shard_windows": (shard_named("..\\b.safetensors"), "plain name"),
    "shard_drive": (shard_named("C:b.safetensors"), "plain name"),
    "shard_dots": (shard_named(".."), "plain name"),
    "shard_pickle": (shard_named("model.bin"), "plain name of a .safetensors"),
    "shard_number": (shard_named(3), "plain name"),
    "shard_missing": (shard_named("other.safetensors"), "other.safetensors: no such shard"),
    "in_two_shards": (in_two_shards, "is in model-1.safetensors too"),
    "index_without_map": (
        lambda folder: (
            (folder / "model.safetensors").unlink(),
            write_json(folder / "model.safetensors.index.json", {"weight_map": []}),
        ),
        "weight_map",
    ),
}


def forbidden(*_arguments):
    raise AssertionError("a weight was read before the checks")


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folder(tmp_path, monkeypatch, name):
    change, message = BAD_FOLDERS[name]
    folder = write_huggingface(tmp_path / "model")
    change(folder)
    monkeypatch.setattr(huggingface_reader.checkpoint, "read_parameters", forbidden)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load.load_model(folder)
    assert message in str(caught.value)
    assert str(folder) in str(caught.value)
