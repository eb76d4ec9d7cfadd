"""Bad config.json: ``name -> (family, what is done to a good one, part of the message)``.

A change is a function on the text model's settings, which it changes in place.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from models.families import FAMILIES
from tests import tiny_families

Case = tuple[str, Callable[[dict[str, Any]], Any], str]
_NAN, _INFINITY = float("nan"), float("inf")
_HUGE = 10**300  # a JSON integer has no bound
_DEEP: list[Any] = []
for _ in range(300):
    _DEEP = [_DEEP]


def assign(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """Returns a change that sets one key."""
    return lambda values: values.__setitem__(key, value)


def drop(key: str) -> Callable[[dict[str, Any]], Any]:
    """Returns a change that removes one key."""
    return lambda values: values.pop(key)


def rope(key: str, value: Any, inner: str | None = None) -> Callable[[dict[str, Any]], None]:
    """Returns a change that sets one key of the rotary positions; None as a value drops it."""

    def change(values: dict[str, Any]) -> None:
        name = "rope_parameters" if "rope_parameters" in values else "rope_scaling"
        scaling = dict(values[name])
        if inner is not None:
            part = scaling[inner] = dict(scaling[inner])
        else:
            part = scaling
        part.pop(key, None)
        if value is not None:
            part[key] = value
        values[name] = scaling

    return change


_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "head_dim",
    "sliding_window",
)
_NUMBERS = (
    "rms_norm_eps",
    "rope_theta",
    "partial_rotary_factor",
    "rope_local_base_freq",
    "query_pre_attn_scalar",
    "final_logit_softcapping",
)
# name: (value, what the message says of it)
_ILL_TYPED = {
    "text": ("8", "'8'; expected one number"),
    "bool": (True, "True; expected one number"),
    "list": ([8], "[8]; expected one number"),
    "object": ({"8": 8}, "{'8': 8}; expected one number"),
    "nan": (_NAN, "nan; expected one number"),
    "infinity": (-_INFINITY, "-inf; expected one number"),
    "huge": (_HUGE, "1000000000000000"),
    "deep": (_DEEP, "[[[...]]]; expected one number"),
    "zero": (0, "0; expected > 0"),
    "negative": (-8, "-8; expected > 0"),
}
_FRACTION = {"fraction": (8.5, "8.5; expected one number (int")}
# Without a default, in every family but Gemma 3.
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


def _number_cases() -> Iterator[tuple[str, Case]]:
    """Every number of every family: all kinds of nonsense in one, the next kind in the others."""
    seen: set[str] = set()
    turn = 0
    for family in FAMILIES:
        values = tiny_families.settings(tiny_families.CONFIGS[family])
        for key in (*_INTEGERS, *_NUMBERS):
            if key not in values or (family == "qwen3" and key == "sliding_window"):
                continue
            kinds = _ILL_TYPED | (_FRACTION if key in _INTEGERS else {})
            names = list(kinds)
            turn += 1
            chosen = [names[turn % len(names)]] if key in seen else names
            seen.add(key)
            for name in chosen:
                value, found = kinds[name]
                if key == "rope_theta" and "full_attention" in values.get("rope_parameters", {}):
                    continue
                yield f"{family}_{key}_{name}", (family, assign(key, value), f"{key} is {found}")
        if not family.startswith("gemma3"):
            for key in _REQUIRED:
                yield f"{family}_no_{key}", (family, drop(key), f"{key} is missing")


def _rope_cases() -> Iterator[tuple[str, Case]]:
    numbers = {
        "llama": ("factor", "low_freq_factor", "high_freq_factor"),
        "qwen2": ("factor", "beta_fast", "beta_slow", "attention_factor"),
        "phi3": ("attention_factor",),
    }
    for family, keys in numbers.items():
        for key in keys:
            for name in ("text", "list", "nan", "huge", "zero", "negative"):
                value, found = _ILL_TYPED[name]
                yield f"{family}_rope_{key}_{name}", (family, rope(key, value), f"{key} is {found}")
    for key in numbers["llama"]:
        yield f"llama_rope_no_{key}", ("llama", rope(key, None), f"{key} is missing")
    original = "original_max_position_embeddings"
    for family in ("llama", "qwen2"):
        for name, value in {"0": 0, "1": 1, "huge": 1 << 31, "text": "32", "half": 2.5}.items():
            yield (
                f"{family}_rope_original_{name}",
                (family, rope(original, value), f"{original} is {value!r}"),
            )
    for key in ("short_factor", "long_factor"):
        for name, value, message in (
            ("missing", None, "None; expected a list"),
            ("empty", [], "[]; expected a list"),
            ("number", 2.0, "2.0; expected a list"),
            ("object", {"0": 1.0}, "{'0': 1.0}; expected a list"),
            ("texts", ["1", "2"], "'1'; expected one number"),
            ("lists", [[1.0, 2.0]], "[1.0, 2.0]; expected one number"),
            ("nan", [1.0, _NAN], "nan; expected one number"),
            ("zero", [1.0, 0.0], "0.0; expected > 0"),
            ("negative", [-1.0, 1.0], "-1.0; expected > 0"),
            ("bool", [True, 1.0], "True; expected one number"),
        ):
            yield f"phi3_{key}_{name}", ("phi3", rope(key, value), f"{key} is {message}")
        for count in (1, 3, 100_000):
            message = f"{count} {key.removesuffix('_factor')} factors"
            yield f"phi3_{count}_of_{key}", ("phi3", rope(key, [1.0] * count), message)


_OTHERS: Mapping[str, Case] = {
    # --- what kind of model it is
    "model_type": ("llama", assign("model_type", "mamba"), "model_type is 'mamba'; supported are"),
    "model_type_number": ("llama", assign("model_type", 3), "model_type is 3"),
    "model_type_list": ("llama", assign("model_type", ["llama"]), "model_type is ['llama']"),
    "model_type_long": ("llama", assign("model_type", "x" * 3_000_000), "model_type is 'xxx"),
    "model_type_lines": ("llama", assign("model_type", "a\nb\x1b[2J"), r"'a\nb\x1b[2J'"),
    "model_type_surrogate": ("llama", assign("model_type", "\ud800"), r"is '\ud800'"),
    "no_model_type": ("llama", drop("model_type"), "model_type is None"),
    "remote_code": (
        "llama",
        lambda values: values.update(
            model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"}
        ),
        "model_type is 'own'",
    ),
    "remote_code_elsewhere": (
        "llama",
        lambda values: values.update(
            model_type="../own", auto_map={"AutoModelForCausalLM": "../own--modeling.Own"}
        ),
        "model_type is '../own'",
    ),
    # --- sizes that contradict each other
    "heads_do_not_divide": ("llama", assign("num_key_value_heads", 3), "num_kv_heads 3"),
    "more_kv_heads": ("mistral", assign("num_key_value_heads", 8), "num_kv_heads 8"),
    "width_not_a_multiple": (
        "qwen2",
        assign("hidden_size", 33),
        "hidden_size 33 is not a multiple",
    ),
    "odd_head": ("llama", assign("head_dim", 7), "head_size is 7"),
    "head_of_one": ("llama", assign("head_dim", 1), "head_size is 1;"),
    "absurd_head": ("phi3", assign("head_dim", 1 << 30), "head_size is 1073741824"),
    "absurd_heads": ("llama", assign("num_attention_heads", 1 << 30), "has shape (32, 32)"),
    "absurd_width": ("llama", assign("hidden_size", 1 << 30), "has shape (263, 32)"),
    "absurd_inner": ("llama", assign("intermediate_size", 1 << 30), "gate_proj.weight' has shape"),
    "absurd_layers": ("llama", assign("num_hidden_layers", 1 << 30), "num_hidden_layers is 1073"),
    "many_layers": ("llama", assign("num_hidden_layers", 4096), "4096 layers, but only 21 tensors"),
    "more_layers": ("llama", assign("num_hidden_layers", 3), "'model.layers.2.input_layernorm"),
    "fewer_layers": ("llama", assign("num_hidden_layers", 1), "9 tensors have no place"),
    "absurd_vocabulary": ("llama", assign("vocab_size", 1 << 30), "'model.embed_tokens.weight'"),
    "small_vocabulary": ("llama", assign("vocab_size", 200), "ids up to 262"),
    "epsilon_beyond_float32": ("llama", assign("rms_norm_eps", 1e-300), "norm_epsilon is 1e-300"),
    "scalar_beyond_float32": (
        "gemma3_text",
        assign("query_pre_attn_scalar", 1e-300),
        "attention_scale is",
    ),
    "softcap_beyond_float32": (
        "gemma3",
        assign("final_logit_softcapping", 1e-200),
        "logit_softcap is 1e-200",
    ),
    # --- switches
    "attention_bias": ("llama", assign("attention_bias", True), "attention_bias is True"),
    "attention_bias_text": ("llama", assign("attention_bias", "false"), "attention_bias is 'fals"),
    "mlp_bias": ("llama", assign("mlp_bias", True), "mlp_bias is True"),
    "bidirectional": (
        "gemma3_text",
        assign("use_bidirectional_attention", True),
        "use_bidirectional_attention is True",
    ),
    "attention_softcap": (
        "gemma3_text",
        assign("attn_logit_softcapping", 50.0),
        "attn_logit_softcapping is 50.0",
    ),
    "quantised": ("llama", assign("quantization_config", {"bits": 4}), "quantization_config is {"),
    "quantised_text": (
        "gemma3",
        assign("quantization_config", "int4"),
        "quantization_config is 'i",
    ),
    "tied_text": ("llama", assign("tie_word_embeddings", "true"), "tie_word_embeddings is 'true'"),
    "tied_number": ("gemma3_text", assign("tie_word_embeddings", 1), "tie_word_embeddings is 1"),
    "tied_null": ("qwen2", assign("tie_word_embeddings", None), "tie_word_embeddings is None"),
    "untied_without_head": (
        "gemma3",
        assign("tie_word_embeddings", False),
        "'lm_head.weight' is m",
    ),
    "activation": ("llama", assign("hidden_act", "gelu"), "hidden_act is 'gelu'"),
    "activation_list": ("llama", assign("hidden_act", ["silu"]), "hidden_act is ['silu']"),
    "activation_null": ("phi3", assign("hidden_act", None), "hidden_act is None"),
    "gemma_activation": ("gemma3", assign("hidden_activation", "relu"), "hidden_activation is 're"),
    "use_window_text": ("qwen2", assign("use_sliding_window", "true"), "use_sliding_window is 'tr"),
    # --- sliding layers
    "window_layers_negative": ("qwen2", assign("max_window_layers", -1), "max_window_layers is -1"),
    "window_layers_text": ("qwen2", assign("max_window_layers", "1"), "max_window_layers is '1'"),
    "window_missing": (
        "gemma3_text",
        lambda values: values.update(sliding_window=None, layer_types=["sliding_attention"] * 7),
        "sliding_window is missing",
    ),
    "window_overflow": (
        "mistral",
        assign("sliding_window", (1 << 31) - 1),
        "sliding_window is 2147483647; expected at most 1073741824",
    ),
    "pattern_zero": ("gemma3", assign("sliding_window_pattern", 0), "sliding_window_pattern is 0"),
    "pattern_text": ("gemma3", assign("sliding_window_pattern", "6"), "window_pattern is '6'"),
    "pattern_null": ("gemma3", assign("sliding_window_pattern", None), "pattern is missing"),
    "layer_types_text": ("mistral", assign("layer_types", "full_attention"), "layer_types is 'ful"),
    "layer_types_object": ("mistral", assign("layer_types", {}), "layer_types is {}"),
    "layer_types_unknown": ("qwen3", assign("layer_types", ["chunked"] * 2), "['chunked', 'chunk"),
    "layer_types_numbers": ("qwen3", assign("layer_types", [0, 1]), "layer_types is [0, 1]"),
    "layer_types_lists": ("qwen3", assign("layer_types", [[], []]), "layer_types is [[], []]"),
    "layer_types_short": (
        "qwen2",
        assign("layer_types", ["sliding_attention"]),
        "layer_types has 1 entries; expected num_hidden_layers, 2",
    ),
    "layer_types_long": (
        "gemma3_text",
        assign("layer_types", ["full_attention"] * 100_000),
        "layer_types has 100000 entries",
    ),
    # --- rotary positions
    "rope_text": ("llama", assign("rope_scaling", "yarn"), "rope_scaling is 'yarn'"),
    "rope_list": ("llama", assign("rope_scaling", [1]), "rope_scaling is [1]"),
    "rope_number": ("qwen2", assign("rope_parameters", 4.0), "rope_parameters is 4.0"),
    "rope_unknown": ("llama", rope("rope_type", "dynamic"), "rope_type is 'dynamic'"),
    "rope_type_list": ("llama", rope("rope_type", ["llama3"]), "rope_type is ['llama3']"),
    "rope_type_number": ("phi3", rope("rope_type", 3), "rope_type is 3"),
    "rope_without_type": ("llama", rope("rope_type", None), "rope_type is None"),
    "old_rope_type": (
        "qwen3",
        assign("rope_scaling", {"type": "mrope", "factor": 2.0}),
        "rope_type is 'mrope'",
    ),
    "linear_without_factor": (
        "llama",
        assign("rope_scaling", {"type": "linear"}),
        "factor is missing",
    ),
    "linear_beyond_float32": (
        "llama",
        assign("rope_scaling", {"type": "linear", "factor": 1e-300}),
        "are not finite",
    ),
    "longrope_without_factors": (
        "phi3",
        assign("rope_scaling", {"type": "longrope"}),
        "short_factor is None",
    ),
    "longrope_beyond_float32": ("phi3", rope("long_factor", [1e-200, 1.0]), "are not finite"),
    "low_above_high": ("llama", rope("low_freq_factor", 4.0), "expected low < high"),
    "truncate_text": ("qwen2", rope("truncate", "no"), "truncate is 'no'"),
    "mscale_negative": (
        "qwen2",
        lambda values: (rope("mscale", 1.0)(values), rope("mscale_all_dim", -7.2)(values)),
        "mscale_all_dim -7.2",
    ),
    "theta_one": ("mistral", assign("rope_theta", 1.0), "base of the rotary positions is 1.0"),
    "theta_in_rope": ("qwen2", rope("rope_theta", "1e6"), "rope_theta is '1e6'"),
    "partial_above_one": ("phi3", assign("partial_rotary_factor", 2.0), "16 values of a head turn"),
    "partial_odd": ("phi3", assign("partial_rotary_factor", 0.4), "3 values of a head turn"),
    "partial_tiny": ("phi3", assign("partial_rotary_factor", 0.01), "0 values of a head turn"),
    "phi_original_zero": ("phi3", assign("original_max_position_embeddings", 0), "embeddings is 0"),
    "phi_original_one": ("phi3", assign("original_max_position_embeddings", 1), "embeddings is 1"),
    "nested_without_need": (
        "llama",
        assign("rope_scaling", {"full_attention": {"rope_type": "yarn", "factor": 2.0}}),
        "expected the same for all layers",
    ),
    "nested_number": ("gemma3_text", rope("full_attention", 3), "full_attention is 3"),
    "nested_list": ("gemma3_text", rope("sliding_attention", []), "sliding_attention is []"),
    "nested_full_missing": ("gemma3_text", rope("full_attention", None), "full_attention is None"),
    "nested_local_missing": (
        "gemma3_text",
        rope("sliding_attention", None),
        "sliding_attention is None",
    ),
    "nested_factor": ("gemma3_text", rope("factor", 0, "full_attention"), "factor is 0"),
    "nested_theta": (
        "gemma3_text",
        rope("rope_theta", -1, "sliding_attention"),
        "rope_theta is -1",
    ),
    "nested_type": ("gemma3_text", rope("rope_type", "x", "sliding_attention"), "rope_type is 'x'"),
}

CASES: Mapping[str, Case] = {**dict(_number_cases()), **dict(_rope_cases()), **_OTHERS}
