"""How many slots are taken, and what is said when they do not fit."""

import dataclasses
import types

import jax
import pytest

from ecmh_jax import (
    best_of_n,
    compiled,
    engine,
    group_sampling,
    multiple_try,
    power_smc,
    published,
    rounds,
    smc,
    tmc,
)
from ecmh_jax.base import Config, Tuning
from experiments import memory
from models.load import load_model
from tests import tiny_checkpoints


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(str(tiny_checkpoints.write_huggingface(tmp_path_factory.mktemp("tiny"))))


@pytest.fixture
def config(model):
    return Config(
        prompt_length=32,
        max_new_tokens=12,
        num_stages=3,
        steps_per_stage=4,
        top_k=20,
        eos_ids=model.eos_ids,
        pad_id=2,
    )


@pytest.fixture
def give_room(model, config, monkeypatch):
    """Leaves room for so many slots of the largest schedule, the tenth that is kept back apart."""
    slot_bytes = memory.estimate_slot_bytes(model, config)
    slot = jax.eval_shape(lambda: engine.init_slots(model.language_model, 1, config))
    row_bytes = memory.tree_bytes(slot.cache)

    def give(slots):
        free = int(slots * slot_bytes / 0.9) + 1 + row_bytes
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)

    return give


def demands(num_chains, *configs):
    """Samplers of a chain a row."""
    return [memory.Demand("entropy_cut", config, 1, num_chains) for config in configs]


@pytest.mark.parametrize(
    ("asked", "num_chains", "room", "expected"),
    [
        (None, 9, 20, 9),  # no more than chains
        (None, 30, 20.5, 20),  # no more than fit
        (None, 200, 200, 64),  # no more than are of use on a CPU
        (70, 200, 200, 70),
        (35, 30, 40, 35),  # those without a chain work ahead
        (20, 30, 20, 20),
    ],
)
def test_slots_taken(model, config, give_room, asked, num_chains, room, expected):
    give_room(room)
    short = dataclasses.replace(config, num_stages=1, steps_per_stage=0)
    reservation = memory.reserve(asked, model, demands(num_chains, short, config))
    assert reservation.num_slots == expected
    assert reservation.slot_bytes == memory.estimate_slot_bytes(model, config)
    slot = jax.eval_shape(lambda: engine.init_slots(model.language_model, 1, config))
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    assert reservation.weights_bytes == weights + memory.tree_bytes(slot.cache)


def test_too_many_slots(model, config, give_room):
    give_room(20)
    with pytest.raises(
        ValueError, match=r"--num_slots=21 needs .* for 21 slots .*; expected at most 20"
    ):
        memory.reserve(21, model, demands(30, config))


@pytest.mark.parametrize("asked", [None, 1])
def test_no_slot_fits(model, config, give_room, asked):
    give_room(0.99)
    with pytest.raises(ValueError, match=r"--max_new_tokens=12: a single slot.*; expected room"):
        memory.reserve(asked, model, demands(30, config))


def test_narrow_weights_are_widened_on_a_cpu(model, config, give_room):
    give_room(20)
    wide = memory.reserve(None, model, demands(9, config))
    half = jax.tree.map(lambda leaf: leaf.astype(jax.numpy.bfloat16), model.params)
    narrow = memory.reserve(None, model._replace(params=half), demands(9, config))
    row = wide.weights_bytes - memory.tree_bytes(model.params)
    assert narrow.weights_bytes == 1.5 * memory.tree_bytes(model.params) + row
    assert narrow.available_bytes < wide.available_bytes


def allocated_by_slot(model, config):
    """Bytes that the compiler gives a tick for one more slot, arguments and results included."""
    taken = []
    for num_slots in (4, 12):
        slots = jax.eval_shape(
            lambda num_slots=num_slots: engine.init_slots(model.language_model, num_slots, config)
        )
        program = compiled.tick.lower(
            jax.random.key(0),
            slots,
            model.params,
            jax.ShapeDtypeStruct((num_slots,), bool),
            model=model.language_model,
            config=config,
            num_steps=8,
        ).compile()
        account = program.memory_analysis()
        taken.append(
            account.temp_size_in_bytes
            + account.argument_size_in_bytes
            + account.output_size_in_bytes
            - account.alias_size_in_bytes
        )
    return (taken[1] - taken[0]) / 8


def test_estimate_covers_what_the_compiler_allocates(model, config):
    config = dataclasses.replace(config, max_new_tokens=96, top_k=None)
    allocated = allocated_by_slot(model, config)
    assert allocated <= memory.estimate_slot_bytes(model, config) <= 1.1 * allocated


OPTIONS = {
    "smc": smc.Options(),
    "power_smc": power_smc.Options(),
    "tmc": tmc.Options(num_candidates=8, num_kept=2, num_rollouts=4),
    "best_of_n": best_of_n.Options(num_candidates=8, rows=4),
    "multiple_try": multiple_try.Options(),
    "published_entropy_cut": published.PUBLISHED_ENTROPY_CUT,
}


def allocated_by_row(model, config, sampler, options):
    """Bytes that the compiler gives a round for one more row."""
    module = group_sampling.GROUP_SAMPLERS[sampler].module
    taken = []
    for size in (2, 6):
        whole, real = (jax.ShapeDtypeStruct((size,), kind) for kind in ("int32", "float32"))
        batch = rounds.Batch(
            jax.ShapeDtypeStruct((size, config.prompt_length), "int32"),
            *(whole, whole, whole),
            Tuning(real, real, real, real),
        )
        static = {
            "build": module.build,
            "model": model.language_model,
            "config": config,
            "options": options,
        }
        key = jax.random.key(0)
        carry = jax.eval_shape(
            lambda params, batch=batch, static=static: compiled.begin_rounds(
                jax.random.key(0), params, batch, **static
            ),
            model.params,
        )
        index = jax.ShapeDtypeStruct((), "int32")
        account = (
            compiled.advance_round.lower(key, model.params, batch, carry, index, **static)
            .compile()
            .memory_analysis()
        )
        taken.append(
            account.temp_size_in_bytes
            + account.argument_size_in_bytes
            + account.output_size_in_bytes
            - account.alias_size_in_bytes
        )
    return (taken[1] - taken[0]) / 4 / module.rows_per_chain(options)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", OPTIONS)
def test_estimate_covers_rounds(model, config, sampler):
    config = dataclasses.replace(config, max_new_tokens=96, top_k=None)
    allocated = allocated_by_row(model, config, sampler, OPTIONS[sampler])
    assert allocated <= memory.estimate_slot_bytes(model, config)


def test_a_result_that_needs_more_rows_than_there_are(model, config, give_room):
    give_room(20)
    demand = memory.Demand("smc", config, 16, 64)
    assert memory.reserve(None, model, [demand]).num_slots == 20
    with pytest.raises(ValueError, match=r"--num_slots=15: a result of smc decodes 16 rows"):
        memory.reserve(15, model, [demand])
    with pytest.raises(ValueError, match=r"--num_slots=auto: .* 24 rows together, and 20 fit"):
        memory.reserve(None, model, [demand._replace(least=24)])


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [50, None])
def test_estimate_on_a_real_model(smollm2, config, top_k):
    config = dataclasses.replace(config, max_new_tokens=480, top_k=top_k)
    allocated = allocated_by_slot(smollm2, config)
    assert allocated <= memory.estimate_slot_bytes(smollm2, config) <= 1.1 * allocated


def test_free_memory_is_the_devices_where_it_tells():
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 100, "bytes_in_use": 30})
    assert memory.free_bytes(device) == 70
    silent = types.SimpleNamespace(memory_stats=lambda: None)
    assert 10**6 < memory.free_bytes(silent) < 10**14


def test_out_of_memory_suggests_what_is_left():
    reservation = memory.Reservation(5, 10**6, 2 * 10**6, 10**9)
    message = str(memory.out_of_memory(reservation))
    assert "--num_slots=5" in message
    assert "10 MB (2 MB each) where 1 GB" in message
    assert message.endswith("try at most --num_slots=2")
    alone = str(memory.out_of_memory(reservation._replace(num_slots=1)))
    assert alone.endswith("try a lower --max_new_tokens")
