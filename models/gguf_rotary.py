"""Rotary positions as GGUF files give them: some keys, and divisors stored as tensors."""

import math
from collections.abc import Callable
from typing import Any

from models import gguf_header, rotary
from models.families import Family
from models.gguf_header import Header
from models.json_file import brief
from models.rotary import Rotary

_MAX_DIVISORS = 1 << 12
TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")


def read_rotary(
    header: Header, family: Family, number: Callable[..., Any], head_size: int
) -> Rotary:
    """Reads the rotary positions of the layers that do not slide.

    Args:
      header: the file's.
      family: its row.
      number: ``number(key, kind, default)`` reads one number of the file's architecture.
      head_size: values of a head.

    Raises:
      ValueError: naming the file and the key, for a scaling that is unknown or malformed.
    """
    size = number("rope.dimension_count", int, head_size)
    scaling = _read_scaling(header, number)
    return Rotary(
        theta=float(number("rope.freq_base", float, 10_000.0)),
        size=None if size == head_size else size,
        scaling=scaling,
        yarn_beyond=number("context_length")
        if family.extends_by_yarn and scaling is None
        else None,
    )


def _read_scaling(header: Header, number: Callable[..., Any]) -> rotary.Scaling | None:
    path = header.path
    context = number("context_length")
    original = number("rope.scaling.original_context_length", int, context)
    freqs, short, long = (name in header.tensors for name in TENSORS)
    if short != long or (freqs and long):
        raise ValueError(
            f"{path}: of {', '.join(TENSORS)} it holds "
            f"{', '.join(name for name in TENSORS if name in header.tensors)}; expected the first "
            "alone, the other two, or none"
        )
    if long:
        if not 2 <= original <= context:
            raise ValueError(
                f"{path}: rope.scaling.original_context_length is {original}; expected "
                f"2..{context}, the context_length"
            )
        # sqrt(1 + log(factor) / log(original)), as in models.huggingface_config
        attention = math.sqrt(1 + math.log(context / original) / math.log(original))
        return rotary.LongRope(
            short=_divisors(header, "rope_factors_short.weight"),
            long=_divisors(header, "rope_factors_long.weight"),
            original_length=original,
            attention_factor=float(number("rope.scaling.attn_factor", float, attention)),
        )
    if number("rope.scaling.attn_factor", float, 1.0) != 1.0:
        raise ValueError(
            f"{path}: rope.scaling.attn_factor is {number('rope.scaling.attn_factor', float)}, but "
            "rope_factors_long.weight is missing; expected both or none"
        )
    if freqs:  # Llama 3.1's rule, worked out by the converter
        return rotary.Divided(_divisors(header, "rope_freqs.weight"))
    architecture = header.metadata["general.architecture"]
    key = f"{architecture}.rope.scaling.type"
    kind = header.metadata.get(key)
    factor = number("rope.scaling.factor", float, 0.0)
    if kind in (None, "none"):
        if factor not in (0.0, 1.0):
            raise ValueError(f"{path}: rope.scaling.factor is {factor}, but {key} is {brief(kind)}")
        return None
    if not factor > 0:
        raise ValueError(f"{path}: rope.scaling.factor is {factor}; expected > 0")
    if kind == "linear":
        return rotary.Linear(float(factor))
    if kind == "yarn":
        if original < 1:
            raise ValueError(f"{path}: rope.scaling.original_context_length is {original}")
        fast, slow = (
            float(number(f"rope.scaling.yarn_beta_{name}", float, default))
            for name, default in (("fast", 32.0), ("slow", 1.0))
        )
        if not 0 < slow < fast:
            raise ValueError(
                f"{path}: yarn_beta_fast {fast} and slow {slow}; expected 0 < slow < fast"
            )
        return rotary.Yarn(float(factor), original, fast, slow)
    raise ValueError(f"{path}: {key} is {brief(kind)}; expected none, linear or yarn")


def _divisors(header: Header, name: str) -> tuple[float, ...]:
    info = header.tensors.get(name)
    if info is None or len(info.shape) != 1 or not 0 < info.shape[0] <= _MAX_DIVISORS:
        found = "missing" if info is None else f"of shape {info.shape}"
        raise ValueError(
            f"{header.path}: tensor {name!r} is {found}; expected a factor a frequency"
        )
    return tuple(float(divisor) for divisor in gguf_header.read_tensor(header, name))
