"""Every family against transformers: tiny random models, saved by it and loaded by us.

Weights are drawn large, so that a trait left out moves the logits by far more than the tolerance.
"""

import dataclasses
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from models import load
from models.config import TransformerConfig
from models.language_model import build_language_model
from tests import tiny_checkpoints, tiny_ggufs
from tests.test_transformer import logits_through_cache

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VOCABULARY = tuple("abcdefghijk")  # V = 11
NUM_TOKENS = 40
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 300.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}


def longrope(pairs: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 80.0,
        "short_factor": [1.0 + 0.1 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 0.9 * pair for pair in range(pairs)],
    }


def shape(width: int, heads: int, kv_heads: int, head_size: int | None = None) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return sizes if head_size is None else sizes | {"head_dim": head_size}


GEMMA_ROPE = {
    "full_attention": {**LINEAR, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
}
# name: (transformers' class, its settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_grouped": ("Llama", shape(24, 6, 2, 4)),
    "llama_one_kv_head_llama3": ("Llama", shape(20, 5, 1, 6) | {"rope_parameters": LLAMA3}),
    "llama_tied_linear": (
        "Llama",
        shape(24, 3, 3, 8) | {"rope_parameters": LINEAR, "tie_word_embeddings": True},
    ),
    "llama_yarn": ("Llama", shape(24, 3, 1, 8) | {"rope_parameters": YARN}),
    "llama_yarn_factors": (
        "Llama",
        shape(32, 4, 2)
        | {
            "rope_parameters": YARN
            | {"mscale": 0.7, "mscale_all_dim": 0.4, "beta_fast": 8.0, "beta_slow": 0.5}
        },
    ),
    "mistral_window": ("Mistral", shape(24, 6, 2, 4) | {"sliding_window": 7}),
    "mistral_long_window": ("Mistral", shape(20, 5, 5, 4) | {"sliding_window": 200}),
    "mistral_no_window": ("Mistral", shape(24, 3, 1, 8) | {"sliding_window": None}),
    "qwen2_grouped": ("Qwen2", shape(24, 6, 2)),
    "qwen2_tied": ("Qwen2", shape(20, 5, 1) | {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        shape(24, 3, 3) | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2_yarn": ("Qwen2", shape(32, 4, 2) | {"rope_parameters": YARN}),
    "qwen3_grouped": ("Qwen3", shape(24, 6, 2, 4)),
    "qwen3_one_kv_head_tied": (
        "Qwen3",
        shape(20, 5, 1, 6) | {"tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "qwen3_not_grouped": ("Qwen3", shape(24, 3, 3, 10)),
    "phi3_plain": ("Phi3", shape(24, 6, 6) | {"sliding_window": 9}),
    "phi3_partial": (
        "Phi3",
        shape(32, 4, 2) | {"rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 99.0}},
    ),
    "phi3_short_factors": (
        "Phi3",
        shape(40, 5, 1)
        | {
            "original_max_position_embeddings": 48,
            "rope_parameters": longrope(3) | {"partial_rotary_factor": 0.75},
            "tie_word_embeddings": True,
        },
    ),
    "phi3_long_factors": (
        "Phi3",
        shape(32, 4, 2) | {"original_max_position_embeddings": 16, "rope_parameters": longrope(4)},
    ),
    "gemma3_grouped": (
        "Gemma3",
        shape(24, 4, 1, 8)
        | {"sliding_window": 6, "query_pre_attn_scalar": 5, "rope_parameters": GEMMA_ROPE},
    ),
    "gemma3_softcap": (
        "Gemma3",
        shape(20, 5, 5, 4)
        | {"sliding_window": 11, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 4},
    ),
    "gemma3_untied": (
        "Gemma3",
        shape(24, 6, 2, 6)
        | {"sliding_window": 4, "tie_word_embeddings": False, "query_pre_attn_scalar": 24},
    ),
}


def prefilled(model, params, tokens: np.ndarray) -> dict[int, np.ndarray]:
    """Logits [B, V] after prompts of several lengths, by length."""
    prefill = jax.jit(model.prefill)
    cache = model.init_cache(*tokens.shape)
    count = tokens.shape[1]
    found = {}
    for length in sorted({1, 2, 7, 16, min(33, count), count}):
        lengths = jnp.full(len(tokens), length, jnp.int32)
        found[length] = prefill(params, jnp.asarray(tokens, jnp.int32), lengths, cache)[0]
    return found


def largest_difference(model, params, tokens: np.ndarray, expected: np.ndarray) -> float:
    """Of the logits after prompts of several lengths from ``expected`` [B, T, V]."""
    found = prefilled(model, params, tokens)
    return max(np.abs(logits - expected[:, n - 1]).max() for n, logits in found.items())


def build_reference(family: str, settings: dict[str, Any]):
    """A random model of transformers; the same weights for the same shapes."""
    config_class = f"{family}TextConfig" if family == "Gemma3" else f"{family}Config"
    num_layers = 7 if family == "Gemma3" else 2  # Gemma's pattern repeats after six
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(
        **{
            "vocab_size": len(VOCABULARY),
            "num_hidden_layers": num_layers,
            "intermediate_size": 22,
            "max_position_embeddings": 64,
            "rms_norm_eps": 1e-3,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **settings,
        }
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, 0.4)
            if "norm" in name and family != "Gemma3":
                parameter += 1.0
    return model


def save(folder, reference):
    reference.save_pretrained(folder)
    tiny_checkpoints.make_tokenizer(VOCABULARY).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 11, (3, NUM_TOKENS))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory, tokens):
    """The model as our reader loads it, and transformers' logits in float32 and bfloat16."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = build_reference(*CASES[request.param])
    save(folder, theirs)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens), use_cache=False).logits.numpy()
        rounded = theirs.bfloat16()(torch.tensor(tokens), use_cache=False).logits.float().numpy()
    loaded = load.fit_length(load.load_model(folder, dtype="float32"), NUM_TOKENS)
    return loaded, expected, rounded


def test_logits_are_those_of_transformers(case, tokens):
    loaded, expected, _ = case
    assert np.abs(expected).max() > 1.0
    assert largest_difference(loaded.language_model, loaded.params, tokens, expected) <= 1e-3


def test_decoding_through_the_cache_gives_the_same(case, tokens):
    loaded, expected, _ = case
    found = logits_through_cache(loaded.language_model, loaded.params, tokens, [1, 17, 30])
    assert (np.isfinite(found).sum(axis=(1, 2)) == 11 * (NUM_TOKENS - np.array([0, 16, 29]))).all()
    assert np.nanmax(np.abs(found - expected)) <= 1e-3


def test_bfloat16_is_within_its_rounding(case, tokens):
    """Root-mean-square error at most 1.5 times that of transformers in bfloat16."""
    loaded, expected, rounded = case
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), loaded.params)
    model = build_language_model(loaded.config, jnp.bfloat16, needed_length=NUM_TOKENS)
    ours, theirs = [], []
    for length, logits in prefilled(model, narrow, tokens).items():
        ours.append(np.square(logits - expected[:, length - 1]).mean())
        theirs.append(np.square(rounded[:, length - 1] - expected[:, length - 1]).mean())
    assert 0 < np.mean(ours) < 1.5**2 * np.mean(theirs)


TRAITS = {
    # case: a trait whose neutral value must move the logits
    "llama_one_kv_head_llama3": {"rotary"},
    "llama_yarn": {"rotary"},
    "mistral_window": {"sliding_layers"},
    "qwen2_window": {"sliding_layers"},
    "phi3_partial": {"rotary"},
    "phi3_long_factors": {"rotary"},
    "gemma3_grouped": {"sliding_rotary", "activation", "attention_scale", "embedding_scale"},
    "gemma3_softcap": {"logit_softcap", "norm_offset"},
}


def test_no_trait_is_idle(case, tokens, request):
    """A mutant for each trait: without it the logits are others."""
    loaded, expected, _ = case
    name = request.node.callspec.params["case"]
    plain = {field.name: field.default for field in dataclasses.fields(TransformerConfig)}
    plain["rotary"] = dataclasses.replace(loaded.config.rotary, scaling=None, size=None)
    for trait in TRAITS.get(name, ()):
        config = dataclasses.replace(loaded.config, **{trait: plain[trait]})
        model = build_language_model(config, jnp.float32, needed_length=NUM_TOKENS)
        assert largest_difference(model, loaded.params, tokens, expected) > 1e-2, trait


def test_qwen_beyond_its_context_uses_yarn(tmp_path, tokens):
    """As the paper runs Qwen2.5-Math-7B: factor = needed length / context."""
    settings = shape(24, 6, 2) | {"max_position_embeddings": 16}
    loaded = load.load_model(save(tmp_path, build_reference("Qwen2", settings)), dtype="float32")
    assert loaded.config.longest_length == np.inf
    plain, extended = load.fit_length(loaded, 16), load.fit_length(loaded, NUM_TOKENS)
    assert plain.language_model is loaded.language_model
    yarn = {
        "rope_type": "yarn",
        "rope_theta": loaded.config.rotary.theta,
        "factor": NUM_TOKENS / 16,
        "original_max_position_embeddings": 16,
    }
    for model, rope, count in ((plain, {}, 16), (extended, {"rope_parameters": yarn}, NUM_TOKENS)):
        theirs = build_reference("Qwen2", settings | rope)
        with torch.no_grad():
            expected = theirs(torch.tensor(tokens[:, :count]), use_cache=False).logits.numpy()
        part = tokens[:, :count]
        assert largest_difference(model.language_model, model.params, part, expected) <= 1e-3


def test_phi_takes_the_long_factors_by_the_needed_length(tmp_path, tokens):
    """Up to the original length the short factors hold, whatever the model could do."""
    reference = build_reference(*CASES["phi3_long_factors"])
    loaded = load.load_model(save(tmp_path / "phi", reference), dtype="float32")
    short = load.fit_length(loaded, 16)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens[:, :16]), use_cache=False).logits.numpy()
    part = tokens[:, :16]
    assert largest_difference(short.language_model, short.params, part, expected) <= 1e-3
    assert largest_difference(loaded.language_model, loaded.params, part, expected) > 1e-2


def test_gemma_that_reads_images_is_read_for_its_text(tmp_path, tokens):
    """The larger Gemma 3 keep the text model under a prefix, beside a vision tower."""
    folder = save(tmp_path / "gemma", build_reference(*CASES["gemma3_grouped"]))
    config = tiny_checkpoints.read_json(folder / "config.json")
    text_loaded = load.load_model(folder, dtype="float32")
    tiny_checkpoints.write_json(
        folder / "config.json", {"model_type": "gemma3", "text_config": config}
    )
    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    for prefix in ("language_model.", "model.language_model."):
        inner = {
            prefix + (name if prefix == "language_model." else name.removeprefix("model.")): leaf
            for name, leaf in weights.items()
        }
        inner["vision_tower.patch.weight"] = np.ones((2, 3), np.float32)
        safetensors.numpy.save_file(inner, folder / "model.safetensors")
        loaded = load.load_model(folder, dtype="float32")
        jax.tree.map(np.testing.assert_array_equal, loaded.params, text_loaded.params)
    assert dataclasses.replace(loaded.config, family="gemma3_text") == text_loaded.config


GGUF_CASES = (
    "llama_grouped",
    "llama_one_kv_head_llama3",
    "llama_tied_linear",
    "llama_yarn",
    "qwen2_grouped",
    "qwen2_tied",
    "qwen2_yarn",
    "qwen3_grouped",
    "qwen3_not_grouped",
    "phi3_plain",
    "phi3_partial",
    "phi3_short_factors",
    "phi3_long_factors",
    "gemma3_grouped_default_scale",
    "gemma3_softcap",
)
# llama.cpp has Gemma's scale and local base as constants, so that only they can be written.
CASES_OF_GGUF = CASES | {
    "gemma3_grouped_default_scale": (
        "Gemma3",
        shape(24, 4, 1, 8)
        | {
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "rope_parameters": GEMMA_ROPE
            | {"sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}},
        },
    )
}


@pytest.mark.parametrize("name", GGUF_CASES)
def test_gguf_gives_the_same_logits(tmp_path, tokens, name):
    reference = build_reference(*CASES_OF_GGUF[name])
    path = tiny_ggufs.write_gguf_of(tmp_path / "tiny.gguf", reference, VOCABULARY)
    loaded = load.fit_length(load.load_model(path, dtype="float32"), NUM_TOKENS)
    with torch.no_grad():
        expected = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
    assert largest_difference(loaded.language_model, loaded.params, tokens, expected) <= 1e-3


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Phi3", "Gemma3"])
def test_quantised_gguf_gives_the_logits_of_its_own_weights(tmp_path, tokens, family):
    """Q8_0: the same logits as transformers with the weights that the file can hold."""
    sizes = shape(64, 4, 2, 32) | {"intermediate_size": 96, "query_pre_attn_scalar": 32}
    if family == "Phi3":  # transformers derives its heads from the width
        sizes |= {"num_attention_heads": 2, "head_dim": 32}
    sizes = sizes if family == "Gemma3" else {**sizes, "query_pre_attn_scalar": None}
    reference = build_reference(family, sizes | {"tie_word_embeddings": True})
    kind = gguf.GGMLQuantizationType.Q8_0
    path = tiny_ggufs.write_gguf_of(tmp_path / "tiny.gguf", reference, VOCABULARY, kind)
    with torch.no_grad():
        exact = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
        for parameter in reference.parameters():
            if parameter.ndim == 2:
                rounded = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.tensor(gguf.quants.dequantize(rounded, kind)))
        expected = reference(torch.tensor(tokens), use_cache=False).logits.numpy()
    loaded = load.load_model(path, dtype="float32")
    assert largest_difference(loaded.language_model, loaded.params, tokens, expected) <= 1e-3
    assert largest_difference(loaded.language_model, loaded.params, tokens, exact) > 1e-3
