"""Text to token ids and back, by the ``tokenizers`` library."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from models.json_file import brief, check_size

_MAX_BYTES = 1 << 26  # Gemma's, the largest, has 33 MB
_MAX_GROWTH = 64  # of a text in its normalizer; the models' own at most double it


class SpecialSpan(NamedTuple):
    """A special token found in a text: characters ``start`` to ``end`` became ``token_id``."""

    start: int
    end: int
    token_id: int


class Tokenizer(NamedTuple):
    """A tokenizer that never lets a text become a special token unless it is asked to.

    Attributes:
      plain: reads special tokens in a text as ordinary characters.
      special: reads them as the tokens that they name. A second one, because the switch between
        the two is a state of the library's object.
      bos_ids: ids that the model expects before a prompt; usually empty.
    """

    plain: tokenizers.Tokenizer
    special: tokenizers.Tokenizer
    bos_ids: tuple[int, ...]

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest id it can return, special tokens included."""
        return max(self.plain.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of every special token."""
        added = self.plain.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Encodes text in which special tokens are ordinary characters: a user's text."""
        return self.plain.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Encodes a user's text as the beginning of a sequence: ``bos_ids``, then the text."""
        return [*self.bos_ids, *self.encode(text)]

    def encode_with_special(self, text: str) -> list[int]:
        """Encodes text in which special tokens are tokens: never a user's text."""
        return self.special.encode(text, add_special_tokens=False).ids

    def special_spans(self, text: str) -> list[SpecialSpan]:
        """Where ``encode_with_special`` sees special tokens, in the text's order."""
        encoding = self.special.encode(text, add_special_tokens=False)
        special_ids = set(self.special_tokens.values())
        return [
            SpecialSpan(*offsets, token_id)
            for token_id, offsets in zip(encoding.ids, encoding.offsets, strict=True)
            if token_id in special_ids
        ]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Decodes ids; bytes that are not UTF-8 become U+FFFD."""
        # NumPy and JAX integers are not accepted by the library.
        return self.plain.decode(
            [int(index) for index in ids], skip_special_tokens=skip_special_tokens
        )


def read_tokenizer(path: Path, vocabulary_size: int) -> Tokenizer:
    """Reads a ``tokenizer.json``.

    Args:
      path: the file.
      vocabulary_size: V, rows of the model's embedding.

    Returns:
      The tokenizer; ``bos_ids`` are those that the file's own post-processor puts before a text.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: naming the file, when it cannot be read or has ids beyond the embedding.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file; expected the model's fast tokenizer (SentencePiece models "
            "can be converted with transformers' AutoTokenizer and save_pretrained)"
        )
    check_size(path, _MAX_BYTES)
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text("utf-8"))
        _check_growth(backend, path)
        backend.no_truncation()
        backend.no_padding()
        sample = backend.encode("a", add_special_tokens=True)
        # The mask marks what the post-processor added; what comes before the text is the prefix.
        num_before = (list(sample.special_tokens_mask) + [0]).index(0)
        tokenizer = build_tokenizer(backend, tuple(sample.ids[:num_before]), vocabulary_size, path)
    except BaseException as error:
        if str(error).startswith(str(path)):
            raise
        # The library raises bare Exception, and a panic of its own is not even that.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(
            f"{path}: not a tokenizer.json that can be used: {brief(str(error))}; download it again"
        ) from error
    for index in tokenizer.bos_ids:
        if index >= vocabulary_size:
            raise ValueError(
                f"{path}: token id {index} begins a text; expected ids in 0..{vocabulary_size - 1}"
            )
    return tokenizer


def _check_growth(backend: tokenizers.Tokenizer, path: Path) -> None:
    """Refuses normalisers that, one after the other, make a text many times as long."""

    def growth(state: Any) -> int:
        if not isinstance(state, dict):
            return 1
        parts = math.prod(growth(part) for part in state.get("normalizers") or ())
        content, prefix = state.get("content") or "", state.get("prepend") or ""
        return parts * max(1, len(content)) * (1 + len(prefix))

    if backend.normalizer is None:
        return
    found = growth(json.loads(backend.normalizer.__getstate__()))
    if found > _MAX_GROWTH:
        raise ValueError(
            f"{path}: its normalizer can make a text {brief(found)} times as long; expected at "
            f"most {_MAX_GROWTH}"
        )


def build_tokenizer(
    backend: tokenizers.Tokenizer,
    bos_ids: tuple[int, ...],
    vocabulary_size: int,
    path: Path | str,
    twin: tokenizers.Tokenizer | None = None,
) -> Tokenizer:
    """Makes the pair of tokenizers and checks every id against the embedding.

    Args:
      backend: the tokenizer; it is changed.
      bos_ids: ids that the model expects before a prompt.
      vocabulary_size: V, rows of the model's embedding.
      path: where it comes from, for messages.
      twin: a second one like ``backend``, also changed; None: a copy, which for a large vocabulary
        takes seconds.

    Returns:
      The tokenizer.

    Raises:
      ValueError: naming ``path``, when there are ids beyond the embedding.
    """
    special = tokenizers.Tokenizer.from_str(backend.to_str()) if twin is None else twin
    special.encode_special_tokens = False
    backend.encode_special_tokens = True
    tokenizer = Tokenizer(backend, special, bos_ids)
    # JAX clamps an id beyond the embedding to its last row without a word.
    if tokenizer.vocabulary_size > vocabulary_size:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocabulary_size - 1}, the model's "
            f"embedding only {vocabulary_size} rows; they do not belong together"
        )
    return tokenizer
