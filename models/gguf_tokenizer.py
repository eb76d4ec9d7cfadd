"""The tokenizer that a GGUF file describes in its metadata, rebuilt with ``tokenizers``.

llama.cpp is the reference for what the keys mean and for what holds when one is missing.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from models.tokenizer import Tokenizer, build_tokenizer

# The longest piece of the supported vocabularies has 16 characters, and deriving merges takes time
# that grows with the square of it.
MAX_PIECE_CHARACTERS = 64
MAX_MERGES = 1 << 20  # Gemma 3's vocabulary, the largest, has 513,511

# Values of tokenizer.ggml.token_type.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# What ends a turn, and what else shapes a conversation. Converters have given these tokens other
# types, and often name one end of several; llama.cpp knows them by their texts too.
TURN_ENDS = (
    "<|im_end|>",
    "<|end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
)
_TURN_MARKS = (
    *TURN_ENDS,
    "<|im_start|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<start_of_turn>",
)
_SPACE = "\u2581"  # how SentencePiece writes a space
_BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
# Phi-3's own tokenizer drops white space after all added tokens but these.
_PHI3_KEEPS_SPACE_AFTER = ("<unk>", "<s>", "<|endoftext|>")

# How the models' own tokenizer.json files split text.
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O_PATTERN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _ByteLevelRules(NamedTuple):
    """What one value of ``tokenizer.ggml.pre`` says about a byte-level BPE.

    Attributes:
      pattern: how text is split before BPE; None: digits one by one, then GPT-2's pattern.
      nfc: whether text is composed first (Unicode's NFC).
      ignore_merges: whether a word that is a token is that token, whatever the merges make of it.
      adds_bos: whether BOS begins a prompt when the file does not say.
    """

    pattern: str | None
    nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_BYTE_LEVEL_RULES = {
    "smollm": _ByteLevelRules(None),
    "qwen2": _ByteLevelRules(_QWEN2_PATTERN, nfc=True),
    "llama-bpe": _ByteLevelRules(_LLAMA3_PATTERN, ignore_merges=True, adds_bos=True),
    "gpt-4o": _ByteLevelRules(_GPT4O_PATTERN),
}


class _Vocabulary(NamedTuple):
    """The tokens of a file, in the order of their ids.

    Attributes:
      tokens: distinct.
      types: one for each, of ``tokenizer.ggml.token_type``.
    """

    tokens: list[str]
    types: list[int]

    @property
    def ids(self) -> dict[str, int]:
        return {token: index for index, token in enumerate(self.tokens)}

    def of_type(self, *types: int) -> list[str]:
        """The tokens of some types, without the empty one, which no text can hold."""
        pairs = zip(self.tokens, self.types, strict=True)
        return [token for token, token_type in pairs if token and token_type in types]


class _Steps(NamedTuple):
    """What surrounds BPE: one of these serves both tokenizers of a pair."""

    normalizer: normalizers.Normalizer | None
    pre_tokenizer: pre_tokenizers.PreTokenizer | None
    decoder: decoders.Decoder


def tokenizer_from_gguf(metadata: Mapping[str, Any], vocabulary_size: int, path: Path) -> Tokenizer:
    """Rebuilds a tokenizer from a GGUF file's metadata.

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
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"{path}: tokenizer.ggml.model is {kind!r}; expected 'gpt2' (byte-level BPE) or "
            "'llama' (SentencePiece BPE). Pass the model's Hugging Face folder to --model instead"
        )
    if kind == "gpt2":
        rules = _byte_level_rules(metadata, path)
        vocabulary = _read_vocabulary(metadata, path)
        bpe = _byte_level_bpe(metadata, vocabulary, rules, path)
        steps, adds_bos = _byte_level_steps(rules), rules.adds_bos
    else:
        vocabulary = _respelled(_read_vocabulary(metadata, path), path)
        bpe = _sentencepiece_bpe(metadata, vocabulary, path)
        prefix = _flag(metadata, "tokenizer.ggml.add_space_prefix", True, path)
        steps, adds_bos = _sentencepiece_steps(prefix), True
    bos_ids = ()
    if _flag(metadata, "tokenizer.ggml.add_bos_token", adds_bos, path):
        key = "tokenizer.ggml.bos_token_id"
        bos_ids = (_token_id(metadata, key, len(vocabulary.tokens), path),)
    phi3 = kind == "llama" and metadata.get("general.architecture") == "phi3"
    # Both share one BPE, which for 262,144 tokens takes seconds and 100 MB to build.
    backend, twin = (_assemble(bpe, steps, vocabulary, phi3) for _ in range(2))
    return build_tokenizer(backend, bos_ids, vocabulary_size, path, twin)


def _read_vocabulary(metadata: Mapping[str, Any], path: Path) -> _Vocabulary:
    tokens = _list_of(str, metadata, "tokenizer.ggml.tokens", path)
    types = list(_list_of(int, metadata, "tokenizer.ggml.token_type", path))
    if len(types) != len(tokens):
        raise ValueError(
            f"{path}: {len(tokens)} tokenizer.ggml.tokens and {len(types)} "
            "tokenizer.ggml.token_type; expected a type each"
        )
    _check_distinct(tokens, path)
    # Where these were ordinary tokens, a user's text could end the user's turn.
    for name in ("bos", "eos", "eot", "eom"):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if isinstance(index, int) and 0 <= index < len(types):
            types[index] = _CONTROL
    for index, token in enumerate(tokens):
        if token in _TURN_MARKS:
            types[index] = _CONTROL
    return _Vocabulary(tokens, types)


def _check_distinct(tokens: list[str], path: Path) -> None:
    if len(set(tokens)) != len(tokens):
        raise ValueError(
            f"{path}: {len(tokens)} tokenizer.ggml.tokens, {len(set(tokens))} of them distinct; "
            "expected all"
        )


def _assemble(
    bpe: models.BPE, steps: _Steps, vocabulary: _Vocabulary, phi3: bool
) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(bpe)
    for step, value in steps._asdict().items():
        if value is not None:
            setattr(backend, step, value)
    for types, special in (((_CONTROL, _UNKNOWN), True), ((_USER_DEFINED,), False)):
        added = [
            tokenizers.AddedToken(
                token,
                special=special,
                normalized=False,
                rstrip=phi3 and token not in _PHI3_KEEPS_SPACE_AFTER,
            )
            for token in vocabulary.of_type(*types)
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)
    return backend


# --- byte-level BPE ---------------------------------------------------------------------------


def _byte_level_rules(metadata: Mapping[str, Any], path: Path) -> _ByteLevelRules:
    pre = metadata.get("tokenizer.ggml.pre")
    rules = _BYTE_LEVEL_RULES.get(pre) if isinstance(pre, str) else None
    if rules is None:
        raise ValueError(
            f"{path}: tokenizer.ggml.pre is {pre!r}; expected one of "
            f"{', '.join(map(repr, _BYTE_LEVEL_RULES))}. Pass the model's Hugging Face folder to "
            "--model instead"
        )
    return rules


def _byte_level_bpe(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, rules: _ByteLevelRules, path: Path
) -> models.BPE:
    lines = _list_of(str, metadata, "tokenizer.ggml.merges", path)
    merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines)]
    try:
        return models.BPE(vocab=vocabulary.ids, merges=merges, ignore_merges=rules.ignore_merges)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: tokenizer.ggml.merges cannot be used: {error}") from error


def _byte_level_steps(rules: _ByteLevelRules) -> _Steps:
    if rules.pattern is None:
        words = pre_tokenizers.Digits(individual_digits=True)
    else:
        words = pre_tokenizers.Split(tokenizers.Regex(rules.pattern), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rules.pattern is None)
    return _Steps(
        normalizers.NFC() if rules.nfc else None,
        pre_tokenizers.Sequence([words, as_bytes]),
        decoders.ByteLevel(),
    )


# --- SentencePiece BPE ------------------------------------------------------------------------


def _respelled(vocabulary: _Vocabulary, path: Path) -> _Vocabulary:
    """Spells user-defined tokens as a text does: they are looked for before spaces are replaced."""
    tokens = [
        token.replace(_SPACE, " ") if token_type == _USER_DEFINED else token
        for token, token_type in zip(*vocabulary, strict=True)
    ]
    _check_distinct(tokens, path)
    return vocabulary._replace(tokens=tokens)


def _sentencepiece_bpe(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, path: Path
) -> models.BPE:
    tokens, types = vocabulary
    scores = _list_of(float, metadata, "tokenizer.ggml.scores", path)
    if len(scores) != len(tokens) or not all(map(math.isfinite, scores)):
        raise ValueError(
            f"{path}: {len(tokens)} tokenizer.ggml.tokens and {len(scores)} tokenizer.ggml.scores; "
            "expected a finite score each"
        )
    ids = vocabulary.ids
    for piece in _BYTE_PIECES:  # without one, characters that are no token would vanish
        if piece not in ids:
            raise ValueError(
                f"{path}: tokenizer.ggml.tokens has no {piece!r}; expected one for every byte"
            )
    # Only ordinary tokens: BPE must never spell out a control token. It cannot meet a user-defined
    # one either, since these are cut out of a text before it.
    pieces = {
        token: score
        for token, score, token_type in zip(tokens, scores, types, strict=True)
        if token_type == _NORMAL
    }
    merges = _merges(pieces, path)
    return models.BPE(vocab=ids, merges=merges, byte_fallback=True)


def _merges(pieces: Mapping[str, float], path: Path) -> list[tuple[str, str]]:
    """Derives the merges of SentencePiece, first the one that it prefers.

    SentencePiece has no list of merges: it joins the two neighbours whose union is the token of the
    highest score. So every way to cut a token into two others is a merge, and a token's score ranks
    all of its merges. That is exact if every character of a token is a token itself, as it is after
    training; SentencePiece would also join a character that is none.
    """
    longest = max(pieces, key=len, default="")
    if len(longest) > MAX_PIECE_CHARACTERS:
        raise ValueError(
            f"{path}: tokenizer.ggml.tokens has one of {len(longest)} characters, "
            f"{longest[:20]!r}...; expected at most {MAX_PIECE_CHARACTERS}"
        )
    merges: list[tuple[str, str]] = []
    last_score, last_token = math.inf, ""
    for token in sorted(pieces, key=pieces.__getitem__, reverse=True):
        num_before = len(merges)
        for split in range(len(token) - 1, 0, -1):
            if (left := token[:split]) in pieces and (right := token[split:]) in pieces:
                merges.append((left, right))
        if len(merges) == num_before:
            continue
        if pieces[token] == last_score:  # the leftmost would be first, which no list can say
            raise ValueError(
                f"{path}: tokenizer.ggml.scores of {last_token!r} and {token!r} are both "
                f"{last_score}; expected distinct ones, which order the merges"
            )
        if len(merges) > MAX_MERGES:
            raise ValueError(
                f"{path}: tokenizer.ggml.tokens can be put together in more than {MAX_MERGES} "
                "ways; expected fewer"
            )
        last_score, last_token = pieces[token], token
    return merges


def _sentencepiece_steps(prefix: bool) -> _Steps:
    spaces = normalizers.Replace(" ", _SPACE)
    unspaced = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if not prefix:
        return _Steps(spaces, None, decoders.Sequence(unspaced))
    return _Steps(
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]),
        None,
        decoders.Sequence([*unspaced, decoders.Strip(" ", 1, 0)]),
    )


# --- metadata ---------------------------------------------------------------------------------


def _list_of(kind: type, metadata: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    """Reads one array, whose elements must all be of ``kind``."""
    values = metadata.get(key)
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise ValueError(f"{path}: metadata {key!r} is not a list of {kind.__name__}")
    return values


def _flag(metadata: Mapping[str, Any], key: str, default: bool, path: Path) -> bool:
    value = metadata.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{path}: metadata {key!r} is {value!r}; expected true or false")
    return value


def _token_id(metadata: Mapping[str, Any], key: str, num_tokens: int, path: Path) -> int:
    value = metadata.get(key)
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        raise ValueError(f"{path}: metadata {key!r} is {value!r}; expected 0..{num_tokens - 1}")
    return value
