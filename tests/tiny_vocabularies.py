"""Tiny vocabularies trained on text that does not change, as GGUF files hold them."""

import functools
import json
import random
from pathlib import Path

import tokenizers
from tokenizers import models, pre_tokenizers, trainers

TEXTS = (
    "hello world, the tokens of a text",
    "    12  34 5678",
    " leading, trailing ",
    "naïve 日本語 🙂‍↔️ \U00013000",
    "\n\t x  \r\n\n\n",
    "",
    " ",
    "I'LL can't WE'VE they're 'tis",
    "def f(x):\n    return x ** 2  # f\n",
    "\x00\x01\x7f é e\u0301 \u00a0\u3000",
    "a<b> <|x|> {{ y }} <0x41> </s> <unk>",
    "camelCase XMLHttpRequest ПриветМир ǅabc/def\n/",
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@functools.cache
def corpus() -> tuple[str, ...]:
    """Text that does not change, to train tiny vocabularies on and to draw texts from."""
    licence = Path(__file__).parent.parent.joinpath("LICENSE").read_text("utf-8")
    return (*licence.split("\n\n"), *TEXTS * 3)


def drawn_texts(num_texts: int) -> list[str]:
    """Pieces of the corpus, and characters of every kind, most of them in no vocabulary."""
    rng = random.Random(5)
    text = "\n\n".join(corpus())
    starts = [rng.randrange(len(text) - 80) for _ in range(num_texts // 2)]
    kinds = ((32, 127), (32, 33), (9, 14), (0xA0, 0x600), (0x3000, 0xD7FF), (0x1F300, 0x1FAFF))
    return [text[start : start + rng.randrange(80)] for start in starts] + [
        "".join(chr(rng.randrange(*rng.choice(kinds))) for _ in range(rng.randrange(40)))
        for _ in range(num_texts // 2)
    ]


@functools.cache
def byte_level_vocabulary() -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:
    """Tokens and merges trained on the corpus; the last token, "vocabulary", is in no merge."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(corpus(), trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return (*tokens, "vocabulary"), tuple((left, right) for left, right in model["merges"])


def byte_level_metadata(pre: str, **values) -> dict:
    tokens, merges = byte_level_vocabulary()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [CONTROL] * 2 + [NORMAL] * (len(tokens) - 2),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@functools.cache
def sentencepiece_pieces() -> tuple[str, ...]:
    """Pieces in the order that they are merged in, then characters, as SentencePiece orders them.

    No words are split off, so pieces cross spaces and lines more than in any real vocabulary.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=900, show_progress=False, max_token_length=16)
    texts = [" ".join(text.split()).replace(" ", "\u2581") for text in corpus()]
    backend.train_from_iterator(texts, trainer)
    vocab = backend.get_vocab()
    pieces = sorted(vocab, key=vocab.__getitem__)
    return tuple(sorted(pieces, key=lambda piece: len(piece) == 1))


WHOLE = ("  ", "   ", "\n", "\n\n", "<td>")


def sentencepiece_metadata(
    shuffled: bool = True, prefix: bool = True, whole: tuple[str, ...] = WHOLE, **values
) -> dict:
    """A vocabulary laid out like Llama 2's.

    Args:
      shuffled: whether the ids say nothing about the order of merges.
      prefix: the file's add_space_prefix.
      whole: user-defined tokens.
      **values: other keys of ``tokenizer.ggml``.
    """
    scores = {piece: -float(rank) for rank, piece in enumerate(sentencepiece_pieces())}
    pieces = list(scores)
    if shuffled:
        random.Random(3).shuffle(pieces)
    tokens = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    tokens |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    tokens |= dict.fromkeys(pieces, NORMAL) | dict.fromkeys(whole, USER_DEFINED)
    tokens |= dict.fromkeys(("<|user|>", "<|end|>", "<|endoftext|>"), CONTROL)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.scores": [scores.get(token, -1000.0) for token in tokens],
        "tokenizer.ggml.token_type": list(tokens.values()),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.add_space_prefix": prefix,
    } | {f"tokenizer.ggml.{key}": value for key, value in values.items()}
