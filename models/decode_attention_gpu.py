"""Decode attention for GPUs: a Pallas kernel that reads each row's live slots and no others.

JAX's own ``pallas.ops.gpu.decode_attention`` is close, and stops at each row's length too. But it
wants a slot count that divides evenly into its splits, masks after loading, so that a NaN beyond a
row's end spoils the row, and rounds each split's sums to the dtype of the queries. This one takes
any number of slots, loads no dead one, and adds up in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# One program reads SPLIT_SLOTS slots. A constant, so that a row's sums depend neither on the batch
# nor on the size of the cache. No number here has been tuned on hardware yet.
SPLIT_SLOTS = 256
_MOST_TILE_SLOTS = 64
_MOST_TILE_BYTES = 16 * 1024  # keys and values, each buffered twice, fit any GPU's shared memory
_LEAST_TILE = 16  # the fewest rows of a matrix product on tensor cores
_HEAD_SIZES = (16, 32, 64, 128, 256)  # powers of two, as every Triton tile


def supports(dtype: jnp.dtype, head_size: int) -> bool:
    """Whether the kernel takes heads of this dtype and size."""
    return head_size in _HEAD_SIZES and dtype in (jnp.float32, jnp.bfloat16, jnp.float16)


def _attend_split(
    queries_ref,  # [query rows, head_size], padded to a tile
    keys_ref,  # [SPLIT_SLOTS, head_size]
    values_ref,  # [SPLIT_SLOTS, head_size]
    position_ref,  # [], the row's last live slot
    maximum_ref,  # [query rows]
    total_ref,  # [query rows]
    output_ref,  # [query rows, head_size]
    *,
    group_size: int,
):
    """Softmax statistics and weighted values of one row, key/value head and split of the slots."""
    query_rows, head_size = queries_ref.shape
    in_group = jnp.arange(query_rows) < group_size
    slot_bytes = head_size * keys_ref.dtype.itemsize
    tile_slots = max(_LEAST_TILE, min(_MOST_TILE_SLOTS, _MOST_TILE_BYTES // slot_bytes))
    queries = triton.load(queries_ref, mask=in_group[:, None], other=0.0)
    # Float32 would otherwise be rounded to TensorFloat-32.
    dot = functools.partial(
        jnp.dot, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
    num_live = position_ref[()] + 1 - pl.program_id(2) * SPLIT_SLOTS

    def attend_tile(tile, running):
        maximum, total, output = running
        slots = tile * tile_slots + jnp.arange(tile_slots)
        live = slots < num_live
        window = (pl.ds(tile * tile_slots, tile_slots), slice(None))
        # Dead slots are not loaded: whatever they hold, NaN included, has no say.
        keys = triton.load(keys_ref.at[window], mask=live[:, None], other=0.0)
        values = triton.load(values_ref.at[window], mask=live[:, None], other=0.0)
        scores = dot(queries, keys.T) * head_size**-0.5
        scores = jnp.where(live[None], scores, -jnp.inf)
        new_maximum = jnp.maximum(maximum, scores.max(axis=1))
        shrink = jnp.exp(maximum - new_maximum)
        weights = jnp.exp(scores - new_maximum[:, None])
        return (
            new_maximum,
            total * shrink + weights.sum(axis=1),
            output * shrink[:, None] + dot(weights.astype(values.dtype), values),
        )

    num_tiles = jnp.clip(pl.cdiv(num_live, tile_slots), 0, SPLIT_SLOTS // tile_slots)
    running = (
        # Finite, so that a first tile never subtracts infinity from infinity.
        jnp.full((query_rows,), jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros((query_rows,), jnp.float32),
        jnp.zeros((query_rows, head_size), jnp.float32),
    )
    maximum, total, output = jax.lax.fori_loop(0, num_tiles, attend_tile, running)
    triton.store(maximum_ref, maximum, mask=in_group)
    triton.store(total_ref, total, mask=in_group)
    triton.store(output_ref, output, mask=in_group[:, None])


def decode_attention(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    positions: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention over slots ``0..positions`` of each row.

    The slots are split among programs, and the splits' running softmaxes are merged afterwards. A
    program whose split lies past the row's position reads nothing and adds nothing.

    Args:
      queries: [B, num_heads, head_size].
      keys: [B, num_kv_heads, S, head_size].
      values: [B, num_kv_heads, S, head_size].
      positions: [B] int32, each row's last live slot.
      interpret: run the kernel as ordinary JAX, on any platform: slow, for tests.

    Returns:
      [B, num_heads, head_size] in the dtype of ``queries``.

    Raises:
      ValueError: for a cache whose elements 32 bits cannot count.
    """
    batch_size, num_heads, head_size = queries.shape
    _, num_kv_heads, num_slots, _ = keys.shape
    group_size = num_heads // num_kv_heads
    query_rows = max(_LEAST_TILE, pl.next_power_of_2(group_size))
    if keys.size >= 2**31:  # Triton's indices would wrap around
        raise ValueError(
            f"{keys.size} cached keys a layer are too many for the 'pallas' decode attention; "
            "use fewer chains or 'xla'"
        )
    num_splits = pl.cdiv(num_slots, SPLIT_SLOTS)
    # Splits last: the programs that find nothing to do start after those that do.
    grid = (batch_size, num_kv_heads, num_splits)
    cache_block = pl.BlockSpec(
        (None, None, SPLIT_SLOTS, head_size), lambda row, head, split: (row, head, split, 0)
    )
    statistic_block = pl.BlockSpec(
        (None, None, None, query_rows), lambda row, head, split: (row, head, split, 0)
    )
    statistic = jax.ShapeDtypeStruct((*grid, group_size), jnp.float32)
    maximum, total, output = pl.pallas_call(
        functools.partial(_attend_split, group_size=group_size),
        grid=grid,
        in_specs=[
            pl.BlockSpec(
                (None, None, query_rows, head_size), lambda row, head, split: (row, head, 0, 0)
            ),
            cache_block,
            cache_block,
            pl.BlockSpec((None,), lambda row, head, split: (row,)),
        ],
        out_specs=[
            statistic_block,
            statistic_block,
            pl.BlockSpec(
                (None, None, None, query_rows, head_size),
                lambda row, head, split: (row, head, split, 0, 0),
            ),
        ],
        out_shape=[
            statistic,
            statistic,
            jax.ShapeDtypeStruct((*grid, group_size, head_size), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="decode_attention",
    )(
        queries.reshape(batch_size, num_kv_heads, group_size, head_size),
        keys,
        values,
        jnp.minimum(positions, num_slots - 1),  # beyond lies other memory
    )
    shrink = jnp.exp(maximum - maximum.max(axis=2, keepdims=True))
    merged = (output * shrink[..., None]).sum(axis=2) / (total * shrink).sum(axis=2)[..., None]
    return merged.reshape(queries.shape).astype(queries.dtype)
