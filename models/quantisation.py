"""Matrices in eight bits on the device, their products in the activations' own dtype.

Weights only, one scale an output, rounded by qwix. It halves or quarters the memory that decoding
reads on an accelerator; a CPU widens the matrices again and gains nothing. Rounding changes p, and
so the target: results name it.
"""

from typing import Any

import jax
import jax.numpy as jnp

KINDS = ("int8",)
_TABLES = ("embedding", "head")  # a row a token; all other matrices are [inputs, outputs]


def quantise(path: tuple[str, ...], leaf: jax.Array, kind: str) -> Any:
    """Rounds a matrix of the parameter tree; a vector stays as it is.

    Args:
      path: the leaf's path of keys.
      leaf: the parameter.
      kind: one of ``KINDS``.

    Returns:
      ``qwix.QArray`` with int8 values and a float32 scale an output, or ``leaf``.

    Raises:
      ValueError: qwix is not installed.
    """
    if leaf.ndim != 2:
        return leaf
    try:
        import qwix  # an extra: most runs do without
    except ImportError as error:
        raise ValueError(
            f"--quantise={kind} needs qwix; install it with pip install 'ecmh_jax[quantise]'"
        ) from error
    output_axis = 0 if path[-1] in _TABLES else 1

    def round_matrix(matrix: jax.Array) -> Any:
        # The scale takes its dtype from the input: bfloat16 would round it too.
        wide = matrix.astype(jnp.float32)
        return qwix.quantize(wide, jnp.dtype(kind), channelwise_axes=(output_axis,))

    return jax.jit(round_matrix)(leaf)


def is_quantised(weights: Any) -> bool:
    """Whether a parameter is a ``qwix.QArray``."""
    return not isinstance(weights, jax.Array)


def product(inputs: jax.Array, weights: Any) -> jax.Array:
    """``inputs @ weights``, for [..., inputs] and [inputs, outputs]."""
    if not is_quantised(weights):
        return inputs @ weights
    # The scale belongs to an output: applied after the product, the matrix can stay in int8.
    wide = jnp.matmul(
        inputs, weights.qvalue.astype(inputs.dtype), preferred_element_type=jnp.float32
    )
    return (wide * jnp.expand_dims(weights.scale[0], range(inputs.ndim - 1))).astype(inputs.dtype)


def take_rows(table: Any, tokens: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of an embedding [V, D] in ``dtype``: [..., D]."""
    if not is_quantised(table):
        return table[tokens]
    return (table.qvalue[tokens] * table.scale[tokens]).astype(dtype)


def logits(table: Any, stream: jax.Array) -> jax.Array:
    """Float32 products of every row of a head [V, D] with each of [B, D]: [B, V]."""
    values = table.qvalue.astype(stream.dtype) if is_quantised(table) else table
    # Tokens first: alone, the tall product was 6-22 % faster on a CPU than its transpose.
    found = jnp.einsum("vd,bd->vb", values, stream, preferred_element_type=jnp.float32)
    return (found * table.scale if is_quantised(table) else found).T
