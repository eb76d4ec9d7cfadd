"""The shape of a decoder-only transformer, read from a model's own files."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Static description of a Llama-family decoder.

    Attributes:
      vocabulary_size: rows of the embedding, V.
      num_layers: transformer blocks.
      embedding_size: width of the residual stream.
      num_heads: query heads.
      num_kv_heads: key/value heads; divides ``num_heads``.
      head_size: width of one head; even.
      feed_forward_size: inner width of the SwiGLU block.
      context_length: tokens the model was trained to attend to.
      rope_theta: base of the rotary position frequencies.
      norm_epsilon: epsilon of RMSNorm.
      tied_head: whether the output head is the embedding.
    """

    vocabulary_size: int
    num_layers: int
    embedding_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    feed_forward_size: int
    context_length: int
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    tied_head: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool) and not value > 0:
                raise ValueError(
                    f"{field.name} is {value!r} in the model's configuration; expected > 0"
                )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads is {self.num_heads} and num_kv_heads {self.num_kv_heads}; "
                "expected key/value heads that divide the query heads"
            )
        if self.head_size % 2:
            raise ValueError(f"head_size is {self.head_size}; rotary positions need an even size")
