"""Text to token ids and back, by the ``tokenizers`` library."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# How Qwen2's own tokenizer splits text.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GGUF_CONTROL, _GGUF_USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type


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
    try:
        text = path.read_text("utf-8")
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer.json that can be read: {error}") from error
    backend.no_truncation()
    backend.no_padding()
    sample = backend.encode("a", add_special_tokens=True)
    # The mask marks what the post-processor added; what comes before the text is the prefix.
    num_before = (list(sample.special_tokens_mask) + [0]).index(0)
    return _build(backend, tuple(sample.ids[:num_before]), vocabulary_size, path)


def tokenizer_from_gguf(metadata: Mapping[str, Any], vocabulary_size: int, path: Path) -> Tokenizer:
    """Rebuilds a byte-level BPE tokenizer from a GGUF file's metadata.

    Args:
      metadata: from ``models.gguf_header``.
      vocabulary_size: V, rows of the model's embedding.
      path: the file, for messages.

    Returns:
      The tokenizer; ``bos_ids`` hold the file's BOS if it says that one is added.

    Raises:
      ValueError: naming the file and the key, for a kind of tokenizer whose rules are not known
        here: guessing them changes the ids of ordinary text silently.
    """
    kind, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {kind!r}; expected 'gpt2' (byte-level BPE). Pass the "
            "model's Hugging Face folder to --model instead"
        )
    if pre not in ("smollm", "qwen2"):
        raise ValueError(
            f"{path}: tokenizer.ggml.pre is {pre!r}; expected 'smollm' or 'qwen2'. Pass the "
            "model's Hugging Face folder to --model instead"
        )
    tokens = _list_of(str, metadata, "tokenizer.ggml.tokens", path)
    merges = _list_of(str, metadata, "tokenizer.ggml.merges", path)
    types = _list_of(int, metadata, "tokenizer.ggml.token_type", path)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{path}: {len(tokens)} tokenizer.ggml.tokens, {len(set(tokens))} of them distinct, "
            f"and {len(types)} tokenizer.ggml.token_type; expected distinct tokens, a type each"
        )
    try:
        backend = tokenizers.Tokenizer(
            models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=[(left, right) for left, _, right in (m.partition(" ") for m in merges)],
            )
        )
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: tokenizer.ggml.merges cannot be used: {error}") from error
    _set_splitting(backend, pre)
    backend.decoder = decoders.ByteLevel()
    for wanted, special in ((_GGUF_CONTROL, True), (_GGUF_USER_DEFINED, False)):
        added = [
            tokenizers.AddedToken(token, special=special, normalized=False)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type == wanted and token
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    bos_ids = ()
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos_ids = (_token_id(metadata, "tokenizer.ggml.bos_token_id", len(tokens), path),)
    return _build(backend, bos_ids, vocabulary_size, path)


def _set_splitting(backend: tokenizers.Tokenizer, pre: str) -> None:
    """Sets how text is split before BPE, by ``tokenizer.ggml.pre``."""
    if pre == "smollm":  # digits one by one, then GPT-2's pattern, as in llama.cpp
        digits = pre_tokenizers.Digits(individual_digits=True)
        words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    else:
        words = pre_tokenizers.Split(tokenizers.Regex(_QWEN2_PATTERN), "isolated")
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.normalizer = normalizers.NFC()
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])


def _list_of(kind: type, metadata: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """Reads one array, whose elements must all be of ``kind``."""
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{path}: metadata {key!r} is not a list of {kind.__name__}")
    return values


def _token_id(metadata: Mapping[str, Any], key: str, num_tokens: int, path: Path) -> int:
    value = metadata.get(key)
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        raise ValueError(f"{path}: metadata {key!r} is {value!r}; expected 0..{num_tokens - 1}")
    return value


def _build(
    backend: tokenizers.Tokenizer, bos_ids: tuple[int, ...], vocabulary_size: int, path: Path
) -> Tokenizer:
    """Makes the pair of tokenizers and checks every id against the embedding."""
    special = tokenizers.Tokenizer.from_str(backend.to_str())
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
