"""Attention of one new token a row over a static KV cache, kept in blocks of slots."""

import jax
import jax.numpy as jnp

_BLOCK_SLOTS = 128
_MOST_BLOCKS = 8  # more would only make programs longer
_LEAST_BATCH = 16  # below it a cache is small; a choice, not a measured optimum


def block_sizes(batch_size: int, num_slots: int) -> tuple[int, ...]:
    """Splits a cache's slots into blocks, each an array of its own.

    A CPU skips the blocks that no row has reached yet. Slicing one array instead would copy what
    it reads. For a small batch there is little to skip, and on an accelerator a branch may have to
    wait for the host (not measured yet): there, one block holds all.
    """
    if batch_size < _LEAST_BATCH or jax.default_backend() != "cpu":
        return (num_slots,)
    size = max(_BLOCK_SLOTS, -(-num_slots // _MOST_BLOCKS))
    return tuple(min(size, num_slots - start) for start in range(0, num_slots, size))


def decode_attention(
    queries: jax.Array,
    key_blocks: tuple[jax.Array, ...],
    value_blocks: tuple[jax.Array, ...],
    positions: jax.Array,
) -> jax.Array:
    """Softmax attention over slots ``0..positions`` of each row, reading no block beyond the last.

    Blocks are read one after the other with a running softmax, up to the block of the largest
    position in the batch. A block that is masked for a row leaves that row's running maximum, sum
    and output bit for bit as they were, so a row's result does not depend on how far its neighbours
    have come.

    Args:
      queries: [B, num_heads, head_size].
      key_blocks: each [B, num_kv_heads, head_size, block slots].
      value_blocks: each [B, num_kv_heads, block slots, head_size].
      positions: [B] int32, each row's last live slot.

    Returns:
      [B, num_heads, head_size] in the dtype of ``queries``.
    """
    batch_size, num_heads, head_size = queries.shape
    num_kv_heads = key_blocks[0].shape[1]
    grouped = queries.reshape(batch_size, num_kv_heads, num_heads // num_kv_heads, head_size)
    grouped = grouped * jnp.asarray(head_size**-0.5, queries.dtype)
    last_position = jnp.max(positions)

    def attend_block(running, keys, values, start):
        maximum, total, output = running
        slots = start + jnp.arange(keys.shape[-1])
        live = slots[None] <= positions[:, None]
        scores = jnp.einsum("bkgd,bkds->bkgs", grouped, keys, preferred_element_type=jnp.float32)
        scores = jnp.where(live[:, None, None], scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        shrink = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[..., None])
        block_output = jnp.einsum(
            "bkgs,bksd->bkgd",
            weights.astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return (
            new_maximum,
            total * shrink + weights.sum(axis=-1),
            output * shrink[..., None] + block_output,
        )

    statistics = grouped.shape[:-1]
    running = (
        # Finite, so that a row's first block never subtracts infinity from infinity.
        jnp.full(statistics, jnp.finfo(jnp.float32).min),
        jnp.zeros(statistics, jnp.float32),
        jnp.zeros(grouped.shape, jnp.float32),
    )
    start = 0
    for keys, values in zip(key_blocks, value_blocks, strict=True):
        if start == 0:
            running = attend_block(running, keys, values, start)
        else:
            running = jax.lax.cond(
                last_position >= start,
                lambda running, keys, values, start=start: attend_block(
                    running, keys, values, start
                ),
                lambda running, keys, values: running,
                running,
                keys,
                values,
            )
        start += keys.shape[-1]
    _, total, output = running
    attended = output / total[..., None]
    return attended.reshape(batch_size, num_heads, head_size).astype(queries.dtype)
