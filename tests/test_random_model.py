"""Published shapes with random weights."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import load, named_shapes, random_model
from models.checkpoint import leaf_shapes
from models.huggingface_config import parse_config
from tests.tiny_checkpoints import CONFIG

# Billions of parameters as the models' own pages give them.
PUBLISHED = {
    "smollm2-135m": 0.1345,
    "smollm2-360m": 0.3618,
    "smollm2-1.7b": 1.711,
    "llama-3.2-1b": 1.236,
    "llama-3.2-3b": 3.213,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.55,
    "qwen2.5-0.5b": 0.4940,
    "qwen2.5-1.5b": 1.544,
    "qwen2.5-3b": 3.086,
    "qwen2.5-7b": 7.616,
    "qwen2.5-14b": 14.77,
    "qwen2.5-32b": 32.76,
    "qwen2.5-72b": 72.71,
    "qwen2.5-math-7b": 7.616,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.721,
    "qwen3-4b": 4.022,
    "qwen3-8b": 8.191,
    "qwen3-14b": 14.77,
    "qwen3-32b": 32.76,
    "phi-3.5-mini": 3.821,
    "phi-4-mini": 3.836,
    "gemma-3-270m": 0.2681,
    "gemma-3-1b": 0.9999,
    "gemma-3-4b": 3.880,  # without its vision tower
}


@pytest.mark.parametrize("name", random_model.NAMES)
def test_a_named_shape_has_the_published_number_of_parameters(name):
    config = parse_config(named_shapes.CONFIGS[name], name)
    count = sum(math.prod(shape) for _, shape in leaf_shapes(config))
    assert count / 1e9 == pytest.approx(PUBLISHED[name], rel=1e-3)


@pytest.fixture
def tiny_name(monkeypatch):
    values = {**CONFIG, "model_type": "qwen2", "eos_token_id": [3, 4], "hidden_size": 64}
    monkeypatch.setitem(named_shapes.CONFIGS, "tiny", values)
    return "random:tiny"


def test_weights_are_as_a_fresh_model_has_them(tiny_name):
    loaded = load.load_model(tiny_name, dtype="bfloat16")
    assert loaded.eos_ids == (3, 4)
    layer = loaded.params["layer_1"]
    assert layer["gate_up"].dtype == jnp.bfloat16
    assert float(jnp.std(layer["gate_up"].astype(jnp.float32))) == pytest.approx(0.02, rel=0.05)
    np.testing.assert_array_equal(layer["attention_norm"].astype(np.float32), 1.0)
    np.testing.assert_array_equal(layer["query_key_value_bias"].astype(np.float32), 0.0)
    assert not jnp.array_equal(layer["down"], loaded.params["layer_0"]["down"])
    again = load.load_model(tiny_name, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, loaded.params, again.params)


def test_it_decodes_any_prompt(tiny_name):
    loaded = load.load_model(tiny_name, dtype="float32")
    ids = loaded.tokenizer.encode("a b\n\N{GREEK SMALL LETTER ALPHA}")
    assert loaded.tokenizer.decode(ids) == "a b\n\N{GREEK SMALL LETTER ALPHA}"
    model = loaded.language_model
    logits, _ = jax.jit(model.prefill)(
        loaded.params,
        jnp.array([ids], jnp.int32),
        jnp.array([len(ids)], jnp.int32),
        model.init_cache(1, 8),
    )
    assert np.isfinite(logits).all()
    assert float(logits.std()) > 0


def test_every_leaf_is_made_where_it_belongs(tiny_name):
    """The rule is asked for each leaf by its path and its shape on the device."""
    asked = {}
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def rule(path, shape):
        asked[path] = shape
        return device

    loaded = load.load_model(tiny_name, dtype="float32", sharding=rule)
    assert asked == dict(leaf_shapes(loaded.config))
    assert all(leaf.sharding == device for leaf in jax.tree.leaves(loaded.params))


def test_unknown_names():
    with pytest.raises(ValueError, match=r"--model=random:gpt is unknown; expected random: and"):
        load.load_model("random:gpt")
    with pytest.raises(ValueError, match=r"--revision=main is for hub ids"):
        load.load_model("random:qwen2.5-7b", revision="main")
