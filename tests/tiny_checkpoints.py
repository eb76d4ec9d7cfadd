"""Tiny random models written in the formats that real ones come in, without torch."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}"
    "{% endif %}"
)
SPECIAL_TOKENS = ("<|text|>", "<|start|>", "<|end|>")
MERGES = ("h e", "l l", "he ll", "Ġ Ġ")
BYTES = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
VOCABULARY = (*SPECIAL_TOKENS, *BYTES, *(merge.replace(" ", "") for merge in MERGES))
CONFIG = {
    "model_type": "llama",
    "vocab_size": len(VOCABULARY) + 5,  # real embeddings are padded as well
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
    "rms_norm_eps": 1e-4,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
}


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    width, inner, vocabulary = (
        config[key] for key in ("hidden_size", "intermediate_size", "vocab_size")
    )
    query_rows = config["num_attention_heads"] * config["head_dim"]
    key_rows = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, width)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (width,),
            "self_attn.q_proj": (query_rows, width),
            "self_attn.k_proj": (key_rows, width),
            "self_attn.v_proj": (key_rows, width),
            "self_attn.o_proj": (width, query_rows),
            "post_attention_layernorm": (width,),
            "mlp.gate_proj": (inner, width),
            "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner),
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    return {
        name: (rng.normal(size=shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def make_tokenizer(vocabulary: tuple[str, ...] = VOCABULARY) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer that splits digits, as SmolLM2's does."""
    ids = {token: index for index, token in enumerate(vocabulary)}
    merges: list[tuple[str, str]] = []
    for merge in MERGES:
        left, right = merge.split(" ")
        if left + right in ids:
            merges.append((left, right))
    backend = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            tokenizers.AddedToken(token, special=True, normalized=False)
            for token in SPECIAL_TOKENS
            if token in ids
        ]
    )
    return backend


def write_json(path: Path, values: Any) -> None:
    """Writes one JSON file."""
    path.write_text(json.dumps(values), "utf-8")


def read_json(path: Path) -> Any:
    """Reads one JSON file."""
    return json.loads(path.read_text("utf-8"))


def write_huggingface(
    folder: Path,
    config: dict[str, Any] = CONFIG,
    weights: dict[str, np.ndarray] | None = None,
    num_shards: int = 1,
) -> Path:
    """Writes a model folder as ``save_pretrained`` lays it out."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_weights(config) if weights is None else weights
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [2, 0]})
    write_json(
        folder / "tokenizer_config.json",
        {
            "chat_template": CHAT_TEMPLATE,
            "bos_token": {"content": "<|start|>"},
            "eos_token": "<|end|>",
        },
    )
    make_tokenizer().save(str(folder / "tokenizer.json"))
    names = sorted(weights)
    if num_shards == 1:
        safetensors.numpy.save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for shard in range(num_shards):
        file_name = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard::num_shards]}
        safetensors.numpy.save_file(part, folder / file_name)
        weight_map.update(dict.fromkeys(part, file_name))
    write_json(folder / "model.safetensors.index.json", {"weight_map": weight_map})
    return folder


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, *middle, _ = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(middle)]}.weight"


def interleave_rows(weights: np.ndarray, head_size: int) -> np.ndarray:
    """The order that llama.cpp's converter gives to query and key rows."""
    halves = weights.reshape(-1, 2, head_size // 2, weights.shape[1])
    return halves.swapaxes(1, 2).reshape(weights.shape)


def write_gguf(
    path: Path,
    config: dict[str, Any] = CONFIG,
    weights: dict[str, np.ndarray] | None = None,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    architecture: str = "llama",
    pre: str = "smollm",
    extra: dict[str, int | float | str | bool] | None = None,
    leave_out: tuple[str, ...] = (),
) -> Path:
    """Writes a GGUF file with the package's own writer; norms stay F32, as they do in real ones."""
    weights = random_weights(config) if weights is None else weights
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    padding = [f"[PAD{index}]" for index in range(len(VOCABULARY), config["vocab_size"])]
    writer.add_token_list([*VOCABULARY, *padding])
    # 3 control, 1 normal, 5 unused
    writer.add_token_types(
        [3] * len(SPECIAL_TOKENS)
        + [1] * (len(VOCABULARY) - len(SPECIAL_TOKENS))
        + [5] * len(padding)
    )
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for key, value in (extra or {}).items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add.get(type(value), writer.add_string)(key, value)  # type: ignore[operator]
    for name, values in weights.items():
        if gguf_name(name) in leave_out:
            continue
        if "q_proj" in name or "k_proj" in name:
            values = interleave_rows(values, config["head_dim"])
        stored = gguf.GGMLQuantizationType.F32 if values.ndim == 1 else kind
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
