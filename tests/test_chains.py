"""Chains as the launcher lays them out, and programs that are compiled before they run."""

import re

import jax
import numpy as np
import pytest

from ecmh_jax import chain_queue, make_tuning
from ecmh_jax.base import Config
from experiments import chains as chains_lib
from experiments.prompts import EncodedPrompts, encode_prompts
from models.load import load_model
from tests import tiny_checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(tiny_checkpoints.write_huggingface(tmp_path_factory.mktemp("tiny"))))


def compiled_programs(caplog):
    """The library's programs that were compiled or loaded since the last call."""
    names = {re.match(r"Compiling jit\((\w+)\)", record.message) for record in caplog.records}
    caplog.clear()
    return {name.group(1) for name in names if name} & {
        "init_slots",
        "prefill",
        "admit",
        "tick",
        "collect",
    }


def test_layout():
    prompts = EncodedPrompts(("a", "b"), np.asarray([[5, 6], [7, 0]]), np.asarray([2, 1]))
    chains = chains_lib.lay_out(prompts, 3, make_tuning(6))
    assert chains.prompts.tolist() == [[5, 6]] * 3 + [[7, 0]] * 3
    assert chains.prompt_lengths.tolist() == [2, 2, 2, 1, 1, 1]
    assert chains.prompt_ids.tolist() == [0, 0, 0, 1, 1, 1]
    assert chains.chain_ids.tolist() == [0, 1, 2, 0, 1, 2]


def test_the_queue_finds_the_programs(model, caplog):
    prompts = encode_prompts(("hello", "hell"), model, None, pad_id=2)
    config = Config(
        prompt_length=prompts.tokens.shape[1],
        max_new_tokens=8,
        num_stages=2,
        steps_per_stage=1,
        top_k=20,
        eos_ids=model.eos_ids,
        pad_id=2,
    )
    chains = chains_lib.lay_out(prompts, 2, make_tuning(4))
    with jax.log_compiles():
        chains_lib.compile_programs(jax.random.key(0), model, config, num_slots=3)
        assert compiled_programs(caplog) == {"init_slots", "prefill", "admit", "tick", "collect"}
        chains_lib.compile_programs(jax.random.key(1), model, config, num_slots=3)
        assert not compiled_programs(caplog)
        finished = {}
        for update in chain_queue.run_queue(
            jax.random.key(0),
            model.language_model,
            model.params,
            chains,
            config,
            3,
            chains_lib.STEPS_PER_TICK,
        ):
            finished |= update.finished
        assert not compiled_programs(caplog)
    assert sorted(finished) == [0, 1, 2, 3]
