"""Rotary positions: by which angle each pair of a head's values turns from token to token.

All variants reduce to a vector of frequencies and one factor on cosine and sine, computed here once
on the host; the network knows no variant. What depends on a text's length is decided by the length
that a run needs and holds for the whole run: a law that changed while a text grows would not be
autoregressive, and keys written earlier would belong to another law.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np


@dataclasses.dataclass(frozen=True)
class Linear:
    """Positions divided by ``factor``."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Divided:
    """A divisor for every frequency, as GGUF stores Llama 3's."""

    divisors: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1: slow frequencies divided by ``factor``, fast ones kept, a ramp in between."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv:2309.00071): as Llama 3's with another ramp, and sharper attention.

    Attributes:
      factor: how many times ``original_length`` the texts may be.
      original_length: tokens of the texts that the model was trained on.
      beta_fast: turns within ``original_length`` from which a frequency is kept.
      beta_slow: turns below which it is divided by ``factor``.
      attention_factor: on cosine and sine; None for ``0.1 log(factor) + 1``.
      truncate: whether the ramp begins and ends at whole indices.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE (arXiv:2402.13753) as Phi uses it: a divisor for every frequency, in two sets.

    Attributes:
      short: divisors while a run needs at most ``original_length`` positions.
      long: divisors beyond it.
      original_length: tokens of the texts that the model was trained on.
      attention_factor: on cosine and sine, with both sets.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    attention_factor: float


Scaling = Linear | Divided | Llama3 | Yarn | LongRope


@dataclasses.dataclass(frozen=True)
class Rotary:
    """The rotary positions of a kind of layer.

    Attributes:
      theta: base of the frequencies.
      size: values of a head that turn, the first ones; None for all, else even.
      scaling: None for plain frequencies.
      yarn_beyond: plain up to this many positions; a run that needs more uses YaRN with
        ``factor = needed / yarn_beyond``. None where a model does not extend.
    """

    theta: float = 10_000.0
    size: int | None = None
    scaling: Scaling | None = None
    yarn_beyond: int | None = None


class Frequencies(NamedTuple):
    """What the network needs.

    Attributes:
      radians: [size / 2] float32, a position's angle per pair of values.
      scale: factor on cosine and sine.
    """

    radians: np.ndarray
    scale: float


def compute_frequencies(rotary: Rotary, head_size: int, needed_length: int) -> Frequencies:
    """Returns the frequencies for a run that needs ``needed_length`` positions.

    Args:
      rotary: the layer's settings.
      head_size: values of a head.
      needed_length: prompt and completion together, in tokens.

    Returns:
      Frequencies; pair i is value i and value ``i + size / 2``.
    """
    size = head_size if rotary.size is None else rotary.size
    plain = 1.0 / rotary.theta ** (np.arange(0, size, 2, dtype=np.float32) / np.float32(size))
    plain = plain.astype(np.float32)
    scale = 1.0
    scaling = rotary.scaling
    if rotary.yarn_beyond is not None and needed_length > rotary.yarn_beyond:
        scaling = Yarn(needed_length / rotary.yarn_beyond, rotary.yarn_beyond)
    match scaling:
        case None:
            radians = plain
        case Linear(factor):
            radians = plain / factor
        case Divided(divisors):
            radians = plain / np.asarray(divisors, np.float32)
        case Llama3():
            radians = _llama3(plain, scaling)
        case Yarn():
            radians = _yarn(plain, scaling, rotary.theta, size)
            scale = scaling.attention_factor
            if scale is None:
                scale = yarn_attention_factor(scaling.factor)
        case LongRope():
            divisors = scaling.long if needed_length > scaling.original_length else scaling.short
            radians = plain / np.asarray(divisors, np.float32)
            scale = scaling.attention_factor
    return Frequencies(radians.astype(np.float32), float(scale))


def describe(rotary: Rotary, needed_length: int) -> str:
    """Names the law that a run of ``needed_length`` positions uses, for logs and summaries."""
    if rotary.yarn_beyond is not None and needed_length > rotary.yarn_beyond:
        factor = needed_length / rotary.yarn_beyond
        return f"YaRN, factor {factor:.6g}, beyond {rotary.yarn_beyond} positions"
    match rotary.scaling:
        case None:
            return "plain"
        case Linear(factor):
            return f"linear, factor {factor:g}"
        case Divided():
            return "plain frequencies over the file's divisors"
        case Llama3(factor=factor, original_length=original):
            return f"Llama 3, factor {factor:g} from {original} positions"
        case Yarn(factor=factor, original_length=original):
            return f"YaRN, factor {factor:g} from {original} positions"
        case LongRope(original_length=original):
            which = "long" if needed_length > original else "short"
            return f"LongRoPE, {which} factors (the long ones beyond {original})"


def yarn_attention_factor(factor: float, weight: float = 1.0) -> float:
    """``0.1 weight log(factor) + 1``, or 1 where nothing is stretched (YaRN, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _llama3(plain: np.ndarray, scaling: Llama3) -> np.ndarray:
    """The rule of Llama 3.1's own release, ``apply_scaling``."""
    wavelengths = 2 * math.pi / plain
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    # 0 for a wave too long for the training length, 1 for a short one.
    kept = np.clip((scaling.original_length / wavelengths - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * plain / scaling.factor + kept * plain


def _yarn(plain: np.ndarray, scaling: Yarn, theta: float, size: int) -> np.ndarray:
    """YaRN's "NTK by parts": frequencies that turn often enough in training are kept."""

    def index_of(turns: float) -> float:
        """The (fractional) pair that turns so many times within the training length."""
        return (
            size * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
        )

    low, high = index_of(scaling.beta_fast), index_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    # A ramp of no width would divide by zero.
    width = high - low if high != low else 0.001
    divided = np.clip((np.arange(size // 2, dtype=np.float32) - low) / width, 0.0, 1.0)
    return plain / scaling.factor * divided + plain * (1 - divided)
