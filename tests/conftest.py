"""What every test shares: strict JAX, and the real model for the slow ones."""

import jax
import pytest

from models import load

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def smollm2() -> load.LoadedModel:
    """SmolLM2-135M in float32, downloaded once into the cache folder; for slow tests."""
    return load.load_model("smollm2-135m", dtype="float32")
