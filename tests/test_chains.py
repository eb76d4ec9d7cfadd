"""Chains as the launcher lays them out, and programs that are compiled before they run."""

import re

import jax
import numpy as np
import pytest

from ecmh_jax import best_of_n, chain_queue, group_sampling, make_tuning, multiple_try, smc
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
        "begin_rounds",
        "advance_round",
        "finish_rounds",
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


@pytest.mark.parametrize(
    "sampler",
    [
        "best_of_n",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("smc", "multiple_try")),
    ],
)
def test_the_groups_find_the_programs(model, caplog, sampler):
    prompts = encode_prompts(("hello",), model, None, pad_id=2)
    config = Config(
        prompt_length=prompts.tokens.shape[1],
        max_new_tokens=4,
        num_stages=2,
        steps_per_stage=1,
        top_k=20,
        eos_ids=model.eos_ids,
        pad_id=2,
    )
    options = {
        "smc": smc.Options(num_particles=2),
        "best_of_n": best_of_n.Options(num_candidates=4, rows=2),
        "multiple_try": multiple_try.Options(num_tries=2),
    }[sampler]
    budget = np.asarray([9, 9, 9]) if sampler == "best_of_n" else None
    chains = chains_lib.lay_out(prompts, 3, make_tuning(3))
    key = jax.random.key(0)
    arguments = (chains, config, sampler, options, 4, budget)
    programs = {"begin_rounds", "advance_round", "finish_rounds"}
    with jax.log_compiles():
        chains_lib.compile_rounds(key, model, *arguments)
        assert compiled_programs(caplog) == programs
        updates = list(
            group_sampling.run_groups(key, model.language_model, model.params, *arguments)
        )
        assert not compiled_programs(caplog)
    assert [update.members.tolist() for update in updates if update.result] == [[0, 1], [2]]
    assert [update.round for update in updates] == [1, 2, 1, 2]
