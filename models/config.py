"""The shape of a decoder-only transformer, read from a model's own files."""

import dataclasses
import math

import numpy as np

from models.rotary import Rotary, compute_frequencies

ACTIVATIONS = ("silu", "gelu_tanh")
MAX_HEAD_SIZE = 1 << 16  # tables of a head's width are made before any tensor is seen
MAX_LENGTH = (1 << 31) - 1  # positions are int32
MAX_WINDOW = 1 << 30  # added to a position it must still be an int32
_SMALLEST, _LARGEST = 1e-30, 1e30  # within what float32 can hold


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Static description of a decoder: sizes, and the traits in which families differ.

    Attributes:
      vocabulary_size: rows of the embedding, V.
      num_layers: transformer blocks.
      embedding_size: width of the residual stream.
      num_heads: query heads.
      num_kv_heads: key/value heads; divides ``num_heads``.
      head_size: width of one head; even.
      feed_forward_size: inner width of the gated block.
      context_length: tokens the model was trained to attend to.
      norm_epsilon: epsilon of RMSNorm.
      tied_head: whether the output head is the embedding.
      rotary: rotary positions.
      family: the row of ``models.families`` that the traits come from.
      query_key_value_bias: whether queries, keys and values have a bias.
      query_key_norm: whether each head's query and key go through an RMSNorm.
      norm_offset: added to every RMSNorm's weight.
      post_norms: whether attention and feed-forward have an RMSNorm behind them too.
      activation: of the gate; one of ``ACTIVATIONS``.
      embedding_scale: factor on the embedding of the input tokens.
      attention_scale: factor on queries times keys; None for ``head_size ** -0.5``.
      logit_softcap: c of ``c tanh(logits / c)``; None for plain logits.
      sliding_window: tokens, itself included, that a token of a sliding layer attends to.
      sliding_layers: a flag a layer; empty where no layer slides.
      sliding_rotary: rotary positions of the sliding layers; None for those of all.
    """

    vocabulary_size: int
    num_layers: int
    embedding_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    feed_forward_size: int
    context_length: int
    norm_epsilon: float = 1e-5
    tied_head: bool = False
    rotary: Rotary = dataclasses.field(default_factory=Rotary)
    family: str = "llama"
    query_key_value_bias: bool = False
    query_key_norm: bool = False
    norm_offset: float = 0.0
    post_norms: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    attention_scale: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding_layers: tuple[bool, ...] = ()
    sliding_rotary: Rotary | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "norm_offset" or isinstance(value, bool):
                continue
            if isinstance(value, (int, float)) and not _SMALLEST < value < _LARGEST:
                raise ValueError(
                    f"{field.name} is {value!r} in the model's configuration; expected > 0, and "
                    "representable in float32"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads} and num_kv_heads {self.num_kv_heads}; "
                "expected key/value heads that divide the query heads"
            )
        if self.head_size % 2 or self.head_size > MAX_HEAD_SIZE:
            raise ValueError(
                f"head_size is {self.head_size}; rotary positions need an even size, at most "
                f"{MAX_HEAD_SIZE}"
            )
        for rotary in (self.rotary, self.sliding_rotary):
            self._check_rotary(rotary)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is {self.activation!r}; expected one of {ACTIVATIONS}")
        if self.sliding_layers and len(self.sliding_layers) != self.num_layers:
            raise ValueError(
                f"{len(self.sliding_layers)} layers are said to slide or not; expected "
                f"num_layers, {self.num_layers}"
            )
        if any(self.sliding_layers) and self.sliding_window is None:
            raise ValueError("layers slide, but sliding_window is missing")
        if (self.sliding_window or 0) > MAX_WINDOW:
            raise ValueError(
                f"sliding_window is {self.sliding_window}; expected at most {MAX_WINDOW}"
            )

    def _check_rotary(self, rotary: Rotary | None) -> None:
        if rotary is None:
            return
        size = self.head_size if rotary.size is None else rotary.size
        if size % 2 or not 0 < size <= self.head_size:
            raise ValueError(
                f"{size} values of a head turn with the position; expected an even number in "
                f"2..{self.head_size}"
            )
        if not rotary.theta > 1:
            raise ValueError(f"the base of the rotary positions is {rotary.theta!r}; expected > 1")
        for name in ("divisors", "short", "long"):
            divisors = getattr(rotary.scaling, name, None)
            if divisors is not None and (
                len(divisors) != size // 2 or not all(divisor > 0 for divisor in divisors)
            ):
                raise ValueError(
                    f"{len(divisors)} {name} factors of the rotary positions; expected "
                    f"{size // 2}, all > 0"
                )
        for length in (1, MAX_LENGTH):  # some depend on the length that a run needs
            with np.errstate(all="ignore"):
                found = compute_frequencies(rotary, self.head_size, length)
            if not (np.isfinite(found.radians).all() and math.isfinite(found.scale)):
                raise ValueError(f"the rotary positions of {rotary} are not finite")

    @property
    def query_size(self) -> int:
        """Values of all query heads."""
        return self.num_heads * self.head_size

    @property
    def key_size(self) -> int:
        """Values of all key heads; of all value heads too."""
        return self.num_kv_heads * self.head_size

    @property
    def matrix_elements(self) -> int:
        """Elements of all matrices that one decoded token is multiplied with, the head's too."""
        width, inner = self.embedding_size, self.feed_forward_size
        layer = width * (2 * self.query_size + 2 * self.key_size + 3 * inner)
        return self.num_layers * layer + self.vocabulary_size * width

    @property
    def longest_length(self) -> float:
        """Positions that a run may need at most; infinite for a model that YaRN extends."""
        return self.context_length if self.rotary.yarn_beyond is None else math.inf

    def slides(self, layer: int) -> bool:
        """Whether layer ``layer`` attends to ``sliding_window`` tokens alone."""
        return bool(self.sliding_layers) and self.sliding_layers[layer]
