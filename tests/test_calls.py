"""Bad calls: each names the value and what was expected."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecmh_jax import make_tuning
from tests.hashed_model import CONFIG, EOS, PROMPTS, TUNING, run

BAD_CALLS = {
    "empty prompt": ({"prompt_lengths": [2, 0, 3]}, ["prompt 1 has 0", "1..3"]),
    "prompt too long": ({"prompt_lengths": [2, 1, 4]}, ["prompt 2 has 4", "1..3"]),
    "negative length": ({"prompt_lengths": [2, 1, -1]}, ["prompt 2 has -1", "1..3"]),
    "fractional length": ({"prompt_lengths": [2.5, 1, 3]}, ["prompt_lengths", "float", "integer"]),
    "lengths missing": ({"prompt_lengths": [2, 1]}, ["prompt_lengths", "(2,)", "(3,)"]),
    "unknown token": ({"prompts": PROMPTS + 2}, ["prompt 0", "11", "0..10"]),
    "negative token": ({"prompts": PROMPTS - 2}, ["prompt 2", "-1", "0..10"]),
    "float prompts": ({"prompts": PROMPTS * 1.0}, ["prompts", "float64", "integer"]),
    "narrow prompts": ({"prompts": PROMPTS[:, :2]}, ["prompts", "(3, 2)", "[chains, 3]"]),
    "flat prompts": ({"prompts": PROMPTS[0]}, ["prompts", "(3,)", "[chains, 3]"]),
    "no prompts": ({"prompts": np.int32(3)}, ["prompts", "()", "[chains, 3]"]),
    "other tuning": ({"tuning": make_tuning(2)}, ["tuning.power", "[2]", "float32[3]"]),
    "half tuning": (
        {"tuning": TUNING._replace(cut_power=jnp.ones(3, jnp.float16))},
        ["tuning.cut_power", "float16", "float32[3]"],
    ),
    "unknown sampler": ({"sampler": "gibbs"}, ["'gibbs'", "entropy_cut", "standard"]),
    "raw key": ({"rng_key": np.zeros(2, np.uint32)}, ["rng_key", "0", "jax.random.key(seed)"]),
    "integer key": ({"rng_key": 3}, ["rng_key", "3", "jax.random.key(seed)"]),
    "rbg key": ({"rng_key": jax.random.key(0, impl="rbg")}, ["rng_key", "rbg", "threefry"]),
    "many keys": ({"rng_key": jax.random.split(jax.random.key(0), 3)}, ["(3,)", "scalar"]),
    "other chain ids": ({"chain_ids": np.arange(4)}, ["chain_ids", "(4,)", "(3,)"]),
    "float prompt ids": ({"prompt_ids": np.arange(3) / 2}, ["prompt_ids", "float64", "integer"]),
    "no slots": ({"num_slots": 0}, ["num_slots is 0", "at least 1"]),
    "no steps": ({"steps_per_tick": 0}, ["steps_per_tick is 0", "at least 1"]),
}
BAD_CONFIGS = {
    "no prompt slots": ({"prompt_length": 0}, ["prompt_length is 0", "at least 1"]),
    "no new tokens": ({"max_new_tokens": 0}, ["max_new_tokens is 0", "at least 1"]),
    "no stages": ({"num_stages": 0}, ["num_stages is 0", "at least 1"]),
    "uneven stages": ({"num_stages": 4}, ["num_stages is 4", "divisor", "6"]),
    "negative steps": ({"steps_per_stage": -1}, ["steps_per_stage is -1", "at least 0"]),
    "top_k 0": ({"top_k": 0}, ["top_k is 0", "at least 1"]),
    "top_k negative": ({"top_k": -5}, ["top_k is -5", "at least 1"]),
    "top_k above V": ({"top_k": 12}, ["top_k is 12", "at most", "11"]),
    "eos id above V": ({"eos_ids": (EOS, 11)}, ["eos_ids", "11", "0..10"]),
    "eos id negative": ({"eos_ids": (-2,)}, ["eos_ids", "-2", "0..10"]),
    "pad id above V": ({"pad_id": 11}, ["pad_id", "11", "0..10"]),
}
BAD_CALLS |= {
    name: ({"config": dataclasses.replace(CONFIG, **changes)}, fragments)
    for name, (changes, fragments) in BAD_CONFIGS.items()
}
BAD_TUNINGS = {
    "no chains": ({"num_chains": 0}, ["num_chains is 0", "at least 1"]),
    "power 0": ({"power": 0.0}, ["power is 0.0", "> 0"]),
    "power negative": ({"power": [1.0, -2.0, 3.0]}, ["power is", "-2.0", "> 0"]),
    "power nan": ({"power": np.nan}, ["power is nan", "> 0"]),
    "power infinite": ({"power": np.inf}, ["power is inf", "> 0"]),
    "wrong number": ({"power": [1.0, 2.0]}, ["power", "(2,)", "(3,)"]),
    "temperature 0": ({"proposal_temperature": 0.0}, ["proposal_temperature is 0.0", "> 0"]),
    "temperature nan": ({"proposal_temperature": np.nan}, ["proposal_temperature is nan", "> 0"]),
    "temperature tiny": ({"proposal_temperature": 1e-40}, ["proposal_temperature is 1e-40"]),
    "cut_power negative": ({"cut_power": -0.5}, ["cut_power is -0.5", ">= 0"]),
    "cut_power nan": ({"cut_power": np.nan}, ["cut_power is nan", ">= 0"]),
    "mix above 1": ({"uniform_mix": 1.5}, ["uniform_mix is 1.5", "0..1"]),
    "mix negative": ({"uniform_mix": [0.0, -0.1, 1.0]}, ["uniform_mix is", "-0.1", "0..1"]),
}


def assert_refused(function, fragments, **arguments):
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as error:
        function(**arguments)
    for fragment in fragments[1:]:
        assert fragment in str(error.value)


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_says_what_was_expected(name):
    changes, fragments = BAD_CALLS[name]
    assert_refused(run, fragments, **changes)


@pytest.mark.parametrize("name", BAD_TUNINGS)
def test_bad_tuning_says_what_was_expected(name):
    changes, fragments = BAD_TUNINGS[name]
    assert_refused(make_tuning, fragments, **({"num_chains": 3} | changes))
