"""Attention of one new token a row over a static KV cache, and how that cache lies in memory.

One function, ``decode_attention``, in three implementations over two layouts of the cache:

* ``blocks`` for CPUs: blocks of slots, and those that no row has reached are skipped.
* ``xla`` for accelerators: as ``blocks`` with one block; reads every slot.
* ``pallas`` for one NVIDIA GPU, where asked for: a kernel that reads each row's live slots alone.

Each promises the same of slots past a row's position, which may hold what an older text left there:
finite values have no effect at all. The kernel promises it of NaN and infinity too; the others
promise it of keys only, since a weight of 0 times infinity is NaN.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.config import TransformerConfig

_BLOCK_SLOTS = 128


class CacheLayout(NamedTuple):
    """How one layer's keys and values lie in memory: blocks of slots, each an array of its own.

    Attributes:
      key_slot_axis: axis of the slots in a block of keys: 3 for [B, num_kv_heads, head_size, S],
        2 for [B, num_kv_heads, S, head_size]. A block of values is always the latter.
      most_blocks: 1 for a cache in one piece.
    """

    key_slot_axis: int
    most_blocks: int

    def block_sizes(self, num_slots: int) -> tuple[int, ...]:
        """Slots of each block. The batch has no say: rows move between caches of any batch."""
        size = max(_BLOCK_SLOTS, -(-num_slots // self.most_blocks))
        return tuple(min(size, num_slots - start) for start in range(0, num_slots, size))


CACHE_LAYOUTS = {
    # Blocks, because slicing one array would copy what is read; more would only lengthen programs.
    "blocks": CacheLayout(key_slot_axis=3, most_blocks=8),
    "pallas": CacheLayout(key_slot_axis=2, most_blocks=1),
    # Skipping a block is a branch, which an accelerator may have to wait for the host to take.
    "xla": CacheLayout(key_slot_axis=3, most_blocks=1),
}
IMPLEMENTATIONS = tuple(CACHE_LAYOUTS)


def implementation(
    devices: Sequence[Any],
    dtype: jnp.dtype,
    config: TransformerConfig,
    requested: str | None = None,
) -> str:
    """Returns which of ``IMPLEMENTATIONS`` decodes on these devices.

    Args:
      devices: the JAX devices that a program may run on.
      dtype: dtype of the cache.
      config: the network.
      requested: an implementation to use instead, for tests and measurements.

    Raises:
      ValueError: naming a request that is unknown or cannot be met.
    """
    if requested not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"decode attention is {requested!r}; expected one of {', '.join(IMPLEMENTATIONS)}"
        )
    if requested == "pallas" and not _kernel_supports(dtype, config):
        raise ValueError(
            f"decode attention 'pallas' does not take {config.head_size} values a head in "
            f"{jnp.dtype(dtype)}, sliding layers or a scale of its own; leave the choice to the "
            "program"
        )
    if requested is not None:
        return requested
    # The kernel has not run on a GPU yet: until it is timed there it has to be asked for.
    return "blocks" if devices[0].platform == "cpu" else "xla"


def _kernel_supports(dtype: jnp.dtype, config: TransformerConfig) -> bool:
    from models import decode_attention_gpu  # Pallas is experimental: let a CPU do without it

    plain = config.attention_scale is None and not any(config.sliding_layers)
    return plain and decode_attention_gpu.supports(dtype, config.head_size)


def decode_attention(
    queries: jax.Array,
    key_blocks: tuple[jax.Array, ...],
    value_blocks: tuple[jax.Array, ...],
    positions: jax.Array,
    implementation: str,
    scale: float | None = None,
    window: int | None = None,
) -> jax.Array:
    """Softmax attention over slots ``0..positions`` of each row, or the last ``window`` of them.

    Args:
      queries: [B, num_heads, head_size].
      key_blocks: in the layout ``CACHE_LAYOUTS[implementation]``.
      value_blocks: each [B, num_kv_heads, block slots, head_size].
      positions: [B] int32, each row's last live slot.
      implementation: one of ``IMPLEMENTATIONS``.
      scale: factor on the products of queries and keys; None for ``head_size ** -0.5``.
      window: slots attended to, the last one included; None for all.

    Returns:
      [B, num_heads, head_size] in the dtype of ``queries``.
    """
    if implementation != "pallas":
        return _attend_blocks(queries, key_blocks, value_blocks, positions, scale, window)
    from models import decode_attention_gpu

    (keys,), (values,) = key_blocks, value_blocks
    return decode_attention_gpu.decode_attention(
        queries, keys, values, positions, interpret=jax.default_backend() == "cpu"
    )


def _attend_blocks(
    queries: jax.Array,
    key_blocks: tuple[jax.Array, ...],
    value_blocks: tuple[jax.Array, ...],
    positions: jax.Array,
    scale: float | None,
    window: int | None,
) -> jax.Array:
    """Reads no block beyond the last that a row has reached, nor before all rows' windows.

    Blocks are read one after the other with a running softmax, up to the block of the largest
    position in the batch. A block that is masked for a row leaves that row's running maximum, sum
    and output bit for bit as they were, so a row's result does not depend on how far its neighbours
    have come.

    Keys are [B, num_kv_heads, head_size, block slots]; the rest is as in ``decode_attention``.
    """
    batch_size, num_heads, head_size = queries.shape
    num_kv_heads = key_blocks[0].shape[1]
    grouped = queries.reshape(batch_size, num_kv_heads, num_heads // num_kv_heads, head_size)
    grouped = grouped * jnp.asarray(head_size**-0.5 if scale is None else scale, queries.dtype)
    last_position = jnp.max(positions)
    # A window as long as the cache masks nothing.
    num_slots = sum(keys.shape[-1] for keys in key_blocks)
    window = None if window is None or window >= num_slots else window

    def attend_block(running, keys, values, start):
        maximum, total, output = running
        slots = start + jnp.arange(keys.shape[-1])
        live = slots[None] <= positions[:, None]
        if window is not None:
            live &= slots[None] > positions[:, None] - window
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
        needed = last_position >= start
        if window is not None:
            needed &= start + keys.shape[-1] > jnp.min(positions) - window + 1
        if start == 0 and window is None:
            running = attend_block(running, keys, values, start)
        else:
            running = jax.lax.cond(
                needed,
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
