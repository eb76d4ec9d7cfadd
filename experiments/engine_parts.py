"""What a decode step of the engine consists of, and what it holds in memory."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ecmh_jax import compiled, engine, token_law
from ecmh_jax.base import Config
from ecmh_jax.chain_queue import Chains
from ecmh_jax.engine import Arrivals, Slots
from experiments.memory import tree_bytes
from models import attention, quantisation
from models.load import LoadedModel

_SCAN_STEPS = 4  # decode steps in one timed call
_SETTLED_SLOTS = (0, 1, 4)


def time_parts(
    model: LoadedModel, chains: Chains, run: Config, num_slots: int, repeats: int
) -> dict[str, float]:
    """Times the parts of a decode step, each alone, with the cache's whole window live.

    Args:
      model: the model.
      chains: the first one fills all slots.
      run: the run's configuration.
      num_slots: B.
      repeats: timings of each part; the median counts.

    Returns:
      Seconds by part. "products" is what the network takes beyond head and attention; "settle_N" is
      a settling with N slots that are due, all of them rejected or accepted as their u says.
    """
    network = _time_network(model, run, num_slots, repeats)
    head = _time_head(model, num_slots, repeats)
    attended = _time_attention(model, run, num_slots, repeats)
    law = _time_token_law(model, run, num_slots, repeats)
    slots = _running_slots(model, chains, run, num_slots)
    parts = {
        "network": network,
        "products": network - head - attended,
        "head": head,
        "attention": attended,
        "token_law": law,
    }
    for due in _SETTLED_SLOTS:
        slots, seconds = _time_settle(slots, run, min(due, num_slots), repeats)
        parts[f"settle_{due}"] = seconds
    return parts


def memory_of_tick(
    model: LoadedModel, run: Config, num_slots: int, steps_per_tick: int
) -> dict[str, int]:
    """Bytes of a tick: weights, the two cache banks, and the compiled program's own peak.

    Returns:
      "weights", "banks", "other_slot_arrays", "temporary" (what XLA allocates beside arguments and
      results), "peak" (arguments, results that share no memory with them, and temporaries); the
      last two where the backend tells.
    """
    slots = jax.eval_shape(
        functools.partial(engine.init_slots, model.language_model, num_slots, run)
    )
    program = compiled.tick.lower(
        jax.random.key(0),
        slots,
        model.params,
        jax.ShapeDtypeStruct((num_slots,), bool),
        model=model.language_model,
        config=run,
        num_steps=steps_per_tick,
    ).compile()
    analysis = program.memory_analysis()
    banks = tree_bytes(slots.chains.cache) + tree_bytes(slots.cache)
    figures = {
        "weights": tree_bytes(model.params),
        "banks": banks,
        "other_slot_arrays": tree_bytes(slots) - banks,
    }
    if analysis is None:  # a backend that keeps no account
        return figures
    fresh_results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return figures | {
        "temporary": analysis.temp_size_in_bytes,
        "peak": analysis.argument_size_in_bytes + fresh_results + analysis.temp_size_in_bytes,
    }


def describe(parts: dict[str, float], memory: dict[str, int], num_slots: int) -> str:
    """The parts as lines of a table."""
    network = parts["network"]
    lines = [f"one decode step of {num_slots} slots, alone: {1e3 * network:.1f} ms network, of it"]
    for name in ("products", "head", "attention"):
        lines.append(f"  {name:>10} {1e3 * parts[name]:8.2f} ms {parts[name] / network:6.1%}")
    lines.append("and beside it")
    for name in ("token_law", *(f"settle_{due}" for due in _SETTLED_SLOTS)):
        lines.append(f"  {name:>10} {1e3 * parts[name]:8.2f} ms {parts[name] / network:6.1%}")
    estimate = memory["weights"] + memory["banks"]
    text = (
        f"memory: weights {memory['weights'] / 1e6:.0f} MB, two cache banks "
        f"{memory['banks'] / 1e6:.0f} MB"
    )
    if "peak" in memory:
        peak = memory["peak"]
        text += f", peak of the program {peak / 1e6:.0f} MB, {peak / estimate - 1:+.1%}"
    lines.append(text)
    return "\n".join(lines)


def _median_seconds(function: Callable[..., Any], repeats: int, *arguments: Any) -> float:
    jax.block_until_ready(function(*arguments))
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _time_network(model: LoadedModel, run: Config, num_slots: int, repeats: int) -> float:
    """Seconds of ``decode`` at the last slot, cache written in place."""
    tokens = jnp.zeros((num_slots,), jnp.int32)
    positions = jnp.full((num_slots,), run.num_slots - 1)

    @functools.partial(jax.jit, donate_argnames=("cache",))
    def decode_some(params, cache):
        def decode_one(cache, _):
            logits, cache = model.language_model.decode(params, tokens, positions, cache)
            return cache, logits[:, 0]

        return jax.lax.scan(decode_one, cache, length=_SCAN_STEPS)

    cache = model.language_model.init_cache(num_slots, run.num_slots)
    seconds = []
    for _ in range(repeats + 1):  # the first one compiles
        started = time.perf_counter()
        cache, _ = jax.block_until_ready(decode_some(model.params, cache))
        seconds.append((time.perf_counter() - started) / _SCAN_STEPS)
    return statistics.median(seconds[1:])


def _time_head(model: LoadedModel, num_slots: int, repeats: int) -> float:
    table = model.params["embedding" if model.config.tied_head else "head"]
    stream = jnp.ones((num_slots, model.config.embedding_size), model.dtype)

    return _median_seconds(jax.jit(quantisation.logits), repeats, table, stream)


def _time_attention(model: LoadedModel, run: Config, num_slots: int, repeats: int) -> float:
    """Seconds of all layers' attention over full rows."""
    config = model.config
    cache = model.language_model.init_cache(num_slots, run.num_slots)
    positions = jnp.full((num_slots,), run.num_slots - 1)
    queries = jnp.ones((num_slots, config.num_heads, config.head_size), model.dtype)
    implementation = attention.implementation(
        jax.devices(), model.dtype, config, model.decode_attention
    )

    @jax.jit
    def attend_all(queries, cache):
        for layer in cache:
            # Each layer waits for the one before, as in the network.
            queries = attention.decode_attention(
                queries, layer.keys, layer.values, positions, implementation
            )
        return queries

    return _median_seconds(attend_all, repeats, queries, cache)


def _time_token_law(model: LoadedModel, run: Config, num_slots: int, repeats: int) -> float:
    power = jnp.full((num_slots,), 4.0)
    draw = jax.jit(functools.partial(token_law.draw_token, top_k=run.top_k))
    return _median_seconds(
        draw,
        repeats,
        jax.random.normal(jax.random.key(1), (num_slots, model.config.vocabulary_size)),
        jax.random.uniform(jax.random.key(2), (num_slots, 2)),
        power,
        power,
        jnp.full((num_slots,), -1),
    )


def _running_slots(model: LoadedModel, chains: Chains, run: Config, num_slots: int) -> Slots:
    """Slots that all hold a chain in the middle of its first extension."""
    prompt = jnp.asarray(chains.prompts[0], jnp.int32)
    prompt_length = jnp.int32(chains.prompt_lengths[0])
    static = {"model": model.language_model, "config": run}
    arrivals = Arrivals(
        rows=jnp.ones((num_slots,), bool),
        cache=compiled.prefill(model.params, prompt, prompt_length, **static),
        prompt=prompt,
        prompt_length=prompt_length,
        prompt_id=jnp.zeros((num_slots,), jnp.int32),
        chain_id=jnp.arange(num_slots),
        tuning=jax.tree.map(lambda field: jnp.full((num_slots,), field[0]), chains.tuning),
    )
    slots = compiled.init_slots(num_slots=num_slots, **static)
    slots = compiled.admit(slots, arrivals, config=run)
    nobody = jnp.zeros((num_slots,), bool)
    slots, _ = compiled.tick(
        jax.random.key(0), slots, model.params, nobody, num_steps=_SCAN_STEPS, **static
    )
    return slots


def _time_settle(slots: Slots, run: Config, due: int, repeats: int) -> tuple[Slots, float]:
    settle = jax.jit(
        lambda key, slots: engine.settle(key, slots, jnp.zeros_like(slots.busy), run),
        donate_argnames=("slots",),
    )
    key, seconds = jax.random.key(0), []
    rows = jnp.arange(slots.busy.shape[0])
    for _ in range(repeats + 1):  # the first one compiles
        done = rows < due
        slots = slots._replace(suffix=slots.suffix._replace(done=done))
        jax.block_until_ready(slots)
        started = time.perf_counter()
        slots, _ = jax.block_until_ready(settle(key, slots))
        seconds.append(time.perf_counter() - started)
    return slots, statistics.median(seconds[1:])
