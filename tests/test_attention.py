"""Decode attention: every implementation against NumPy, and what stale slots may not change."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import attention, decode_attention_gpu
from models.language_model import build_language_model
from tests.test_transformer import CONFIG, TOKENS, full_logits, logits_through_cache, random_params

IMPLEMENTATIONS = attention.IMPLEMENTATIONS
NUM_SLOTS = [5, 128, 257, 1100]  # one block, a full one, a short last one, large ones
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
# The kernel takes powers of two.
KERNEL_CONFIG = dataclasses.replace(CONFIG, head_size=16, num_layers=1)

each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def as_blocks(keys, values, implementation):
    """Cuts keys and values, [B, num_kv_heads, S, head_size], into an implementation's blocks."""
    layout = attention.CACHE_LAYOUTS[implementation]
    ends = np.cumsum(layout.block_sizes(keys.shape[2]))[:-1]
    cuts = zip([0, *ends], [*ends, keys.shape[2]], strict=True)
    parts = [slice(start, stop) for start, stop in cuts]
    return (
        tuple(jnp.moveaxis(keys[:, :, part], 2, layout.key_slot_axis) for part in parts),
        tuple(values[:, :, part] for part in parts),
    )


def attend(queries, keys, values, positions, implementation, scale=None, window=None):
    """Runs one implementation on a cache [B, num_kv_heads, S, head_size]."""
    return jax.jit(attention.decode_attention, static_argnums=(4, 5, 6))(
        queries,
        *as_blocks(keys, values, implementation),
        jnp.array(positions, jnp.int32),
        implementation,
        scale,
        window,
    )


def softmax_attention(queries, keys, values, positions, scale=None, window=None):
    """The textbook in float64."""
    scale = queries.shape[-1] ** -0.5 if scale is None else scale
    window = keys.shape[2] if window is None else window
    queries, keys, values = (np.asarray(array, np.float64) for array in (queries, keys, values))
    group_size = queries.shape[1] // keys.shape[1]
    expected = np.empty_like(queries)
    for row, last in enumerate(positions):
        for head in range(queries.shape[1]):
            live = row, head // group_size, slice(max(last + 1 - window, 0), last + 1)
            scores = scale * keys[live] @ queries[row, head]
            weights = np.exp(scores - scores.max())
            expected[row, head] = weights @ values[live] / weights.sum()
    return expected


def random_arrays(num_heads, num_kv_heads, num_slots, head_size, dtype="float32", batch_size=4):
    rng = np.random.default_rng(num_slots + head_size)
    cache_shape = (batch_size, num_kv_heads, num_slots, head_size)
    shapes = (batch_size, num_heads, head_size), cache_shape, cache_shape
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@each_implementation
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(3, 3, 16), (9, 3, 64), (4, 2, 128)])
def test_attention_equals_softmax(implementation, dtype, shape):
    num_heads, num_kv_heads, head_size = shape
    arrays = random_arrays(num_heads, num_kv_heads, 300, head_size, dtype)
    positions = [0, 299, 127, 128]
    found = attend(*arrays, positions, implementation)
    assert found.dtype == dtype
    expected = softmax_attention(*arrays, positions)
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=TOLERANCES[dtype])


@each_implementation
@pytest.mark.parametrize("num_slots", NUM_SLOTS)
def test_any_number_of_slots_and_any_position(implementation, num_slots):
    assert sum(attention.CACHE_LAYOUTS[implementation].block_sizes(num_slots)) == num_slots
    arrays = random_arrays(6, 2, num_slots, 16, batch_size=3)
    last = num_slots - 1
    for positions in ([0, num_slots // 2, last], [last, 1, 0], [2, 1, 0]):
        found = attend(*arrays, positions, implementation)
        np.testing.assert_allclose(found, softmax_attention(*arrays, positions), atol=1e-5)


WITH_WINDOWS = [name for name in IMPLEMENTATIONS if name != "pallas"]


@pytest.mark.parametrize("implementation", WITH_WINDOWS)
@pytest.mark.parametrize("window", [1, 5, 128, 130, 299, 300])
def test_a_window_leaves_the_last_slots(implementation, window):
    arrays = random_arrays(6, 2, 300, 16, batch_size=3)
    # In the last case every row's window begins after the first block, which is then skipped.
    for positions in ([0, 150, 299], [127, 128, 129], [257, 299, 280]):
        found = attend(*arrays, positions, implementation, 0.3, window)
        expected = softmax_attention(*arrays, positions, 0.3, window)
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("implementation", WITH_WINDOWS)
def test_what_lies_before_a_window_changes_no_bit(implementation):
    queries, keys, values = random_arrays(6, 2, 300, 16, batch_size=3)
    positions = np.array([20, 180, 299])
    before = np.arange(300)[None] <= positions[:, None] - 7
    stale_values = jnp.where(before[:, None, :, None], 3e38, values)
    stale_keys = jnp.where(before[:, None, :, None], 3e38, keys)
    expected = attend(queries, keys, values, positions, implementation, None, 7)
    found = attend(queries, stale_keys, stale_values, positions, implementation, None, 7)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("implementation", WITH_WINDOWS)
def test_a_row_with_a_window_does_not_depend_on_its_neighbours(implementation):
    arrays = random_arrays(6, 2, 300, 16, batch_size=3)
    for position in (0, 127, 200, 299):
        alone = attend(*arrays, [position, 0, 0], implementation, None, 9)[0]
        for others in ([64, 3], [299, 298], [position, 256]):
            beside = attend(*arrays, [position, *others], implementation, None, 9)[0]
            np.testing.assert_array_equal(beside, alone)


def test_more_query_heads_than_a_tile_has_rows():
    arrays = random_arrays(34, 2, 40, 16)
    positions = [0, 39, 15, 16]
    found = attend(*arrays, positions, "pallas")
    np.testing.assert_allclose(found, softmax_attention(*arrays, positions), atol=1e-5)


def with_stale_slots(array, positions, value):
    """Fills what lies beyond each row's position."""
    dead = np.arange(array.shape[2])[None] > np.array(positions)[:, None]
    return jnp.where(dead[:, None, :, None], value, array)


@each_implementation
def test_finite_values_and_any_key_beyond_a_row_change_no_bit(implementation):
    queries, keys, values = random_arrays(6, 2, 300, 16)
    positions = [0, 128, 200, 299]
    expected = attend(queries, keys, values, positions, implementation)
    stale_values = with_stale_slots(values, positions, 3e38)
    for stale_key in (3e38, np.inf, np.nan):
        stale_keys = with_stale_slots(keys, positions, stale_key)
        found = attend(queries, stale_keys, stale_values, positions, implementation)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("stale", [np.nan, np.inf])
def test_the_kernel_never_sees_a_slot_beyond_a_row(stale):
    queries, keys, values = random_arrays(6, 2, 300, 16)
    positions = [0, 128, 200, 299]
    expected = attend(queries, keys, values, positions, "pallas")
    keys, values = (with_stale_slots(array, positions, stale) for array in (keys, values))
    np.testing.assert_array_equal(attend(queries, keys, values, positions, "pallas"), expected)


@each_implementation
def test_a_live_nan_is_not_hidden(implementation):
    queries, keys, values = random_arrays(6, 2, 300, 16)
    keys = keys.at[1, 0, 200, 3].set(np.nan)
    found = np.asarray(attend(queries, keys, values, [299, 299, 299, 299], implementation))
    assert np.isnan(found[1, :3]).all()
    assert np.isfinite(found[[0, 2, 3]]).all()


@each_implementation
def test_a_row_of_attention_does_not_depend_on_its_neighbours(implementation):
    arrays = random_arrays(6, 2, 300, 16, batch_size=3)
    for position in (0, 127, 128, 255, 256, 299):
        alone = attend(*arrays, [position, 0, 0], implementation)[0]
        for others in ([64, 3], [299, 127], [20, 256]):
            beside = attend(*arrays, [position, *others], implementation)[0]
            np.testing.assert_array_equal(alone, beside)


def test_a_row_of_a_model_does_not_depend_on_its_neighbours():
    num_slots = 300
    params, model = random_params(CONFIG), build_language_model(CONFIG, jnp.float32)
    rng = np.random.default_rng(1)
    cache = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype),
        model.init_cache(3, num_slots),
    )
    decode = jax.jit(model.decode)

    def first_row(positions, tokens):
        logits, new_cache = decode(
            params, jnp.array(tokens, jnp.int32), jnp.array(positions, jnp.int32), cache
        )
        return [logits[0], *(leaf[0] for leaf in jax.tree.leaves(new_cache))]

    for position in (0, 127, 128, 200, 299):
        alone = first_row([position, 0, 0], [4, 4, 4])
        for others in ([64, 3], [299, 127], [20, 256]):
            beside = first_row([position, *others], [4, 9, 2])
            for left, right in zip(alone, beside, strict=True):
                np.testing.assert_array_equal(left, right)


def test_decoding_after_a_prompt_equals_one_prefill():
    params = random_params(KERNEL_CONFIG)
    expected = full_logits(build_language_model(KERNEL_CONFIG, jnp.float32), params, TOKENS)
    for implementation in IMPLEMENTATIONS:
        model = build_language_model(KERNEL_CONFIG, jnp.float32, implementation)
        found = logits_through_cache(model, params, TOKENS, [6, 2, 3])
        live = np.isfinite(found)
        assert np.abs(found - expected)[live].max() <= 1e-4


def test_a_model_decodes_the_same_logits_and_cache_anywhere():
    params, num_slots = random_params(KERNEL_CONFIG), 300
    keys_and_values = random_arrays(1, KERNEL_CONFIG.num_kv_heads, num_slots, 16)[1:]
    tokens, positions = jnp.array([1, 2, 3, 4], jnp.int32), jnp.array([0, 127, 128, 299], jnp.int32)

    def decode(implementation):
        model = build_language_model(KERNEL_CONFIG, jnp.float32, implementation)
        empty = model.init_cache(4, num_slots)
        keys, values = as_blocks(*keys_and_values, implementation)
        cache = (empty[0]._replace(keys=keys, values=values),)
        assert jax.tree.map(jnp.shape, cache) == jax.tree.map(jnp.shape, empty)
        logits, (layer,) = jax.jit(model.decode)(params, tokens, positions, cache)
        axis = attention.CACHE_LAYOUTS[implementation].key_slot_axis
        keys = [jnp.moveaxis(block, axis, 2) for block in layer.keys]
        return logits, jnp.concatenate(keys, axis=2), jnp.concatenate(layer.values, axis=2)

    expected = decode("blocks")
    for implementation in ("pallas", "xla"):
        for found, wanted in zip(decode(implementation), expected, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-4)


@each_implementation
def test_decoding_reads_no_slot_after_its_own(implementation):
    params = random_params(KERNEL_CONFIG)
    model = build_language_model(KERNEL_CONFIG, jnp.float32, implementation)
    prompt, lengths = jnp.asarray(TOKENS[:, :5], jnp.int32), jnp.array([2, 5, 3], jnp.int32)
    full = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e4), model.init_cache(3, 140))
    prefill, decode = jax.jit(model.prefill), jax.jit(model.decode)
    _, clean = prefill(params, prompt, lengths, model.init_cache(3, 140))
    _, stale = prefill(params, prompt, lengths, full)
    arguments = params, jnp.array([1, 2, 3], jnp.int32), lengths - 1
    np.testing.assert_array_equal(decode(*arguments, clean)[0], decode(*arguments, stale)[0])


def device(platform):
    return types.SimpleNamespace(platform=platform)


CPU, GPU, TPU = device("cpu"), device("gpu"), device("tpu")


@pytest.mark.parametrize(
    ("devices", "dtype", "expected"),
    [
        ([CPU], jnp.float32, "blocks"),
        ([CPU, CPU], jnp.float32, "blocks"),
        ([GPU], jnp.bfloat16, "xla"),
        ([TPU], jnp.bfloat16, "xla"),
    ],
)
def test_the_implementation_fits_the_device(devices, dtype, expected):
    assert attention.implementation(devices, dtype, KERNEL_CONFIG) == expected


def test_an_implementation_can_be_asked_for():
    for name in IMPLEMENTATIONS:
        assert attention.implementation([CPU], jnp.float32, KERNEL_CONFIG, name) == name
    with pytest.raises(ValueError, match="'flash'; expected one of blocks, pallas, xla"):
        attention.implementation([CPU], jnp.float32, KERNEL_CONFIG, "flash")
    with pytest.raises(ValueError, match="does not take 6 values a head in float32"):
        build_language_model(CONFIG, jnp.float32, "pallas")
    sliding = dataclasses.replace(KERNEL_CONFIG, sliding_window=3, sliding_layers=(True,))
    for config in (sliding, dataclasses.replace(KERNEL_CONFIG, attention_scale=0.3)):
        with pytest.raises(ValueError, match="sliding layers or a scale of its own"):
            build_language_model(config, jnp.float32, "pallas")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_kernel_lowers_for_a_gpu(dtype):
    arrays = random_arrays(6, 2, 300, 64, dtype)
    traced = jax.jit(decode_attention_gpu.decode_attention).trace(*arrays, jnp.zeros(4, jnp.int32))
    assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_the_kernel_refuses_what_its_indices_cannot_count():
    cache = jax.ShapeDtypeStruct((2048, 8, 1024, 128), jnp.bfloat16)
    queries = jax.ShapeDtypeStruct((2048, 8, 128), jnp.bfloat16)
    positions = jax.ShapeDtypeStruct((2048,), jnp.int32)
    with pytest.raises(ValueError, match="too many"):
        jax.eval_shape(decode_attention_gpu.decode_attention, queries, cache, cache, positions)
