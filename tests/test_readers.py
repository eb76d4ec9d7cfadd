"""The readers: the same tiny model in every format is the same model."""

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import gguf_header, gguf_reader, huggingface_config, load
from tests import tiny_checkpoints
from tests.tiny_checkpoints import CONFIG, write_gguf, write_huggingface, write_json

TOKENS = np.array([[5, 100, 42, 7, 261], [9, 9, 1, 200, 263], [17, 3, 2, 0, 50]])


def logits_of(loaded: load.LoadedModel) -> np.ndarray:
    model = loaded.language_model
    logits, _ = jax.jit(model.prefill)(
        loaded.params,
        jnp.asarray(TOKENS, jnp.int32),
        jnp.array([5, 2, 4], jnp.int32),
        model.init_cache(3, 6),
    )
    return np.asarray(logits)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_huggingface(tmp_path_factory.mktemp("tiny"))


def test_tree_and_metadata_of_a_folder(folder):
    loaded = load.load_model(folder)
    weights = tiny_checkpoints.random_weights(CONFIG)
    layer = "model.layers.1"
    np.testing.assert_array_equal(
        loaded.params["layer_1"]["query_key_value"],
        np.concatenate(
            [weights[f"{layer}.self_attn.{part}_proj.weight"] for part in ("q", "k", "v")]
        ).T,
    )
    np.testing.assert_array_equal(
        loaded.params["layer_1"]["gate_up"],
        np.concatenate([weights[f"{layer}.mlp.{part}_proj.weight"] for part in ("gate", "up")]).T,
    )
    np.testing.assert_array_equal(loaded.params["head"], weights["lm_head.weight"])
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded.params))
    assert loaded.eos_ids == (2, 0)
    assert loaded.config.rotary.theta == 5000.0
    assert loaded.chat_template is not None
    assert loaded.chat_template.bos_token == "<|start|>"
    assert loaded.source == str(folder.resolve())


def test_shards_hold_the_same_model(folder, tmp_path):
    whole = load.load_model(folder)
    sharded = load.load_model(write_huggingface(tmp_path / "sharded", num_shards=3))
    jax.tree.map(np.testing.assert_array_equal, whole.params, sharded.params)


def test_gguf_holds_the_same_model(folder, tmp_path):
    expected = load.load_model(folder)
    found = load.load_model(write_gguf(tmp_path / "tiny.gguf"))
    jax.tree.map(np.testing.assert_array_equal, expected.params, found.params)
    assert found.config.norm_epsilon == np.float32(CONFIG["rms_norm_eps"])
    assert found.eos_ids == (2,)
    assert found.chat_template is not None
    assert found.chat_template.eos_token == "<|end|>"
    # The file keeps epsilon in float32, hence not to the last bit.
    np.testing.assert_allclose(logits_of(found), logits_of(expected), atol=1e-5)


def test_quantised_gguf_is_close(folder, tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.Q8_0)
    expected, found = load.load_model(folder), load.load_model(path)
    # Q8_0 rounds to 1/127 of the largest weight in each group of 32.
    jax.tree.map(
        lambda left, right: np.testing.assert_allclose(
            left, right, atol=float(np.abs(left).max()) / 250
        ),
        expected.params,
        found.params,
    )
    difference = np.abs(logits_of(found) - logits_of(expected)).max()
    assert 0 < difference < 0.05 * np.abs(logits_of(expected)).max()


def test_gguf_header_agrees_with_the_gguf_package(tmp_path):
    path = write_gguf(
        tmp_path / "tiny.gguf", kind=gguf.GGMLQuantizationType.Q8_0, extra={"general.note": "ü"}
    )
    theirs, ours = gguf.GGUFReader(path), gguf_header.read_header(path)
    fields = {key: field for key, field in theirs.fields.items() if not key.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for key, field in fields.items():
        expected = field.contents()
        assert ours.metadata[key] == expected, key
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.offset == tensor.data_offset
        assert info.num_bytes == tensor.n_bytes
        assert info.shape == tuple(tensor.shape.tolist()[::-1])
        np.testing.assert_array_equal(
            gguf_header.read_tensor(ours, tensor.name),
            gguf.quants.dequantize(tensor.data, tensor.tensor_type),
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stored_and_wanted_dtypes(folder, tmp_path, dtype):
    """Weights stored in half precision load, and float32 weights are rounded when asked."""
    narrow = {
        name: values.astype(jnp.dtype(dtype))
        for name, values in tiny_checkpoints.random_weights(CONFIG).items()
    }
    stored = load.load_model(write_huggingface(tmp_path, weights=narrow), dtype="float32")
    rounded = load.load_model(folder, dtype=dtype)
    for left, right in zip(
        jax.tree.leaves(stored.params), jax.tree.leaves(rounded.params), strict=True
    ):
        assert left.dtype == jnp.float32
        assert right.dtype == jnp.dtype(dtype) == rounded.dtype
        np.testing.assert_array_equal(left, right.astype(jnp.float32))


def test_tied_head_is_not_read_twice(tmp_path):
    config = {**CONFIG, "tie_word_embeddings": True}
    weights = tiny_checkpoints.random_weights(CONFIG)  # with the copy that some files keep
    loaded = load.load_model(write_huggingface(tmp_path / "hf", config, weights))
    assert loaded.config.tied_head
    assert "head" not in loaded.params
    path = write_gguf(tmp_path / "tied.gguf", leave_out=("output.weight",))
    assert gguf_reader.read_config(gguf_header.read_header(path)).tied_head


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({}, 5000.0),
        ({"rope_theta": None}, 10_000.0),
        ({"rope_scaling": None, "rope_theta": 700}, 700),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 9.0}}, 9.0),
        ({"model_type": "mistral", "sliding_window": None}, 5000.0),
    ],
)
def test_config_variants(tmp_path, changes, theta):
    config = {**CONFIG, **changes}
    write_json(tmp_path / "config.json", {key: v for key, v in config.items() if v is not None})
    if "sliding_window" in changes:
        write_json(tmp_path / "config.json", config)
    assert huggingface_config.read_config(tmp_path).rotary.theta == theta


def test_config_defaults_are_those_of_transformers(tmp_path):
    needed = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    write_json(
        tmp_path / "config.json",
        {**{key: CONFIG[key] for key in needed}, "num_attention_heads": 4},
    )
    config = huggingface_config.read_config(tmp_path)
    assert (config.num_kv_heads, config.head_size) == (4, 8)
    assert (config.norm_epsilon, config.context_length) == (1e-6, 2048)
    assert not config.tied_head


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 1}, (7,)),
        ({"eos_token_id": [7, 3, 7]}, {}, (7, 3)),
        ({}, {"eos_token_id": 1}, (1,)),
        (None, {"eos_token_id": [1, 4]}, (1, 4)),
        (None, {"eos_token_id": None}, ()),
    ],
)
def test_eos_ids(folder, tmp_path, generation, config, expected):
    copy_folder(folder, tmp_path)
    write_json(tmp_path / "config.json", {**CONFIG, **config})
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    if not config:
        write_json(tmp_path / "config.json", {**CONFIG, "eos_token_id": 5})
    assert load.load_model(tmp_path).eos_ids == expected


def test_chat_template_of_its_own_file_comes_first(folder, tmp_path):
    copy_folder(folder, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}other", "utf-8")
    template = load.load_model(tmp_path).chat_template
    assert template is not None
    assert (template.text, template.bos_token) == ("{{ bos_token }}other", "<|start|>")
    (tmp_path / "chat_template.jinja").unlink()
    write_json(
        tmp_path / "tokenizer_config.json",
        {
            "chat_template": [
                {"name": "tool_use", "template": "t"},
                {"name": "default", "template": "d"},
            ]
        },
    )
    template = load.load_model(tmp_path).chat_template
    assert template is not None
    assert template.text == "d"
    (tmp_path / "tokenizer_config.json").unlink()
    assert load.load_model(tmp_path).chat_template is None


def test_old_rotary_buffers_are_ignored(folder, tmp_path):
    copy_folder(folder, tmp_path)
    weights = tiny_checkpoints.random_weights(CONFIG)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    safetensors.numpy.save_file(weights, tmp_path / "model.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal,
        load.load_model(tmp_path).params,
        load.load_model(folder).params,
    )


def copy_folder(source: Path, target: Path) -> None:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    assert json.loads((target / "config.json").read_text())["model_type"] == "llama"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sliding_window", 8),
        ("query_pre_attn_scalar", 4),
        ("partial_rotary_factor", 0.5),
        ("hidden_activation", "gelu_pytorch_tanh"),
        ("final_logit_softcapping", 3.0),
        ("rope_local_base_freq", 100.0),
        ("layer_types", ["sliding_attention", "full_attention"]),
    ],
)
def test_a_key_of_another_family_is_refused(tmp_path, key, value):
    """A Llama of transformers ignores them all: to follow them would be another model."""
    write_json(tmp_path / "config.json", {**CONFIG, key: value})
    with pytest.raises(ValueError, match=f"{key} is .*, which is not supported"):
        huggingface_config.read_config(tmp_path)


def test_ends_of_turns_end_a_text_from_gguf(tmp_path):
    """The file names token 0 alone; that token 2 ends a turn is known by its text."""
    path = write_gguf(tmp_path / "tiny.gguf", extra={"tokenizer.ggml.eos_token_id": 0})
    header = gguf_header.read_header(path)
    assert gguf_reader.read_eos_ids(header, gguf_reader.read_config(header)) == (0, 2)


def test_a_window_as_long_as_the_context_is_none(tmp_path):
    values = {**CONFIG, "model_type": "mistral", "sliding_window": 128}
    write_json(tmp_path / "config.json", values)
    config = huggingface_config.read_config(tmp_path)
    assert (config.sliding_window, config.sliding_layers) == (None, ())
    write_json(tmp_path / "config.json", {**values, "sliding_window": 127})
    assert huggingface_config.read_config(tmp_path).sliding_window == 127
