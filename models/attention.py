"""Attention of one new token a row over a static KV cache."""

import jax
import jax.numpy as jnp

BLOCK_SLOTS = 64  # slots read at a time; the window grows in these units


def decode_attention(
    queries: jax.Array, keys: jax.Array, values: jax.Array, positions: jax.Array
) -> jax.Array:
    """Softmax attention over slots ``0..positions`` of each row, reading no block beyond the last.

    The cache is read in blocks of ``BLOCK_SLOTS`` with a running softmax, up to the block of the
    largest position in the batch. A block that is masked for a row leaves that row's running
    maximum, sum and output bit for bit as they were, so a row's result does not depend on how far
    its neighbours have come.

    Args:
      queries: [B, num_heads, head_size].
      keys: [B, num_kv_heads, head_size, num_slots].
      values: [B, num_kv_heads, num_slots, head_size].
      positions: [B] int32, each row's last live slot.

    Returns:
      [B, num_heads, head_size] in the dtype of ``queries``.
    """
    batch_size, num_heads, head_size = queries.shape
    num_kv_heads, num_slots = values.shape[1:3]
    block_slots = min(BLOCK_SLOTS, num_slots)
    grouped = queries.reshape(batch_size, num_kv_heads, num_heads // num_kv_heads, head_size)
    grouped = grouped * jnp.asarray(head_size**-0.5, queries.dtype)
    num_blocks = jnp.max(positions) // block_slots + 1

    def attend_block(carry):
        block, maximum, total, output = carry
        # The last block of a cache that blocks do not divide starts earlier and overlaps the one
        # before it; the mask drops the slots that were already read.
        start = jnp.minimum(block * block_slots, num_slots - block_slots)
        block_keys = jax.lax.dynamic_slice_in_dim(keys, start, block_slots, axis=3)
        block_values = jax.lax.dynamic_slice_in_dim(values, start, block_slots, axis=2)
        slots = start + jnp.arange(block_slots)
        live = (slots[None] <= positions[:, None]) & (slots >= block * block_slots)[None]
        scores = jnp.einsum(
            "bkgd,bkds->bkgs", grouped, block_keys, preferred_element_type=jnp.float32
        )
        scores = jnp.where(live[:, None, None], scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=-1))
        shrink = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[..., None])
        block_output = jnp.einsum(
            "bkgs,bksd->bkgd",
            weights.astype(values.dtype),
            block_values,
            preferred_element_type=jnp.float32,
        )
        return (
            block + 1,
            new_maximum,
            total * shrink + weights.sum(axis=-1),
            output * shrink[..., None] + block_output,
        )

    statistics = grouped.shape[:-1]
    _, _, total, output = jax.lax.while_loop(
        lambda carry: carry[0] < num_blocks,
        attend_block,
        (
            jnp.zeros((), jnp.int32),
            # Finite, so that a row's first block never subtracts infinity from infinity.
            jnp.full(statistics, jnp.finfo(jnp.float32).min),
            jnp.zeros(statistics, jnp.float32),
            jnp.zeros(grouped.shape, jnp.float32),
        ),
    )
    attended = output / total[..., None]
    return attended.reshape(batch_size, num_heads, head_size).astype(queries.dtype)
