"""The network: against transformers, against itself through the cache, and its masks."""

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import load
from models.config import TransformerConfig
from models.language_model import build_language_model
from tests import tiny_checkpoints

VOCABULARY = ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j", "k")  # V = 11
TOKENS = np.array([[3, 1, 4, 0, 5, 9, 2], [6, 10, 7, 8, 1, 2, 0], [2, 7, 1, 8, 9, 4, 5]])  # [3, 7]
SHAPES = {
    # name: (width, query heads, key/value heads, head size, tied head)
    "grouped": (24, 6, 2, 4, False),
    "one_kv_head": (20, 5, 1, 6, False),
    "not_grouped_tied": (24, 3, 3, 8, True),
}
CONFIG = TransformerConfig(
    vocabulary_size=11,
    num_layers=2,
    embedding_size=12,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    feed_forward_size=20,
    context_length=512,
)


def random_params(config: TransformerConfig, seed: int = 0) -> dict[str, Any]:
    """A random tree of weights, large enough for attention to be sharp."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) * 0.4 + (len(shape) == 1), jnp.float32)

    width, inner = config.embedding_size, config.feed_forward_size
    query_rows = config.num_heads * config.head_size
    key_rows = config.num_kv_heads * config.head_size
    params: dict[str, Any] = {
        "embedding": normal(config.vocabulary_size, width),
        "final_norm": normal(width),
    }
    if not config.tied_head:
        params["head"] = normal(config.vocabulary_size, width)
    for layer in range(config.num_layers):
        params[f"layer_{layer}"] = {
            "attention_norm": normal(width),
            "query_key_value": normal(width, query_rows + 2 * key_rows),
            "attention_output": normal(query_rows, width),
            "feed_forward_norm": normal(width),
            "gate_up": normal(width, 2 * inner),
            "down": normal(inner, width),
        }
    return params


def logits_through_cache(model, params, tokens: np.ndarray, first: list[int]) -> np.ndarray:
    """Prefills ragged prompts, decodes the rest, each row at its own position: [B, T, V].

    Positions before a row's prompt ends stay NaN.
    """
    batch_size, length = tokens.shape
    logits = np.full((batch_size, length, 11), np.nan, np.float32)
    rows = np.arange(batch_size)
    positions = np.array(first) - 1
    # Past a prompt's end lie tokens that are not the text's: nothing may read them.
    prompt = np.where(np.arange(length)[None] < np.array(first)[:, None], tokens, 10)
    decode = jax.jit(model.decode)
    out, cache = jax.jit(model.prefill)(
        params,
        jnp.asarray(prompt, jnp.int32),
        jnp.array(first, jnp.int32),
        model.init_cache(batch_size, length),
    )
    assert out.dtype == jnp.float32
    logits[rows, positions] = out
    while positions.min() < length - 1:
        # A row that is done decodes its last token again, which must change nothing.
        positions = np.minimum(positions + 1, length - 1)
        out, cache = decode(
            params,
            jnp.asarray(tokens[rows, positions], jnp.int32),
            jnp.asarray(positions, jnp.int32),
            cache,
        )
        logits[rows, positions] = out
    return logits


def full_logits(model, params, tokens: np.ndarray) -> np.ndarray:
    """One prefill for every length: no cached key is read."""
    batch_size, length = tokens.shape
    prefill = jax.jit(model.prefill)
    columns = [
        prefill(
            params,
            jnp.asarray(tokens, jnp.int32),
            jnp.full(batch_size, n, jnp.int32),
            model.init_cache(batch_size, length),
        )[0]
        for n in range(1, length + 1)
    ]
    return np.stack(columns, axis=1)


@pytest.fixture(scope="module")
def loaded_and_expected(tmp_path_factory):
    """Per shape: the model as our reader loads it, and the logits of transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    found = {}
    for name, (width, heads, kv_heads, head_size, tied) in SHAPES.items():
        folder = tmp_path_factory.mktemp(name)
        torch.manual_seed(len(name))
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=11,
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=heads,
                num_key_value_heads=kv_heads,
                head_dim=head_size,
                intermediate_size=22,
                max_position_embeddings=64,
                rope_parameters={"rope_type": "default", "rope_theta": 500.0},
                rms_norm_eps=1e-3,
                tie_word_embeddings=tied,
                initializer_range=0.5,
            )
        ).eval()
        theirs.save_pretrained(folder)
        tiny_checkpoints.make_tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
        with torch.no_grad():
            expected = theirs(torch.tensor(TOKENS)).logits.numpy()
        found[name] = load.load_model(folder, dtype="float32"), expected
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_match_transformers(loaded_and_expected, shape):
    loaded, expected = loaded_and_expected[shape]
    assert loaded.config.tied_head == SHAPES[shape][-1]
    model, params = loaded.language_model, loaded.params
    full = full_logits(model, params, TOKENS)
    cached = logits_through_cache(model, params, TOKENS, first=[1, 3, 5])
    live = np.isfinite(cached)
    assert live.any(axis=-1).sum() == 7 + 5 + 3
    assert np.abs(expected).max() > 1  # a comparison of zeros would prove nothing
    difference_full = np.abs(full - expected).max()
    difference_cached = np.abs(cached - expected)[live].max()
    print(f"{shape}: prefill {difference_full:.1e}, cached decode {difference_cached:.1e}")
    assert difference_full <= 1e-3
    assert difference_cached <= 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_cached_decode_equals_full_forward(tied):
    config = dataclasses.replace(CONFIG, tied_head=tied)
    params, model = random_params(config), build_language_model(config, jnp.float32)
    full = full_logits(model, params, TOKENS)
    for first in ([1, 1, 1], [1, 4, 2], [6, 2, 7]):
        cached = logits_through_cache(model, params, TOKENS, first)
        live = np.isfinite(cached)
        assert np.abs(cached - full)[live].max() <= 1e-4


def test_no_gradient_flows_to_later_tokens():
    params, model = random_params(CONFIG), build_language_model(CONFIG, jnp.float32)
    tokens = jnp.asarray(
        TOKENS[:1], jnp.int32
    )  # distinct, so that a row of the table is a position
    assert len(set(TOKENS[0])) == TOKENS.shape[1]

    @jax.jit
    def embedding_gradient(length):
        def score(embedding):
            logits, _ = model.prefill(
                {**params, "embedding": embedding}, tokens, length[None], model.init_cache(1, 7)
            )
            return jnp.sum(jnp.sin(logits))

        return jax.grad(score)(params["embedding"])[tokens[0]]

    for length in range(1, 8):
        gradient = np.abs(embedding_gradient(jnp.int32(length))).max(axis=1)
        assert (gradient[:length] > 0).all()
        assert (gradient[length:] == 0).all()


def test_decoding_a_token_again_changes_nothing():
    params, model = random_params(CONFIG), build_language_model(CONFIG, jnp.float32)
    prompt, lengths = jnp.asarray(TOKENS[:, :5], jnp.int32), jnp.array([2, 5, 3], jnp.int32)
    _, cache = jax.jit(model.prefill)(params, prompt, lengths, model.init_cache(3, 9))
    arguments = params, jnp.array([1, 2, 3], jnp.int32), lengths
    decode = jax.jit(model.decode)
    logits, once = decode(*arguments, cache)
    again, twice = decode(*arguments, once)
    np.testing.assert_array_equal(logits, again)
    jax.tree.map(np.testing.assert_array_equal, once, twice)


def test_bfloat16_keeps_float32_logits():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_params(CONFIG))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    narrow_model = build_language_model(CONFIG, jnp.bfloat16)
    for leaf in jax.tree.leaves(narrow_model.init_cache(2, 7)):
        assert leaf.dtype == jnp.bfloat16
    found = logits_through_cache(narrow_model, params, TOKENS, [1, 3, 2])
    expected = logits_through_cache(
        build_language_model(CONFIG, jnp.float32), wide, TOKENS, [1, 3, 2]
    )
    live = np.isfinite(expected)
    assert np.abs(found - expected)[live].max() < 0.1 * np.abs(expected[live]).max()


SHARDED = """
    import jax, numpy as np
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec
    from models.language_model import build_language_model
    from tests.test_transformer import CONFIG, TOKENS, random_params

    assert jax.device_count() == 2
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("chains",))
    by_chain = NamedSharding(mesh, PartitionSpec("chains"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    model, params = build_language_model(CONFIG, jnp.float32), random_params(CONFIG)
    tokens = jnp.asarray(np.concatenate([TOKENS, TOKENS[:1]])[:, :6], jnp.int32)

    def run(params, tokens, lengths, cache):
        logits, cache = model.prefill(params, tokens, lengths, cache)
        return logits, model.decode(params, tokens[:, -1], lengths, cache)[0]

    arguments = tokens, jnp.array([6, 2, 5, 1], jnp.int32), model.init_cache(4, 70)
    expected = jax.jit(run)(params, *arguments)
    found = jax.jit(run)(jax.device_put(params, everywhere), *jax.device_put(arguments, by_chain))
    for left, right in zip(expected, found):
        assert right.sharding.is_equivalent_to(by_chain, right.ndim), right.sharding
        difference = np.abs(np.asarray(left) - np.asarray(right)).max()
        assert difference <= 1e-5, difference
"""


def test_chains_on_two_devices_equal_chains_on_one():
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    finished = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)],
        cwd=Path(__file__).parent.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
