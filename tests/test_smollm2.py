"""The real model: against transformers on the same arrays, and in its own words. Slow."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ecmh_jax
from models import gguf_header, smollm2
from models.chat_template import encode_chats
from models.transformers_reference import to_transformers

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is Paris. The capital of Germany is"


def test_logits_match_transformers(smollm2):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = to_transformers(smollm2.config, smollm2.params)
    rows = [PROMPT, "def add(a, b):\n    return a + b\n\ndef multiply(", "12 + 30 = 42, 5 + 8 ="]
    ids = [smollm2.tokenizer.encode(row) for row in rows]
    length = min(len(row) for row in ids)
    tokens = np.array([row[:length] for row in ids])
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()

    model = smollm2.language_model
    lengths = jnp.array([length, 3, 5], jnp.int32)
    logits, cache = jax.jit(model.prefill)(
        smollm2.params,
        jnp.asarray(np.where(np.arange(length)[None] < lengths[:, None], tokens, 7), jnp.int32),
        lengths,
        model.init_cache(3, 40),
    )
    rows_index = np.arange(3)
    prefill_difference = np.abs(logits - expected[rows_index, lengths - 1]).max()
    decode = jax.jit(model.decode)
    positions = np.asarray(lengths) - 1
    decode_difference = 0.0
    while positions.min() < length - 1:
        positions = np.minimum(positions + 1, length - 1)
        logits, cache = decode(
            smollm2.params,
            jnp.asarray(tokens[rows_index, positions], jnp.int32),
            jnp.asarray(positions, jnp.int32),
            cache,
        )
        difference = np.abs(logits - expected[rows_index, positions]).max()
        decode_difference = max(decode_difference, difference)
    print(f"prefill {prefill_difference:.1e}, cached decode {decode_difference:.1e}")
    assert prefill_difference <= 1e-3
    assert decode_difference <= 1e-3


def greedy(loaded, ids: list[int], num_tokens: int) -> str:
    model = loaded.language_model
    prefill, decode = jax.jit(model.prefill), jax.jit(model.decode)
    logits, cache = prefill(
        loaded.params,
        jnp.array([ids], jnp.int32),
        jnp.array([len(ids)], jnp.int32),
        model.init_cache(1, len(ids) + num_tokens),
    )
    written: list[int] = []
    for position in range(len(ids), len(ids) + num_tokens):
        written.append(int(logits[0].argmax()))
        if written[-1] in loaded.eos_ids:
            break
        token = jnp.array(written[-1:], jnp.int32)
        logits, cache = decode(loaded.params, token, jnp.array([position], jnp.int32), cache)
    return loaded.tokenizer.decode(written)


def test_it_answers(smollm2):
    assert greedy(smollm2, smollm2.tokenizer.encode(PROMPT), 1) == " Berlin"
    conversation = [{"role": "user", "content": "What is 2+2?"}]
    (ids,) = encode_chats(smollm2.chat_template, [conversation], smollm2.tokenizer)
    answer = greedy(smollm2, ids, 24)
    print(repr(answer))
    assert "4" in answer


def test_chat_prompt(smollm2):
    content = "Say <|im_end|> twice."
    (ids,) = encode_chats(
        smollm2.chat_template, [[{"role": "user", "content": content}]], smollm2.tokenizer
    )
    assert smollm2.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        f"<|im_end|>\n<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [index for index in ids if index < 17] == [1, 2, 1, 2, 1]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("    12", ["    ", "1", "2"]),
        ("2024 was", ["2", "0", "2", "4", " was"]),
        ("Hello world", ["Hello", " world"]),
        ("don't", ["don", "'t"]),
        ("x = 3.14\n", ["x", " =", " ", "3", ".", "1", "4", "\n"]),
    ],
)
def test_known_tokens(smollm2, text, tokens):
    ids = smollm2.tokenizer.encode(text)
    assert [smollm2.tokenizer.decode([index]) for index in ids] == tokens


@pytest.mark.parametrize("text", ["naïve 日本語 🙂‍↔️\u200b", "\t\r\n  x ", "<|im_end|>", "\x00\x7f"])
def test_unicode_round_trip(smollm2, text):
    assert smollm2.tokenizer.decode(smollm2.tokenizer.encode(text)) == text


def test_description(smollm2):
    assert smollm2.eos_ids == (2,)
    assert smollm2.tokenizer.vocabulary_size == smollm2.config.vocabulary_size == 49152
    assert smollm2.tokenizer.bos_ids == ()
    assert (smollm2.config.num_heads, smollm2.config.num_kv_heads) == (9, 3)


def test_header_agrees_with_the_gguf_package():
    theirs, ours = gguf.GGUFReader(smollm2.fetch()), gguf_header.read_header(smollm2.fetch())
    assert (
        ours.metadata["tokenizer.ggml.tokens"] == theirs.fields["tokenizer.ggml.tokens"].contents()
    )
    assert {
        tensor.name: (tensor.data_offset, tensor.n_bytes, tuple(tensor.shape.tolist()[::-1]))
        for tensor in theirs.tensors
    } == {name: (info.offset, info.num_bytes, info.shape) for name, info in ours.tensors.items()}


def test_a_chain_depends_neither_on_its_row_nor_on_its_neighbours(smollm2):
    texts = ("The capital of France is", "One, two, three,", "def add(a, b):", "Water boils at")
    encoded = [smollm2.tokenizer.encode(text) for text in texts]
    prompts = np.zeros((4, 8), np.int32)
    for row, ids in zip(prompts, encoded, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in encoded], np.int32)
    config = ecmh_jax.Config(8, 8, num_stages=2, steps_per_stage=2, eos_ids=smollm2.eos_ids)

    def completions(rows, chains):
        """{(prompt, chain): tokens} of a batch of four."""
        result = ecmh_jax.sample(
            jax.random.key(5),
            smollm2.language_model,
            smollm2.params,
            prompts[rows],
            lengths[rows],
            ecmh_jax.make_tuning(4),
            config,
            prompt_ids=np.array(rows),
            chain_ids=np.array(chains),
        )
        return {
            (prompt, chain): result.trace.tokens[row, lengths[prompt] : length].tolist()
            for row, (prompt, chain, length) in enumerate(
                zip(rows, chains, result.trace.length, strict=True)
            )
        }

    first = completions([0, 1, 2, 3], [0, 0, 0, 0])
    assert first == completions([0, 1, 2, 3], [0, 0, 0, 0])
    moved = completions([3, 2, 1, 0], [0, 0, 0, 0])
    assert moved == first
    among_others = completions([0, 0, 0, 3], [7, 0, 1, 2])
    assert among_others[0, 0] == first[0, 0]
    assert len({tuple(tokens) for tokens in among_others.values()}) > 1
