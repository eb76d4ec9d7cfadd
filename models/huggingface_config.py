"""config.json of a Hugging Face folder as a ``TransformerConfig``: every key that changes the law.

The defaults of keys that are missing are those of transformers, a row's own in ``models.families``.
A key whose meaning the network does not have is refused: ignoring it would load another model.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import checkpoint, rotary
from models.config import TransformerConfig
from models.families import FAMILIES, Family
from models.json_file import brief, read_json
from models.rotary import Rotary

# Any other value than these would be ignored silently.
_NEUTRAL = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
    "quantization_config": (None,),
}
# The same, but for the families that read them (``Family.reads``).
_NEUTRAL_UNLESS_READ = {
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "layer_types": (None,),
    "partial_rotary_factor": (None, 1.0),
    "rope_local_base_freq": (None,),
    "query_pre_attn_scalar": (None,),
    "hidden_activation": (None,),
    "final_logit_softcapping": (None,),
}
# Keys that count although they stand beside text_config.
_OUTSIDE = ("tie_word_embeddings", "quantization_config")
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_MAX_LAYERS = 4096  # lists of a layer each are built from it before a tensor is seen


def read_config(folder: Path) -> TransformerConfig:
    """Reads config.json.

    Raises:
      FileNotFoundError: there is none.
      ValueError: naming the file and the key that is missing, absurd or not supported.
    """
    path = folder / "config.json"
    return parse_config(read_json(path), path)


def parse_config(values: Mapping[str, Any], path: object) -> TransformerConfig:
    """The same from the file's contents, which ``path`` names in messages."""
    model_type = values.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ValueError(
            f"{path}: model_type is {brief(model_type)}; supported are {', '.join(FAMILIES)}. Pass "
            "another model to --model"
        )
    if family.text_config:
        inner = values.get("text_config")
        if not isinstance(inner, dict):
            raise ValueError(f"{path}: text_config is {brief(inner)}; expected an object")
        inner_type = inner.get("model_type")
        if inner_type not in (None, f"{model_type}_text"):
            raise ValueError(
                f"{path}: model_type of text_config is {brief(inner_type)}; expected "
                f"{model_type}_text"
            )
        values = {key: values[key] for key in _OUTSIDE if values.get(key) is not None} | inner
    # A null is a value: Mistral's files switch the sliding window off with it.
    values = {**family.defaults, **values}
    unread = {key: _NEUTRAL_UNLESS_READ[key] for key in _NEUTRAL_UNLESS_READ.keys() - family.reads}
    for key, neutral in (_NEUTRAL | unread).items():
        if values.get(key) not in neutral:
            raise ValueError(f"{path}: {key} is {brief(values[key])}, which is not supported")

    def number(key: str, kind: type = int, default: float | None = None) -> Any:
        return checkpoint.read_number(values, key, kind, path, default, positive=True)

    width = number("hidden_size")
    num_heads = number("num_attention_heads")
    if values.get("head_dim") is None and width % num_heads:
        raise ValueError(
            f"{path}: hidden_size {width} is not a multiple of num_attention_heads {num_heads}"
        )
    head_size = number("head_dim", int, width // num_heads)
    num_layers = number("num_hidden_layers")
    if num_layers > _MAX_LAYERS:
        raise ValueError(f"{path}: num_hidden_layers is {num_layers}; expected <= {_MAX_LAYERS}")
    plain, sliding = _rotary_positions(values, family, head_size, path)
    is_gemma = "query_pre_attn_scalar" in family.reads
    sliding_layers = _sliding_layers(values, family, num_layers, path)
    return checkpoint.make_config(
        path,
        vocabulary_size=number("vocab_size"),
        num_layers=num_layers,
        embedding_size=width,
        num_heads=num_heads,
        num_kv_heads=number("num_key_value_heads", int, num_heads),
        head_size=head_size,
        feed_forward_size=number("intermediate_size"),
        context_length=number("max_position_embeddings"),
        norm_epsilon=number("rms_norm_eps", float),
        tied_head=_flag(values, "tie_word_embeddings", path),
        rotary=plain,
        sliding_rotary=sliding,
        family=model_type,
        attention_scale=number("query_pre_attn_scalar", float) ** -0.5 if is_gemma else None,
        embedding_scale=math.sqrt(width) if is_gemma else 1.0,
        logit_softcap=None
        if values.get("final_logit_softcapping") is None
        else number("final_logit_softcapping", float),
        sliding_window=number("sliding_window") if any(sliding_layers) else None,
        sliding_layers=sliding_layers,
        **{**family.traits, "activation": _activation(values, path)},
    )


def _flag(values: Mapping[str, Any], key: str, path: object, default: bool | None = None) -> bool:
    value = values.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise ValueError(f"{path}: {key} is {brief(value)}; expected true or false")
    return value


def _activation(values: Mapping[str, Any], path: object) -> str:
    # Gemma's files may name it twice: there the first key counts.
    for key in ("hidden_activation", "hidden_act"):
        if key in values:
            name = values[key]
            if not isinstance(name, str) or name not in _ACTIVATIONS:
                raise ValueError(
                    f"{path}: {key} is {brief(name)}; expected one of {', '.join(_ACTIVATIONS)}"
                )
            return _ACTIVATIONS[name]
    raise ValueError(f"{path}: hidden_act is missing")


def _sliding_layers(
    values: Mapping[str, Any], family: Family, num_layers: int, path: object
) -> tuple[bool, ...]:
    """A flag a layer, or none at all where no layer slides."""
    listed = values.get("layer_types")
    if listed is not None:
        names = ("full_attention", "sliding_attention")
        if not isinstance(listed, list) or any(name not in names for name in listed):
            raise ValueError(f"{path}: layer_types is {brief(listed)}; expected a list of {names}")
        if len(listed) != num_layers:
            raise ValueError(
                f"{path}: layer_types has {len(listed)} entries; expected num_hidden_layers, "
                f"{num_layers}"
            )
        flags = [name == "sliding_attention" for name in listed]
        if any(flags) and "use_sliding_window" in family.reads:
            slides = _flag(values, "use_sliding_window", path, False)
            if not slides:
                raise ValueError(
                    f"{path}: layer_types lists sliding_attention, but use_sliding_window is not "
                    "true; expected both or none"
                )
    elif values.get("sliding_window") is None:
        flags = []
    elif family.window == "all":
        flags = [True] * num_layers
    elif family.window == "from max_window_layers":
        first = checkpoint.read_number(values, "max_window_layers", int, path)
        if first < 0:
            raise ValueError(f"{path}: max_window_layers is {first}; expected >= 0")
        slides = _flag(values, "use_sliding_window", path, False)
        flags = [slides and layer >= first for layer in range(num_layers)]
    else:
        every = checkpoint.read_number(values, "sliding_window_pattern", int, path, positive=True)
        flags = [(layer + 1) % every != 0 for layer in range(num_layers)]
    return tuple(flags) if any(flags) else ()


def _rotary_positions(
    values: Mapping[str, Any], family: Family, head_size: int, path: object
) -> tuple[Rotary, Rotary | None]:
    """Rotary positions of the plain layers, and of the sliding ones where those differ."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):  # transformers 5 writes the latter
        found = values.get(key)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise ValueError(f"{path}: {key} is {brief(found)}; expected an object")
        rope = found
    kinds = ("full_attention", "sliding_attention")
    nested = any(kind in rope for kind in kinds)
    if "rope_local_base_freq" not in values:
        if nested:
            raise ValueError(
                f"{path}: the rotary positions are {brief(rope)}; expected the same for all layers "
                f"of a {values['model_type']} model"
            )
        return _read_rotary(values, rope, family, head_size, path), None
    parts: list[Any] = [rope.get(kind) for kind in kinds] if nested else [rope, {}]
    for kind, found in zip(kinds, parts, strict=True):
        if not isinstance(found, dict):
            raise ValueError(f"{path}: {kind} is {brief(found)}; expected an object")
    base = checkpoint.read_number(values, "rope_local_base_freq", float, path, positive=True)
    return (
        _read_rotary(values, parts[0], family, head_size, path),
        _read_rotary({**values, "rope_theta": base}, parts[1], family, head_size, path),
    )


def _read_rotary(
    values: Mapping[str, Any],
    rope: Mapping[str, Any],
    family: Family,
    head_size: int,
    path: object,
) -> Rotary:
    # A row's default stands behind what either place says.
    merged = {**values, **{key: value for key, value in rope.items() if value is not None}}
    original = "original_max_position_embeddings"
    if original in values:  # Phi keeps it beside the scaling, and there it counts
        merged[original] = values[original]

    def number(key: str, kind: type = float, default: float | None = None) -> Any:
        return checkpoint.read_number(merged, key, kind, path, default, positive=True)

    share = number("partial_rotary_factor", float, 1.0)
    size = int(head_size * share)
    scaling = _read_scaling(merged, rope, number, path)
    context = number("max_position_embeddings", int)
    return Rotary(
        theta=float(number("rope_theta")),
        size=None if size == head_size else size,
        scaling=scaling,
        yarn_beyond=context if family.extends_by_yarn and scaling is None else None,
    )


def _read_scaling(
    merged: Mapping[str, Any], rope: Mapping[str, Any], number, path: object
) -> rotary.Scaling | None:
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("su", "yarn") and "short_factor" in rope:
        kind = "longrope"  # what Phi-3's first files called it
    stretches = "factor" in rope or "short_factor" in rope
    if kind == "default" or (kind is None and not stretches):
        return None
    if kind == "linear":
        return rotary.Linear(float(number("factor")))
    context = number("max_position_embeddings", int)
    original = number("original_max_position_embeddings", int, context)
    if original < 2:
        raise ValueError(f"{path}: original_max_position_embeddings is {original}; expected >= 2")
    if kind == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if not low < high:
            raise ValueError(
                f"{path}: low_freq_factor {low} and high_freq_factor {high}; expected low < high"
            )
        return rotary.Llama3(float(number("factor")), low, high, original)
    if kind == "yarn":
        factor = float(number("factor", float, context / original))
        return rotary.Yarn(
            factor,
            original,
            beta_fast=float(number("beta_fast", float, 32.0)),
            beta_slow=float(number("beta_slow", float, 1.0)),
            attention_factor=_yarn_attention_factor(merged, factor, number, path),
            truncate=_flag(rope, "truncate", path, True),
        )
    if kind == "longrope":
        factor = float(number("factor", float, context / original))
        # LongRoPE, as transformers has it: sqrt(1 + log(factor) / log(original)).
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return rotary.LongRope(
            short=_factors(rope, "short_factor", path),
            long=_factors(rope, "long_factor", path),
            original_length=original,
            attention_factor=float(number("attention_factor", float, attention)),
        )
    raise ValueError(
        f"{path}: rope_type is {brief(kind)}; expected default, linear, llama3, yarn or longrope"
    )


def _yarn_attention_factor(
    merged: Mapping[str, Any], factor: float, number, path: object
) -> float | None:
    if merged.get("attention_factor") is not None:
        return float(number("attention_factor"))
    weight, all_dimensions = (
        checkpoint.read_number(merged, key, float, path, 0.0)
        for key in ("mscale", "mscale_all_dim")
    )
    if min(weight, all_dimensions) < 0:
        raise ValueError(
            f"{path}: mscale is {weight} and mscale_all_dim {all_dimensions}; expected >= 0"
        )
    if not (weight and all_dimensions):
        return None
    ratio = rotary.yarn_attention_factor
    return ratio(factor, weight) / ratio(factor, all_dimensions)


def _factors(rope: Mapping[str, Any], key: str, path: object) -> tuple[float, ...]:
    values = rope.get(key)
    if not isinstance(values, list) or not values:
        raise ValueError(f"{path}: {key} is {brief(values)}; expected a list of numbers")
    return tuple(
        float(checkpoint.read_number({key: value}, key, float, path, positive=True))
        for value in values
    )
