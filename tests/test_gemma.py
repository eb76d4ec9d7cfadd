"""gemma-3-270m on its real weights, against transformers.

Its terms are not an open licence, so nothing fetches it by itself: name the GGUF file in
``ECMH_JAX_GEMMA3`` (docs/models.md says how to get it).
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import load

PATH = os.environ.get("ECMH_JAX_GEMMA3")
TEXTS = (
    "The capital of Germany is",
    "def add(a, b):\n    return",
    "Once upon a time, in a village by the sea, there lived an old fisherman who had three sons; "
    "the eldest was strong, the second was clever, and the youngest",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PATH is None, reason="ECMH_JAX_GEMMA3 does not name the GGUF file"),
]


@pytest.fixture(scope="module")
def gemma() -> load.LoadedModel:
    return load.load_model(PATH, dtype="float32")


def test_logits_are_those_of_transformers(gemma):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from models.transformers_reference import to_transformers

    theirs = to_transformers(gemma.config, gemma.params)
    model = gemma.language_model
    # Longer than the sliding window of 512, so that it cuts.
    texts = [*TEXTS, " ".join(TEXTS) * 12]
    for text in texts:
        ids = gemma.tokenizer.encode_prompt(text)
        with torch.no_grad():
            expected = theirs(torch.tensor([ids]), use_cache=False).logits[0].numpy()
        tokens = jnp.array([ids], jnp.int32)
        kept = len(ids) - 3
        found, cache = jax.jit(model.prefill)(
            gemma.params, tokens, jnp.array([kept]), model.init_cache(1, len(ids))
        )
        assert np.abs(found[0] - expected[kept - 1]).max() <= 1e-3
        for position in range(kept, len(ids)):
            found, cache = jax.jit(model.decode)(
                gemma.params, tokens[:, position], jnp.array([position]), cache
            )
            assert np.abs(found[0] - expected[position]).max() <= 1e-3
    assert len(ids) > 600


def test_it_knows_a_capital(gemma):
    model = gemma.language_model
    text = "The capital of France is Paris. The capital of Germany is"
    ids = gemma.tokenizer.encode_prompt(text)
    assert ids[0] == 2  # beginning of sequence
    logits, _ = model.prefill(
        gemma.params, jnp.array([ids]), jnp.array([len(ids)]), model.init_cache(1, len(ids))
    )
    assert gemma.tokenizer.decode([int(logits[0].argmax())]) == " Berlin"
