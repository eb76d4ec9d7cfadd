"""A decoder-only transformer in Flax with an explicit static KV cache.

The only file that knows which Flax API the network is written in. The projections of a layer are
``[inputs, outputs]``, and those that read the same input are one matrix: one large product instead
of three small ones, which matters most when the batch is small and decoding waits for weights.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models import attention, rotary
from models.config import TransformerConfig
from models.quantisation import logits, product, take_rows


class LayerCache(NamedTuple):
    """Keys and values of one layer, in one of ``attention.CACHE_LAYOUTS``.

    Attributes:
      keys: each [B, num_kv_heads, head_size, block slots] or, for ``pallas``, like the values.
      values: each [B, num_kv_heads, block slots, head_size].
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]


def init_cache(
    config: TransformerConfig,
    batch_size: int,
    num_slots: int,
    dtype: jnp.dtype,
    decode_attention: str,
) -> tuple[LayerCache, ...]:
    """Returns an empty cache, one ``LayerCache`` a layer (a scanned axis would copy it)."""
    layout = attention.CACHE_LAYOUTS[decode_attention]
    value_shapes = [
        (batch_size, config.num_kv_heads, size, config.head_size)
        for size in layout.block_sizes(num_slots)
    ]
    key_shapes = [
        (*shape[:2], *(shape[2:] if layout.key_slot_axis == 2 else shape[:1:-1]))
        for shape in value_shapes
    ]
    return tuple(
        LayerCache(
            keys=tuple(jnp.zeros(shape, dtype) for shape in key_shapes),
            values=tuple(jnp.zeros(shape, dtype) for shape in value_shapes),
        )
        for _ in range(config.num_layers)
    )


def _rms_norm(inputs: jax.Array, scale: jax.Array, config: TransformerConfig) -> jax.Array:
    """Root-mean-square normalisation over the last axis, computed in float32."""
    wide = inputs.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    wide *= jax.lax.rsqrt(mean_square + config.norm_epsilon)
    scale = scale.astype(jnp.float32) + config.norm_offset
    return (wide * jnp.expand_dims(scale, range(inputs.ndim - 1))).astype(inputs.dtype)


class RotaryAngles(NamedTuple):
    """Cosine and sine of every position's rotation: [B, S, 1, rotary size / 2] float32."""

    cosine: jax.Array
    sine: jax.Array


def _rotary_angles(frequencies: rotary.Frequencies, positions: jax.Array) -> RotaryAngles:
    angles = positions[..., None, None].astype(jnp.float32) * frequencies.radians[None, None, None]
    return RotaryAngles(jnp.cos(angles) * frequencies.scale, jnp.sin(angles) * frequencies.scale)


def _rotate(heads: jax.Array, angles: RotaryAngles) -> jax.Array:
    """Rotates ``heads`` [B, S, heads, head_size] by position, first half against second half.

    The halves are those of the values that turn at all; the rest of a head stays.
    """
    cosine, sine = angles
    half = cosine.shape[-1]
    wide = heads.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    rotated = jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine, rest], -1
    )
    return rotated.astype(heads.dtype)


_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu_tanh": lambda gate: jax.nn.gelu(gate, approximate=True),
}


class Block(nn.Module):
    """Attention and a gated block, each after an RMSNorm and added to the residual stream."""

    config: TransformerConfig
    decode_attention: str
    window: int | None  # tokens attended to; None for all

    @nn.compact
    def __call__(
        self,
        stream: jax.Array,  # [B, S, embedding_size]
        positions: jax.Array,  # [B, S] int32
        angles: RotaryAngles,
        cache: LayerCache,
    ) -> tuple[jax.Array, LayerCache]:
        config = self.config
        batch_size, num_tokens, width = stream.shape

        def weight(name: str, *shape: int) -> jax.Array:
            return self.param(name, nn.initializers.zeros, shape)

        def norm(inputs: jax.Array, name: str) -> jax.Array:
            return _rms_norm(inputs, weight(name, inputs.shape[-1]), config)

        normed = norm(stream, "attention_norm")
        outputs = config.query_size + 2 * config.key_size
        heads = product(normed, weight("query_key_value", width, outputs))
        if config.query_key_value_bias:
            heads += weight("query_key_value_bias", outputs)[None, None]
        queries, keys, values = jnp.split(
            heads.reshape(batch_size, num_tokens, -1, config.head_size),
            [config.num_heads, config.num_heads + config.num_kv_heads],
            axis=2,
        )
        if config.query_key_norm:
            queries, keys = norm(queries, "query_norm"), norm(keys, "key_norm")
        queries, keys = _rotate(queries, angles), _rotate(keys, angles)
        key_slot_axis = attention.CACHE_LAYOUTS[self.decode_attention].key_slot_axis
        if num_tokens == 1:
            cache = _write_token(cache, keys[:, 0], values[:, 0], positions[:, 0], key_slot_axis)
            attended = attention.decode_attention(
                queries[:, 0],
                cache.keys,
                cache.values,
                positions[:, 0],
                self.decode_attention,
                config.attention_scale,
                self.window,
            )[:, None]
        else:
            cache = _write_prompt(cache, keys, values, key_slot_axis)
            attended = jax.nn.dot_product_attention(
                queries,
                keys,
                values,
                is_causal=True,
                scale=config.attention_scale,
                local_window_size=None if self.window is None else (self.window - 1, 0),
            )
        attended = attended.reshape(batch_size, num_tokens, config.query_size)
        update = product(attended, weight("attention_output", config.query_size, width))
        stream += norm(update, "post_attention_norm") if config.post_norms else update

        normed = norm(stream, "feed_forward_norm")
        gate_up = product(normed, weight("gate_up", width, 2 * config.feed_forward_size))
        gate, up = jnp.split(gate_up, 2, axis=-1)
        activated = _ACTIVATIONS[config.activation](gate) * up
        update = product(activated, weight("down", config.feed_forward_size, width))
        stream += norm(update, "post_feed_forward_norm") if config.post_norms else update
        return stream, cache


def _write_token(
    cache: LayerCache,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    key_slot_axis: int,
) -> LayerCache:
    """Writes one token a row, [B, num_kv_heads, head_size], into slot ``positions``."""
    rows = jnp.arange(len(positions))
    between = (slice(None),) * (key_slot_axis - 1)
    new_keys, new_values, start = [], [], 0
    for block_keys, block_values in zip(cache.keys, cache.values, strict=True):
        size = block_values.shape[2]
        # A row whose slot lies in another block writes past the end of this one: it is dropped.
        inside = (positions >= start) & (positions < start + size)
        slots = jnp.where(inside, positions - start, size)
        new_keys.append(block_keys.at[rows, *between, slots].set(keys, mode="drop"))
        new_values.append(block_values.at[rows, :, slots].set(values, mode="drop"))
        start += size
    return LayerCache(tuple(new_keys), tuple(new_values))


def _write_prompt(
    cache: LayerCache, keys: jax.Array, values: jax.Array, key_slot_axis: int
) -> LayerCache:
    """Writes whole prompts, [B, P, num_kv_heads, head_size], into slots 0..P-1."""
    keys, values = jnp.moveaxis(keys, 1, key_slot_axis), jnp.moveaxis(values, 1, 2)
    before = (slice(None),) * key_slot_axis
    new_keys, new_values, start = [], [], 0
    for block_keys, block_values in zip(cache.keys, cache.values, strict=True):
        part = slice(start, start + block_values.shape[2])
        prompt_keys, prompt_values = keys[*before, part], values[:, :, part]
        length = prompt_values.shape[2]
        new_keys.append(block_keys.at[*before, :length].set(prompt_keys))
        new_values.append(block_values.at[:, :, :length].set(prompt_values))
        start = part.stop
    return LayerCache(tuple(new_keys), tuple(new_values))


class Transformer(nn.Module):
    """Tokens in, logits out, through an explicit cache.

    With S = 1 tokens a row it decodes at any position; with S > 1 the row's positions must be
    0..S-1 (a prompt), because then a token attends to the tokens of the call alone.
    """

    config: TransformerConfig
    decode_attention: str  # one of attention.IMPLEMENTATIONS
    needed_length: int  # positions that a run needs at most

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,  # [B, S] int32
        positions: jax.Array,  # [B, S] int32
        lengths: jax.Array | None,  # [B] int32, in 1..S
        cache: tuple[LayerCache, ...],
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Returns float32 logits [B, V] after each row's token ``lengths - 1``, and the cache.

        Without ``lengths`` they are [B, S, V], after every token.
        """
        config = self.config
        zeros = nn.initializers.zeros
        table_shape = (config.vocabulary_size, config.embedding_size)
        embedding = self.param("embedding", zeros, table_shape)
        head = embedding if config.tied_head else self.param("head", zeros, table_shape)
        final_norm = self.param("final_norm", zeros, (config.embedding_size,))

        stream = take_rows(embedding, tokens, final_norm.dtype)
        if config.embedding_scale != 1.0:
            # Rounded as the weights are: the model was trained with the rounded factor.
            stream *= jnp.asarray(config.embedding_scale, stream.dtype)
        kinds = {False: config.rotary, True: config.sliding_rotary or config.rotary}
        angles = {
            slides: _rotary_angles(
                rotary.compute_frequencies(kind, config.head_size, self.needed_length), positions
            )
            for slides, kind in kinds.items()
        }
        new_cache = []
        for index, layer_cache in enumerate(cache):
            slides = config.slides(index)
            window = config.sliding_window if slides else None
            block = Block(config, self.decode_attention, window, name=f"layer_{index}")
            stream, layer_cache = block(stream, positions, angles[slides], layer_cache)
            new_cache.append(layer_cache)
        if lengths is None:
            wanted = stream.reshape(-1, config.embedding_size)
        else:
            wanted = jnp.take_along_axis(stream, (lengths - 1)[:, None, None], axis=1)[:, 0]
        found = logits(head, _rms_norm(wanted, final_norm, config))
        if config.logit_softcap is not None:
            found = config.logit_softcap * jnp.tanh(found / config.logit_softcap)
        if lengths is None:
            found = found.reshape(*tokens.shape, -1)
        return found, tuple(new_cache)
