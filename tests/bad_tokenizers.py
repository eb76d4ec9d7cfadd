"""Bad tokenizer.json: ``name -> (what is done to a good model folder, part of the message)``."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.bad_folders import BOM, Case, as_folder, link, pipe, remove, sparse, write
from tests.tiny_checkpoints import make_tokenizer, write_json

_TOKENIZER: dict[str, Any] = json.loads(make_tokenizer().to_str())


def tokenizer(**changes: Any) -> Callable[[Path], Any]:
    """Returns a change of the tokenizer's parts."""
    return lambda folder: write_json(folder / "tokenizer.json", {**_TOKENIZER, **changes})


def bpe(**changes: Any) -> Callable[[Path], Any]:
    """Returns a change of the tokenizer's model."""
    return tokenizer(model={**_TOKENIZER["model"], **changes})


def token(index: Any) -> Callable[[Path], Any]:
    """Returns a change that adds a token to the vocabulary."""
    return bpe(vocab={**_TOKENIZER["model"]["vocab"], "zz": index})


def added(index: Any) -> Callable[[Path], Any]:
    """Returns a change that adds a special token."""
    one = {**_TOKENIZER["added_tokens"][0], "id": index, "content": "<zz>"}
    return tokenizer(added_tokens=[*_TOKENIZER["added_tokens"], one])


def prefix(*ids: int) -> dict[str, Any]:
    """A post-processor that puts token ids before a text."""
    text, special = ({"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "X"}})
    special["SpecialToken"]["type_id"] = 0
    return {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"X": {"id": "X", "ids": list(ids), "tokens": ["X"] * len(ids)}},
    }


def replace(text: str, by: str) -> dict[str, Any]:
    """A normaliser that replaces a text."""
    return {"type": "Replace", "pattern": {"String": text}, "content": by}


def split(pattern: str) -> dict[str, Any]:
    """A pre-tokenizer that splits by a regular expression."""
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }


_TRUNCATED = json.dumps(_TOKENIZER)[:-40]
_UNUSABLE = "tokenizer.json: not a tokenizer.json that can be used"
_WORDS = {"vocab": {"b": 0}, "unk_token": "[UNK]"}
CASES: Mapping[str, Case] = {
    "missing": (remove("tokenizer.json"), "tokenizer.json: no such file"),
    "folder": (as_folder("tokenizer.json"), "tokenizer.json: no such file"),
    "pipe": (pipe("tokenizer.json"), "tokenizer.json: no such file"),
    "loop": (link("tokenizer.json", "tokenizer.json"), "tokenizer.json: no such file"),
    "vast": (sparse("tokenizer.json", 1 << 40), "has 1099511627776 bytes; expected at"),
    "empty": (write("tokenizer.json", ""), _UNUSABLE),
    "empty_object": (write("tokenizer.json", "{}"), _UNUSABLE),
    "list": (write("tokenizer.json", "[]"), _UNUSABLE),
    "null": (write("tokenizer.json", "null"), _UNUSABLE),
    "deep": (write("tokenizer.json", '{"model":' + "[" * 100_000), _UNUSABLE),
    "truncated": (write("tokenizer.json", _TRUNCATED), _UNUSABLE),
    "zeros": (write("tokenizer.json", bytes(1000)), _UNUSABLE),
    "not_utf8": (write("tokenizer.json", b'{"version": "\xff"}'), _UNUSABLE),
    "utf16": (write("tokenizer.json", json.dumps(_TOKENIZER).encode("utf-16")), _UNUSABLE),
    "pickle": (write("tokenizer.json", b"\x80\x04cos\nsystem\n."), _UNUSABLE),
    "version": (tokenizer(version="2.0"), _UNUSABLE),
    "without_model": (tokenizer(model=None), _UNUSABLE),
    "unknown_model": (bpe(type="Own"), _UNUSABLE),
    "id_beyond": (token(263), "ids up to 263"),
    "id_huge": (token((1 << 32) - 1), _UNUSABLE),
    "id_vast": (token(1 << 40), _UNUSABLE),
    "id_negative": (token(-1), _UNUSABLE),
    "id_fraction": (token(1.5), _UNUSABLE),
    "id_text": (token("3"), _UNUSABLE),
    "vocab_list": (bpe(vocab=[["a", 0]]), _UNUSABLE),
    "added_beyond": (added(400), "ids up to 263"),
    "added_negative": (added(-1), _UNUSABLE),
    "added_number": (tokenizer(added_tokens=[3]), _UNUSABLE),
    "merge_unknown": (bpe(merges=["q zz9"]), _UNUSABLE),
    "merge_of_three": (bpe(merges=["a b c"]), _UNUSABLE),
    "merge_of_one": (bpe(merges=["abc"]), _UNUSABLE),
    "merge_number": (bpe(merges=[3]), _UNUSABLE),
    "merges_text": (bpe(merges="a b"), _UNUSABLE),
    "dropout": (bpe(dropout=5.0), _UNUSABLE),
    "prefix_crash": (bpe(continuing_subword_prefix="\u00e9"), _UNUSABLE),
    "prefix_long": (bpe(continuing_subword_prefix="hello" * 9), _UNUSABLE),
    "words": (tokenizer(model={"type": "WordLevel", **_WORDS}), _UNUSABLE),
    "pieces": (
        tokenizer(
            model={
                "type": "WordPiece",
                "continuing_subword_prefix": "#",
                "max_input_chars_per_word": 9,
                **_WORDS,
            }
        ),
        _UNUSABLE,
    ),
    "unigram_empty": (
        tokenizer(model={"type": "Unigram", "vocab": [], "unk_id": 5}),
        _UNUSABLE,
    ),
    "regex": (tokenizer(pre_tokenizer=split("(")), _UNUSABLE),
    "regex_stack": (tokenizer(pre_tokenizer=split("(" * 100_000)), _UNUSABLE),
    "bos_beyond": (tokenizer(post_processor=prefix(263)), "token id 263 begins a text"),
    "template": (tokenizer(post_processor={"type": "TemplateProcessing"}), _UNUSABLE),
    "charsmap": (
        tokenizer(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        _UNUSABLE,
    ),
    "grows_without_end": (
        tokenizer(normalizer={"type": "Sequence", "normalizers": 50 * [replace("a", "aa")]}),
        "times as long; expected at most 64",
    ),
    "grows_at_once": (
        tokenizer(normalizer=replace("a", 65 * "a")),
        "can make a text 65 times as long",
    ),
    "grows_in_front": (
        tokenizer(
            normalizer={
                "type": "Sequence",
                "normalizers": 7 * [{"type": "Prepend", "prepend": "a"}],
            }
        ),
        "can make a text 128 times as long",
    ),
    "replaces_nothing": (tokenizer(normalizer=replace("", "aa")), _UNUSABLE),
    "surrogate": (
        write("tokenizer.json", json.dumps(_TOKENIZER).replace('"h"', '"\\ud800"')),
        _UNUSABLE,
    ),
    "bom": (write("tokenizer.json", BOM + json.dumps(_TOKENIZER)), _UNUSABLE),
}
