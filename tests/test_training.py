"""Training: the network over whole texts, the loss, batches, and the folder that is written."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers
from tokenizers import models as tokenizer_models

from experiments import training
from experiments.equation_corpus import Corpus
from experiments.training import Schedule, TrainState
from models.config import TransformerConfig
from models.huggingface_writer import write_llama
from models.language_model import build_forward, build_language_model
from models.load import load_model
from models.rotary import Rotary

CONFIG = TransformerConfig(
    vocabulary_size=11,
    num_layers=2,
    embedding_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_size=6,
    feed_forward_size=20,
    context_length=32,
    tied_head=True,
)


def params_of(config, seed=0):
    return training.init_params(config, seed)


@pytest.mark.parametrize("tied_head", [True, False])
def test_forward_is_decoding_token_by_token(tied_head):
    config = TransformerConfig(**{**CONFIG.__dict__, "tied_head": tied_head})
    params = params_of(config)
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, 11)
    found = build_forward(config)(params, tokens)
    assert found.shape == (3, 7, 11)
    assert found.dtype == jnp.float32
    model = build_language_model(config, jnp.dtype(jnp.float32))
    cache = model.init_cache(3, 7)
    for place in range(7):
        logits, cache = model.decode(params, tokens[:, place], jnp.full((3,), place), cache)
        np.testing.assert_allclose(found[:, place], logits, atol=2e-5)


def test_log_probs_are_of_the_completions_tokens():
    tokens = jnp.array([[4, 2, 9, 1, 0], [3, 3, 5, 0, 0]])
    prompt_lengths, lengths = jnp.array([2, 1]), jnp.array([5, 4])
    logits = jax.random.normal(jax.random.key(2), (2, 4, 11))
    found = training.completion_log_probs(
        lambda params, seen: logits, None, tokens, prompt_lengths, lengths
    )
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = np.zeros((2, 4))
    for row, (start, end) in enumerate([(2, 5), (1, 4)]):
        for place in range(start, end):
            expected[row, place - 1] = log_probs[row, place - 1, int(tokens[row, place])]
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_loss_is_the_mean_over_tokens_and_padding_has_no_say():
    optimiser = optax.sgd(0.0)
    update = training.build_update(CONFIG, optimiser)

    def loss(tokens, prompt_lengths, lengths):
        state = TrainState(params_of(CONFIG), optimiser.init(params_of(CONFIG)))
        return float(update(state, tokens, prompt_lengths, lengths)[1])

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 11, (3, 9)).astype(np.int32)
    prompt_lengths, lengths = np.array([2, 3, 1]), np.array([9, 6, 4])
    expected, count = 0.0, 0
    forward = build_forward(CONFIG)
    for row in range(3):
        log_probs = jax.nn.log_softmax(forward(params_of(CONFIG), tokens[row : row + 1]))[0]
        for place in range(prompt_lengths[row], lengths[row]):
            expected -= float(log_probs[place - 1, tokens[row, place]])
            count += 1
    assert loss(tokens, prompt_lengths, lengths) == pytest.approx(expected / count, rel=1e-5)
    other = tokens.copy()
    other[1, 6:], other[2, 4:] = 7, 8
    assert (other != tokens).any()
    assert loss(other, prompt_lengths, lengths) == loss(tokens, prompt_lengths, lengths)


def test_training_learns_a_rule():
    rng = np.random.default_rng(3)
    first = rng.integers(1, 11, (64, 4)).astype(np.int32)
    tokens = np.concatenate([first, first[:, ::-1], np.zeros((64, 1), np.int32)], axis=1)
    schedule = Schedule(num_steps=300, batch_size=64, learning_rate=1e-2)
    optimiser = training.build_optimiser(schedule)
    update = training.build_update(CONFIG, optimiser)
    params = params_of(CONFIG)
    state, losses = TrainState(params, optimiser.init(params)), []
    for _ in range(schedule.num_steps):
        state, loss = update(state, tokens, np.full(64, 4), np.full(64, 9))
        losses.append(float(loss))
    assert losses[0] > 2
    assert losses[-1] < 0.1


def test_batches_hold_every_row_once_an_epoch_and_pad_little():
    rng = np.random.default_rng(4)
    lengths = np.sort(rng.integers(5, 60, 50)).astype(np.int32)
    tokens = np.tile(np.arange(50, dtype=np.int32)[:, None], (1, 60))
    corpus = Corpus(tokens, np.full(50, 2, np.int32), lengths)
    batches = training.draw_batches(corpus, 5, seed=0)
    for _ in range(2):
        epoch = [next(batches) for _ in range(10)]
        seen = np.concatenate([batch.tokens[:, 0] for batch in epoch])
        assert sorted(seen) == list(range(50))
        for batch in epoch:
            assert batch.lengths.max() <= batch.tokens.shape[1]
            assert batch.tokens.shape[1] < batch.lengths.max() + 16
            assert np.ptp(batch.lengths) < 30
    again = training.draw_batches(corpus, 5, seed=0)
    other = training.draw_batches(corpus, 5, seed=1)
    order = [
        [batch.tokens[:, 0].tolist() for _, batch in zip(range(10), source, strict=False)]
        for source in (training.draw_batches(corpus, 5, seed=0), again, other)
    ]
    assert order[0] == order[1] != order[2]


def make_tokenizer():
    vocabulary = {"<|end|>": 0} | {character: i for i, character in enumerate("abcdefghij", 1)}
    backend = tokenizers.Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    backend.add_special_tokens([tokenizers.AddedToken("<|end|>", special=True)])
    return backend


@pytest.mark.parametrize("tied_head", [True, False])
def test_a_written_folder_is_the_model(tmp_path, tied_head):
    config = TransformerConfig(
        **{**CONFIG.__dict__, "tied_head": tied_head, "rotary": Rotary(theta=5000.0)}
    )
    params = params_of(config, seed=7)
    write_llama(tmp_path / "model", config, params, make_tokenizer(), eos_id=0)
    loaded = load_model(str(tmp_path / "model"), "float32")
    assert loaded.config == config
    assert loaded.eos_ids == (0,)
    assert loaded.tokenizer.encode("cab") == [3, 1, 2]
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)


def test_transformers_reads_a_written_folder(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params = params_of(CONFIG, seed=8)
    write_llama(tmp_path / "model", CONFIG, params, make_tokenizer(), eos_id=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = np.random.default_rng(0).integers(0, 11, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(build_forward(CONFIG)(params, tokens), expected, atol=1e-4)


@pytest.mark.parametrize(
    "change", [{"family": "qwen2"}, {"query_key_norm": True}, {"norm_offset": 1.0}]
)
def test_other_networks_are_refused(tmp_path, change):
    config = TransformerConfig(**{**CONFIG.__dict__, **change})
    with pytest.raises(ValueError, match="cannot be written"):
        write_llama(tmp_path / "model", config, params_of(config), make_tokenizer(), eos_id=0)
    assert not (tmp_path / "model").exists()
