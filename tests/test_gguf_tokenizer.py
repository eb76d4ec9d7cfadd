"""Tokenizers rebuilt from GGUF metadata: the ids are those of the models' own tokenizers."""

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers

from models import gguf_header, gguf_tokenizer
from models.chat_template import ChatTemplate, encode_chats
from models.gguf_tokenizer import tokenizer_from_gguf
from tests import tiny_checkpoints
from tests.tiny_vocabularies import (
    CONTROL,
    NORMAL,
    TEXTS,
    UNUSED,
    USER_DEFINED,
    WHOLE,
    byte_level_metadata,
    byte_level_vocabulary,
    drawn_texts,
    sentencepiece_metadata,
)

PATH = Path("tiny.gguf")

# --- byte-level BPE ---------------------------------------------------------------------------


# As published, JSON's escapes included: in meta-llama/Meta-Llama-3-8B's tokenizer.json, and in
# microsoft/Phi-4-mini-instruct's, which llama.cpp quotes above its own form of it.
PUBLISHED_PATTERNS = {
    "llama-bpe": r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?"""
    r"""[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+""",
    "gpt-4o": r"""[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}"""
    r"""\\p{Lo}\\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}"""
    r"""\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+""",
}


@pytest.mark.parametrize("pre", PUBLISHED_PATTERNS)
def test_byte_level_families_match_their_tokenizer_json(pre):
    tokens, merges = byte_level_vocabulary()
    split = json.loads(f'{{"Regex": "{PUBLISHED_PATTERNS[pre]}"}}')
    published = {
        "version": "1.0",
        "added_tokens": [
            {"id": index, "content": tokens[index], "special": True, "single_word": False}
            | {"lstrip": False, "rstrip": False, "normalized": False}
            for index in (0, 1)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": split, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
                | {"use_regex": False},
            ],
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {
            "type": "BPE",
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": merges,
            "ignore_merges": pre == "llama-bpe",
        },
    }
    theirs = tokenizers.Tokenizer.from_str(json.dumps(published))
    ours = tokenizer_from_gguf(byte_level_metadata(pre), 701, PATH)
    for text in [*TEXTS, *drawn_texts(300), "x<|end|>y", "vocabulary"]:
        assert ours.encode_with_special(text) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == text


def test_qwen2_matches_transformers():
    qwen2 = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2")
    tokens, merges = byte_level_vocabulary()
    vocab = {token: index for index, token in enumerate(tokens)}
    theirs = qwen2.Qwen2Tokenizer(vocab=vocab, merges=list(merges), **dict.fromkeys(
        ("unk_token", "eos_token", "pad_token"), "<|end|>"
    ))  # fmt: skip
    ours = tokenizer_from_gguf(byte_level_metadata("qwen2"), 701, PATH)
    for text in [*TEXTS, *drawn_texts(300)]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "a  123'll", ["a", "  ", "1", "2", "3", "'ll"]),
        ("qwen2", "I'LL  pay 12€\n\n n", ["I", "'LL", " ", " pay", " ", "1", "2", "€\n\n", " n"]),
        ("llama-bpe", "I'LL XmlIs 1234/\n/", ["I", "'LL", " XmlIs", " ", "123", "4", "/\n", "/"]),
        ("gpt-4o", "I'LL XmlIs 1234/\n/", ["I'LL", " Xml", "Is", " ", "123", "4", "/\n/"]),
        ("gpt-4o", "helloWorld's ПриветМир", ["hello", "World's", " Привет", "Мир"]),
    ],
)  # fmt: skip
def test_splitting(pre, text, pieces):
    loaded = tokenizer_from_gguf(byte_level_metadata(pre), 701, PATH)
    found = loaded.plain.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == pieces


@pytest.mark.parametrize(
    ("pre", "same"), [("qwen2", True), ("llama-bpe", False), ("gpt-4o", False)]
)
def test_only_qwen2_composes_characters(pre, same):
    loaded = tokenizer_from_gguf(byte_level_metadata(pre), 701, PATH)
    assert (loaded.encode("e\u0301") == loaded.encode("é")) is same


def test_whole_words_come_before_merges_in_llama3_alone():
    for pre in ("llama-bpe", "gpt-4o", "qwen2", "smollm"):
        loaded = tokenizer_from_gguf(byte_level_metadata(pre), 701, PATH)
        assert (loaded.encode("vocabulary") == [700]) is (pre == "llama-bpe")


@pytest.mark.parametrize(
    ("metadata", "adds_bos"),
    [
        (byte_level_metadata("smollm"), False),
        (byte_level_metadata("qwen2"), False),
        (byte_level_metadata("gpt-4o"), False),
        (byte_level_metadata("llama-bpe"), True),
        (byte_level_metadata("llama-bpe", add_bos_token=False), False),
        (byte_level_metadata("gpt-4o", add_bos_token=True), True),
    ],
)
def test_beginning_of_sequence(metadata, adds_bos):
    loaded = tokenizer_from_gguf(metadata, 701, PATH)
    assert loaded.bos_ids == ((0,) if adds_bos else ())
    assert loaded.encode_prompt("the") == [*loaded.bos_ids, *loaded.encode("the")]


# --- SentencePiece BPE ------------------------------------------------------------------------


def merged_greedily(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE by definition: the best pair of neighbours, the leftmost of equals."""
    symbols = list(text)
    while True:
        unions = [left + right for left, right in itertools.pairwise(symbols)]
        ranked = [(-scores[union], place) for place, union in enumerate(unions) if union in scores]
        if not ranked:
            return symbols
        _, place = min(ranked)
        symbols[place : place + 2] = [unions[place]]


def by_definition(metadata: dict) -> Callable[[str], list[int]]:
    """What SentencePiece makes of texts without special tokens."""
    keys = ("tokens", "scores", "token_type")
    columns = [metadata[f"tokenizer.ggml.{key}"] for key in keys]
    ids = {token: index for index, token in enumerate(columns[0])}
    scores = {token: score for token, score, kind in zip(*columns, strict=True) if kind == NORMAL}
    whole = [token for token, _, kind in zip(*columns, strict=True) if kind == USER_DEFINED]
    pattern = "|".join(re.escape(token) for token in sorted(whole, key=len, reverse=True))
    prefix = "\u2581" if metadata["tokenizer.ggml.add_space_prefix"] else ""

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for part in filter(None, re.split(f"({pattern})", text)):
            if part in whole:
                found.append(ids[part])
                continue
            for symbol in merged_greedily(prefix + part.replace(" ", "\u2581"), scores):
                is_token = symbol in scores
                as_bytes = [f"<0x{byte:02X}>" for byte in symbol.encode()]
                found += [ids[token] for token in ([symbol] if is_token else as_bytes)]
        return found

    return encode


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_by_its_definition(shuffled, prefix):
    metadata = sentencepiece_metadata(shuffled, prefix)
    loaded = tokenizer_from_gguf(metadata, 2000, PATH)
    expected = by_definition(metadata)
    for text in [*TEXTS, *drawn_texts(300)]:
        ids = loaded.encode(text)
        assert ids == expected(text)
        # A user-defined token is followed by the prefix as well, which nothing takes away again.
        assert loaded.decode(ids) == text or (prefix and any(token in text for token in WHOLE))


@pytest.mark.parametrize(
    ("architecture", "whole"), [("phi3", ()), ("gemma3", ("\n", "\n\n", "<td>"))]
)
def test_sentencepiece_matches_transformers(architecture, whole):
    pytest.importorskip("transformers")
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    # Its Gemma goes by the order of the tokens, which is that of the scores in Gemma's files.
    is_phi3 = architecture == "phi3"
    metadata = sentencepiece_metadata(shuffled=is_phi3, prefix=is_phi3, whole=whole)
    keys = ("tokens", "scores", "token_type")
    columns = {key: metadata[f"tokenizer.ggml.{key}"] for key in keys}
    theirs, _ = mapping.convert_gguf_tokenizer(architecture, {"tokenizer_type": "llama", **columns})
    theirs.encode_special_tokens = True
    ours = tokenizer_from_gguf(metadata | {"general.architecture": architecture}, 2000, PATH)
    for text in [*TEXTS, *drawn_texts(300)]:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected
        assert ours.decode(expected) == theirs.decode(expected)


@pytest.mark.parametrize("kind", [CONTROL, UNUSED])
def test_only_ordinary_tokens_are_spelled_out(kind):
    # The control tokens are unions of two of these, and so would be spelled out.
    metadata = sentencepiece_metadata()
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for token in ("<|", "end", "<|end", "|>", "hel", "hell"):
        if token not in tokens:
            tokens.append(token)
            kinds.append(NORMAL)
            metadata["tokenizer.ggml.scores"].append(-2000.0 - len(tokens))
    for token in ("<|end|>", "hell"):
        kinds[tokens.index(token)] = kind
    loaded = tokenizer_from_gguf(metadata, 2000, PATH)
    for text in ("<|end|>", "hell", "x hello<|end|> <s>"):
        ids = loaded.encode(text)
        assert not set(ids) & {tokens.index("<|end|>"), tokens.index("hell")}
        assert not set(ids) & set(loaded.special_tokens.values())
        assert loaded.decode(ids) == text
    assert (tokens.index("hell") in loaded.encode_with_special("hell")) is (kind == CONTROL)
    # What ends a turn is a special token by its text, whatever type the file gives it.
    assert tokens.index("<|end|>") in loaded.encode_with_special("x<|end|>")
    assert loaded.special_tokens["<unk>"] == 0


def test_end_of_turn_is_special_whatever_its_type():
    metadata = sentencepiece_metadata(eot_token_id=0, eos_token_id=2)
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for kind in (NORMAL, USER_DEFINED):
        end = metadata["tokenizer.ggml.eot_token_id"] = tokens.index("<|end|>")
        kinds[end] = kind
        loaded = tokenizer_from_gguf(metadata, 2000, PATH)
        assert end not in loaded.encode("x<|end|>")
        assert loaded.encode_with_special("x<|end|>")[-1] == end
    assert kinds[end] == USER_DEFINED  # the header that it came from is as it was


def test_sentencepiece_defaults_are_llama_cpps():
    metadata = sentencepiece_metadata()
    del metadata["tokenizer.ggml.add_space_prefix"]
    loaded = tokenizer_from_gguf(metadata, 2000, PATH)
    assert loaded.encode_prompt("the") == [1, *by_definition(sentencepiece_metadata())("the")]
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert tokenizer_from_gguf(metadata, 2000, PATH).bos_ids == ()


def test_user_defined_spaces_in_either_spelling():
    metadata = sentencepiece_metadata(prefix=False)
    text = "a  b   c"
    ids = tokenizer_from_gguf(metadata, 2000, PATH).encode(text)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert {tokens.index("  "), tokens.index("   ")} <= set(ids)
    for spaces in ("  ", "   "):
        tokens[tokens.index(spaces)] = spaces.replace(" ", "\u2581")
    respelled = tokenizer_from_gguf(metadata, 2000, PATH)
    assert respelled.encode(text) == ids
    assert respelled.decode(ids) == text


def test_bytes_that_are_not_text():
    metadata = sentencepiece_metadata()
    loaded = tokenizer_from_gguf(metadata, 2000, PATH)
    first = metadata["tokenizer.ggml.tokens"].index("<0x00>")
    assert loaded.decode([first + byte for byte in "é".encode()]) == "é"
    assert loaded.decode([first + 0xC3, first + 0x41]) == "\ufffd\ufffd"


def test_phi3_drops_space_after_its_special_tokens():
    metadata = sentencepiece_metadata(whole=()) | {"general.architecture": "phi3"}
    loaded = tokenizer_from_gguf(metadata, 2000, PATH)
    user, end = (loaded.special_tokens[token] for token in ("<|user|>", "<|end|>"))
    text = "<|user|>\n  the text<|end|>\n"
    assert loaded.encode_with_special(text) == [user, *loaded.encode("the text"), end]
    for token in ("<s>", "<|endoftext|>"):
        ids = loaded.encode_with_special(f"{token} the")
        assert ids == [loaded.special_tokens[token], *loaded.encode(" the")]
    other = tokenizer_from_gguf(sentencepiece_metadata(whole=()), 2000, PATH)
    assert other.encode_with_special(text) != loaded.encode_with_special(text)
    # The same where the template's special tokens are kept apart from those in a user's text.
    template = ChatTemplate("<|user|>\n{{ messages[0]['content'] }}<|end|>\n", "tiny.jinja")
    contents = ("  the text", "  the <|end|> text")
    plain, hostile = encode_chats(
        template, [[{"role": "user", "content": content}] for content in contents], loaded
    )
    assert plain == [user, *loaded.encode("the text"), end]
    assert hostile == [user, *loaded.encode("the <|end|> text"), end]


# --- files that cannot be used ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", "t5", "tokenizer.ggml.model is 't5'"),
        ("pre", None, "tokenizer.ggml.pre is None"),
        ("pre", ["qwen2"], "tokenizer.ggml.pre is ['qwen2']"),
        ("tokens", None, "'tokenizer.ggml.tokens' is not a list of str"),
        ("tokens", ["a"] * 268, "268 tokenizer.ggml.tokens, 1 of them distinct"),
        ("merges", "a b", "'tokenizer.ggml.merges' is not a list of str"),
        ("merges", ["q zz"], "merges cannot be used"),
        ("merges", [7], "'tokenizer.ggml.merges' is not a list of str"),
        ("token_type", [1], "a type each"),
        ("add_bos_token", True, "bos_token_id' is 9999"),
        ("add_bos_token", 1, "'tokenizer.ggml.add_bos_token' is 1; expected true or false"),
    ],
)
def test_bad_byte_level_metadata(tmp_path, key, value, message):
    path = tiny_checkpoints.write_gguf(tmp_path / "tiny.gguf")
    metadata = {**gguf_header.read_header(path).metadata, "tokenizer.ggml.bos_token_id": 9999}
    metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(ValueError, match=r"tiny\.gguf") as caught:
        tokenizer_from_gguf(metadata, 268, path)
    assert message in str(caught.value)


def change(key: str, index: int, value) -> dict:
    """Metadata with one element of one list changed; 300 is an ordinary token, 2 is </s>."""
    metadata = sentencepiece_metadata(shuffled=False)
    metadata[f"tokenizer.ggml.{key}"][index] = value
    return metadata


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (sentencepiece_metadata(scores=[1.0]), "expected a finite score each"),
        (sentencepiece_metadata(scores=None), "'tokenizer.ggml.scores' is not a list of float"),
        (change("scores", 300, float("nan")), "expected a finite score each"),
        (change("scores", 300, -40.0), "are both -40.0; expected distinct ones"),
        (change("tokens", 3 + 65, "<byte>"), "no '<0x41>'; expected one for every byte"),
        (change("tokens", 300, "a" * 65), "one of 65 characters, 'aaaaaaaaaaaaaaaaaaaa'..."),
        (change("tokens", 300, "</s>"), "expected all"),
        (change("tokens", -4, "\u2581\u2581"), "expected all"),
        (sentencepiece_metadata(add_space_prefix=0), "add_space_prefix' is 0; expected true"),
        (sentencepiece_metadata(bos_token_id=None), "'tokenizer.ggml.bos_token_id' is None"),
    ],
)
def test_bad_sentencepiece_metadata(metadata, message):
    with pytest.raises(ValueError, match=r"tiny\.gguf") as caught:
        tokenizer_from_gguf(metadata, 2000, PATH)
    assert message in str(caught.value)


def test_number_of_merges_is_bounded(monkeypatch):
    monkeypatch.setattr(gguf_tokenizer, "MAX_MERGES", 50)
    with pytest.raises(ValueError, match=r"tiny\.gguf.* more than 50 ways"):
        tokenizer_from_gguf(sentencepiece_metadata(), 2000, PATH)


def test_ids_beyond_the_embedding():
    with pytest.raises(ValueError, match=r"tiny\.gguf.* only 700 rows"):
        tokenizer_from_gguf(byte_level_metadata("qwen2"), 700, PATH)


# --- a real vocabulary ------------------------------------------------------------------------


@pytest.mark.slow
def test_gemma3_vocabulary():
    name = "ECMH_JAX_GEMMA3"  # its terms of use rule out fetching it here
    if name not in os.environ:
        pytest.skip(f"set {name} to a GGUF file of any Gemma 3")
    metadata = gguf_header.read_header(os.environ[name]).metadata
    loaded = tokenizer_from_gguf(metadata, 262_208, PATH)
    assert loaded.bos_ids == (2,)
    expected = by_definition(metadata)
    for text in [*TEXTS, *drawn_texts(300), "x" + " " * 40 + "y", "<table>\n\n\n<td>"]:
        ids = loaded.encode(text)
        assert ids == expected(text)
        assert loaded.decode(ids) == text
