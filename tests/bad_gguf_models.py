"""GGUF files that are well-formed but hold no model that is supported.

``name -> (architecture, what is done to metadata and tensors, part of the message)``; both are
dictionaries that a change alters in place.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from models.families import FAMILIES, GGUF_FAMILIES

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], Any]
Case = tuple[str, Change, str]
_NAN = float("nan")


def assign(key: str, value: Any) -> Change:
    """Returns a change that sets one key of the metadata."""
    return lambda metadata, tensors: metadata.__setitem__(key, value)


def drop(key: str) -> Change:
    """Returns a change that removes one key of the metadata."""
    return lambda metadata, tensors: metadata.pop(key)


def assign_all(**values: Any) -> Change:
    """Returns a change that sets keys of Llama's; ``__`` stands for a dot."""
    changed = {f"llama.{key.replace('__', '.')}": value for key, value in values.items()}
    return lambda metadata, tensors: metadata.update(changed)


def tensor(name: str, values: np.ndarray | None) -> Change:
    """Returns a change that sets one tensor, or drops it for None."""

    def change(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors.pop(name, None)
        if values is not None:
            tensors[name] = values

    return change


def factors(short: Any, long: Any) -> Change:
    """Returns a change that adds the factors of LongRoPE."""

    def change(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        metadata["phi3.rope.scaling.original_context_length"] = 64
        for name, values in (("short", short), ("long", long)):
            if values is not None:
                tensors[f"rope_factors_{name}.weight"] = np.asarray(values, np.float32)

    return change


_NUMBERS = {
    "block_count": int,
    "context_length": int,
    "embedding_length": int,
    "feed_forward_length": int,
    "attention.head_count": int,
    "attention.head_count_kv": int,
    "attention.key_length": int,
    "attention.layer_norm_rms_epsilon": float,
    "rope.freq_base": float,
    "rope.dimension_count": int,
    "vocab_size": int,
}
_REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
# name: (value, what the message says of it)
_ILL_TYPED = {
    "text": ("8", "'8'; expected one number"),
    "bool": (True, "True; expected one number"),
    "list": ([8, 8], "[8, 8]; expected one number"),
    "nan": (_NAN, "nan; expected one number"),
    "zero": (0, "0; expected > 0"),
    "negative": (-8, "-8; expected > 0"),
    "texts": (["8"], "['8']; expected one number"),
    "infinity": (float("inf"), "inf; expected one number"),
}


def _number_cases() -> Iterator[tuple[str, Case]]:
    """Every number: all kinds of nonsense for Llama, the next kind for each other family."""
    turn = 0
    for architecture in GGUF_FAMILIES:
        for key, kind in _NUMBERS.items():
            turn += 1
            every = architecture == "llama" or kind is float
            names = list(_ILL_TYPED)
            for name in names if every else [names[turn % len(names)]]:
                value, found = _ILL_TYPED[name]
                name, full = f"{architecture}_{key}_{name}", f"{architecture}.{key}"
                yield name, (architecture, assign(full, value), f"{full} is {found}")
        for key in _REQUIRED:
            full = f"{architecture}.{key}"
            yield f"{architecture}_no_{key}", (architecture, drop(full), f"{full} is missing")


def _tensor_cases() -> Iterator[tuple[str, Case]]:
    """Every kind of tensor of every family, missing once and misshapen once."""
    for architecture, family in GGUF_FAMILIES.items():
        for role, template in FAMILIES[family].gguf_names.items():
            name = template.format(layer=1)
            if role == "head":  # missing, it is the embedding
                continue
            message = f"tensor {name!r} is missing"
            yield f"{architecture}_no_{name}", (architecture, tensor(name, None), message)
            shape = np.zeros((3, 3), np.float32)
            if role != "embedding":
                message = f"tensor {name!r} has shape (3, 3)"
                yield f"{architecture}_bad_{name}", (architecture, tensor(name, shape), message)


_OTHERS: Mapping[str, Case] = {
    "architecture": ("llama", assign("general.architecture", "mamba"), "is 'mamba'; supported are"),
    "other_architecture": (
        "llama",
        assign("general.architecture", "qwen3"),
        "qwen3.embedding_length is missing",
    ),
    "long_architecture": ("llama", assign("general.architecture", "x" * 100_000), "is 'xxx"),
    "split": ("llama", assign("split.count", 2), "split.count is 2"),
    "split_text": ("llama", assign("split.count", "2"), "split.count is '2'"),
    "split_list": ("llama", assign("split.count", [1]), "split.count is [1]"),
    "experts": ("llama", assign_all(expert_count=8), "llama.expert_count is 8"),
    "softcap_of_attention": (
        "gemma3",
        assign("gemma3.attn_logit_softcapping", 50.0),
        "gemma3.attn_logit_softcapping is 50.0",
    ),
    "not_causal": ("qwen2", assign("qwen2.attention.causal", False), "attention.causal is False"),
    "scale_linear": ("llama", assign_all(rope__scale_linear=2.0), "rope.scale_linear is 2.0"),
    "softcap_text": ("gemma3", assign("gemma3.final_logit_softcapping", "30"), "ng is '30'"),
    "softcap_negative": ("gemma3", assign("gemma3.final_logit_softcapping", -30.0), "is -30.0"),
    "softcap_tiny": ("gemma3", assign("gemma3.final_logit_softcapping", 1e-35), "logit_softcap is"),
    "window_text": ("phi3", assign("phi3.attention.sliding_window", "16"), "window is '16'"),
    "window_negative": ("phi3", assign("phi3.attention.sliding_window", -1), "window is -1"),
    "window_huge": (
        "gemma3",
        assign("gemma3.attention.sliding_window", (1 << 32) - 1),
        "sliding_window is 4294967295; expected one number (int, at most 2147483647)",
    ),
    "window_overflow": (
        "phi3",
        assign("phi3.attention.sliding_window", (1 << 31) - 1),
        "sliding_window is 2147483647; expected at most 1073741824",
    ),
    "window_pattern": (
        "gemma3",
        assign("gemma3.attention.sliding_window_pattern", [True, False]),
        "sliding_window_pattern is [True, False]; expected",
    ),
    "window_pattern_text": (
        "gemma3",
        assign("gemma3.attention.sliding_window_pattern", "6"),
        "sliding_window_pattern is '6'",
    ),
    # --- sizes that contradict each other
    "value_length": ("llama", assign_all(attention__value_length=6), "expected the head size, 8"),
    "key_length": ("llama", assign_all(attention__key_length=6), "expected the head size, 6"),
    "odd_head": (
        "llama",
        assign_all(attention__key_length=7, attention__value_length=7),
        "head_size is 7",
    ),
    "heads_do_not_divide": ("llama", assign_all(attention__head_count_kv=3), "divide"),
    "huge_width": ("llama", assign_all(embedding_length=1 << 30), "has shape (263, 32)"),
    "huge_inner": ("llama", assign_all(feed_forward_length=1 << 30), "'blk.0.ffn_gate.weight'"),
    "huge_vocabulary": ("llama", assign_all(vocab_size=1 << 30), "'token_embd.weight' has shape"),
    "huge_layers": ("llama", assign_all(block_count=1 << 30), "block_count is 1073741824"),
    "more_layers": ("llama", assign_all(block_count=3), "'blk.2.attn_norm.weight' is missing"),
    "fewer_layers": ("llama", assign_all(block_count=1), "9 tensors have no place in a llama"),
    "more_turns": ("llama", assign_all(rope__dimension_count=16), "16 values of a head turn"),
    "odd_turns": ("llama", assign_all(rope__dimension_count=3), "3 values of a head turn"),
    "theta_one": ("llama", assign_all(rope__freq_base=1.0), "rotary positions is 1.0"),
    "epsilon_tiny": (
        "llama",
        assign_all(attention__layer_norm_rms_epsilon=1e-35),
        "norm_epsilon is",
    ),
    "flat_embedding": (
        "llama",
        tensor("token_embd.weight", np.ones(9, np.float32)),
        "not a matrix",
    ),
    "a_bias": (
        "llama",
        tensor("blk.0.attn_q.bias", np.ones(32, np.float32)),
        "'blk.0.attn_q.bias'",
    ),
    "integers": (
        "llama",
        tensor("blk.0.attn_norm.weight", np.ones(32, np.int32)),
        "'blk.0.attn_norm.weight' is stored as I32",
    ),
    "doubles": (
        "llama",
        tensor("blk.0.attn_norm.weight", np.ones(32, np.float64)),
        "'blk.0.attn_norm.weight' is stored as F64",
    ),
    # --- rotary positions
    "scaling_unknown": (
        "llama",
        assign_all(rope__scaling__type="x", rope__scaling__factor=2.0),
        "'x'",
    ),
    "scaling_number": (
        "llama",
        assign_all(rope__scaling__type=3, rope__scaling__factor=2.0),
        "is 3",
    ),
    "scaling_longrope": (
        "llama",
        assign_all(rope__scaling__type="longrope", rope__scaling__factor=2.0),
        "is 'longrope'; expected none, linear or yarn",
    ),
    "factor_without_type": ("llama", assign_all(rope__scaling__factor=4.0), "factor is 4.0, but"),
    "yarn_without_factor": ("llama", assign_all(rope__scaling__type="yarn"), "factor is 0.0"),
    **{
        f"{kind}_factor_{name}": (
            "llama",
            assign_all(rope__scaling__type=kind, rope__scaling__factor=value),
            f"rope.scaling.factor is {found}",
        )
        for kind in ("linear", "yarn")
        for name, value, found in (
            ("text", "4", "'4'; expected one number"),
            ("list", [4.0], "[4.0]; expected one number"),
            ("zero", 0.0, "0.0; expected > 0"),
            ("negative", -4.0, "-4.0; expected > 0"),
            ("nan", _NAN, "nan; expected one number"),
        )
    },
    "yarn_original_text": (
        "llama",
        assign_all(
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length="32",
        ),
        "original_context_length is '32'",
    ),
    "attn_factor_alone": (
        "llama",
        assign_all(rope__scaling__attn_factor=1.2),
        "attn_factor is 1.2",
    ),
    "attn_factor_negative": (
        "phi3",
        lambda metadata, tensors: (
            factors([1.0] * 4, [2.0] * 4)(metadata, tensors),
            metadata.update({"phi3.rope.scaling.attn_factor": -1.0}),
        ),
        "rope.scaling.attn_factor is -1.0; expected > 0",
    ),
    "freqs_short": ("llama", tensor("rope_freqs.weight", np.ones(3, np.float32)), "3 divisors"),
    "freqs_long": ("llama", tensor("rope_freqs.weight", np.ones(5, np.float32)), "5 divisors"),
    "freqs_matrix": (
        "llama",
        tensor("rope_freqs.weight", np.ones((2, 2), np.float32)),
        "'rope_freqs.weight' is of shape (2, 2)",
    ),
    "freqs_empty": (
        "llama",
        tensor("rope_freqs.weight", np.ones(0, np.float32)),
        "'rope_freqs.weight' is of shape (0,)",
    ),
    "freqs_many": (
        "llama",
        tensor("rope_freqs.weight", np.ones(10_000, np.float32)),
        "'rope_freqs.weight' is of shape (10000,)",
    ),
    "freqs_integers": ("llama", tensor("rope_freqs.weight", np.ones(4, np.int32)), "stored as I32"),
    **{
        f"freqs_{name}": (
            "llama",
            tensor("rope_freqs.weight", np.array([1.0, 2.0, 3.0, value], np.float32)),
            message,
        )
        for name, value, message in (
            ("zero", 0.0, "4 divisors factors of the rotary positions; expected 4, all > 0"),
            ("negative", -1.0, "expected 4, all > 0"),
            ("nan", _NAN, "expected 4, all > 0"),
            ("tiny", 1e-44, "are not finite"),
        )
    },
    "only_long_factors": ("phi3", factors(None, [2.0] * 4), "it holds rope_factors_long.weight"),
    "only_short_factors": ("phi3", factors([1.0] * 4, None), "it holds rope_factors_short.weight"),
    "freqs_and_factors": (
        "phi3",
        lambda metadata, tensors: (
            factors([1.0] * 4, [2.0] * 4)(metadata, tensors),
            tensor("rope_freqs.weight", np.ones(4, np.float32))(metadata, tensors),
        ),
        "it holds rope_freqs.weight, rope_factors_short.weight",
    ),
    "short_factors_short": ("phi3", factors([1.0] * 3, [2.0] * 4), "3 short factors"),
    "long_factors_zero": ("phi3", factors([1.0] * 4, [2.0, 0.0, 2.0, 2.0]), "4 long factors"),
    "long_factors_nan": ("phi3", factors([1.0] * 4, [2.0, _NAN, 2.0, 2.0]), "4 long factors"),
    **{
        f"longrope_original_{value}": (
            "phi3",
            lambda metadata, tensors, value=value: (
                factors([1.0] * 4, [2.0] * 4)(metadata, tensors),
                metadata.update({"phi3.rope.scaling.original_context_length": value}),
            ),
            f"original_context_length is {value}; expected",
        )
        for value in (0, 1, 129, 1 << 31, -1)
    },
    # --- the rest
    "template_number": ("llama", assign("tokenizer.chat_template", 3), "chat_template is 3"),
    "template_list": ("llama", assign("tokenizer.chat_template", ["x"]), "chat_template is ['x']"),
    "eos_beyond": ("llama", assign("tokenizer.ggml.eos_token_id", 263), "end-of-sequence id 263"),
    "eot_text": ("llama", assign("tokenizer.ggml.eot_token_id", "2"), "end-of-sequence id '2'"),
    "eom_list": ("llama", assign("tokenizer.ggml.eom_token_id", [2]), "end-of-sequence id [2]"),
    "tokenizer_missing": ("llama", drop("tokenizer.ggml.model"), "tokenizer.ggml.model is None"),
    "tokenizer_list": ("llama", assign("tokenizer.ggml.model", ["gpt2"]), "model is ['gpt2']"),
    "tokenizer_unknown": ("llama", assign("tokenizer.ggml.model", "bert"), "model is 'bert'"),
    "pre_unknown": ("llama", assign("tokenizer.ggml.pre", "default"), "pre is 'default'"),
    "pre_list": ("llama", assign("tokenizer.ggml.pre", ["smollm"]), "pre is ['smollm']"),
    "no_tokens": ("llama", drop("tokenizer.ggml.tokens"), "'tokenizer.ggml.tokens' is not a list"),
    "token_numbers": ("llama", assign("tokenizer.ggml.tokens", [3] * 263), "is not a list of str"),
    "same_tokens": ("llama", assign("tokenizer.ggml.tokens", ["a"] * 263), "1 of them distinct"),
    "few_types": (
        "llama",
        assign("tokenizer.ggml.token_type", [1] * 9),
        "9 tokenizer.ggml.token_ty",
    ),
    "merges_unknown": ("llama", assign("tokenizer.ggml.merges", ["q zz"]), "merges cannot be used"),
    "merges_text": ("llama", assign("tokenizer.ggml.merges", "h e"), "merges' is not a list"),
    "more_tokens": (
        "llama",
        lambda metadata, tensors: (
            metadata["tokenizer.ggml.tokens"].append("zz"),
            metadata["tokenizer.ggml.token_type"].append(1),
        ),
        "ids up to 263",
    ),
    "bos_beyond": (
        "llama",
        lambda metadata, tensors: metadata.update(
            {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 263}
        ),
        "'tokenizer.ggml.bos_token_id' is 263",
    ),
    "add_bos_text": ("llama", assign("tokenizer.ggml.add_bos_token", "yes"), "token' is 'yes'"),
}

CASES: Mapping[str, Case] = {**dict(_number_cases()), **dict(_tensor_cases()), **_OTHERS}
