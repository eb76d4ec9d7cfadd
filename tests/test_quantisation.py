"""Matrices in int8: the same as a model whose weights were rounded beforehand."""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import load
from tests.tiny_checkpoints import CONFIG, write_huggingface

TOKENS = np.array([[5, 100, 42, 7, 261], [9, 9, 1, 200, 263]])

qwix = pytest.importorskip("qwix")


def logits_of(loaded: load.LoadedModel) -> np.ndarray:
    """Prefill of three tokens a row, then two decoded: [2, 3, V]."""
    model = loaded.language_model
    found, cache = jax.jit(model.prefill)(
        loaded.params,
        jnp.asarray(TOKENS[:, :3], jnp.int32),
        jnp.full(2, 3, jnp.int32),
        model.init_cache(2, 6),
    )
    steps = [found]
    for position in (3, 4):
        tokens = jnp.asarray(TOKENS[:, position], jnp.int32)
        found, cache = jax.jit(model.decode)(
            loaded.params, tokens, jnp.full(2, position, jnp.int32), cache
        )
        steps.append(found)
    return np.stack(steps, axis=1)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path) -> tuple[load.LoadedModel, load.LoadedModel]:
    """A model in float32, and with its matrices in int8."""
    folder = write_huggingface(tmp_path, {**CONFIG, "tie_word_embeddings": request.param})
    return load.load_model(folder), load.load_model(folder, quantise="int8")


def is_rounded(leaf: Any) -> bool:
    return hasattr(leaf, "qvalue")


def matrices(loaded: load.LoadedModel) -> dict[str, Any]:
    """Every matrix by its path of keys."""
    found = jax.tree_util.tree_leaves_with_path(loaded.params, is_leaf=is_rounded)
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in found
        if is_rounded(leaf) or leaf.ndim == 2
    }


def test_matrices_are_rounded_with_a_scale_an_output(pair):
    wide, quantised = map(matrices, pair)
    assert set(wide) == set(quantised)
    for name, leaf in quantised.items():
        exact = np.asarray(wide[name])
        axis = 1 if "embedding" in name or "head" in name else 0
        # Symmetric: an output's largest value lies half a step past the last.
        scale = np.abs(exact).max(axis=axis, keepdims=True) / 127.5
        assert leaf.qvalue.dtype == jnp.int8
        assert leaf.scale.dtype == jnp.float32
        np.testing.assert_allclose(leaf.scale, scale, rtol=1e-6)
        assert np.abs(np.asarray(leaf.qvalue) - exact / scale).max() <= 0.5 + 1e-4
    assert pair[1].params["final_norm"].dtype == jnp.float32


def test_logits_are_those_of_rounded_weights(pair):
    wide, quantised = pair
    rounded = jax.tree.map(
        lambda leaf: leaf.qvalue * leaf.scale if is_rounded(leaf) else leaf,
        quantised.params,
        is_leaf=is_rounded,
    )
    found = logits_of(quantised)
    np.testing.assert_allclose(found, logits_of(wide._replace(params=rounded)), atol=1e-5)
    assert np.abs(found - logits_of(wide)).max() > 1e-2


def test_unknown_kind_and_missing_library(tmp_path, monkeypatch):
    folder = write_huggingface(tmp_path)
    with pytest.raises(ValueError, match="--quantise=int3; expected one of int8"):
        load.load_model(folder, quantise="int3")
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ValueError, match=r"--quantise=int8 needs qwix; install it with pip"):
        load.load_model(folder, quantise="int8")
