"""Decode speed against what else is there and against the machine's own ceiling, in one run."""

import concurrent.futures
import dataclasses
import functools
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import token_law
from models.load import LoadedModel

PROMPT_TOKENS = 32
_COPY_BYTES = 1 << 29
_MATMUL_SIZE = 2048


@dataclasses.dataclass(frozen=True)
class DecodeBenchConfig:
    """What to measure.

    Attributes:
      batch_sizes: chains that decode together.
      num_slots: slots of the cache; decoding runs from slot 32 to the last.
      repeats: runs of each figure; the best is reported, since others share the machine.
      top_k: truncation of the token law.
      reference: whether to time transformers' ``generate`` too, where it is installed.
    """

    batch_sizes: tuple[int, ...]
    num_slots: int
    repeats: int
    top_k: int
    reference: bool


def run_decode_bench(
    model: LoadedModel, config: DecodeBenchConfig, report: Callable[[str], None]
) -> dict[str, Any]:
    """Measures decoding side by side.

    Args:
      model: the model.
      config: what to measure.
      report: receives a line of progress at a time.

    Returns:
      One row a batch size, with seconds a step of each part, and the machine's own rates.
    """
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    products = model.config.matrix_elements
    on_cpu = jax.default_backend() == "cpu"
    bandwidth = (_copy_bandwidth if on_cpu else _device_copy_bandwidth)(config.repeats)
    read_rate = _read_bandwidth(config.repeats)
    matmul_rate = _matmul_rate(model.dtype, config.repeats)
    report(
        f"weights {weight_bytes / 1e6:.0f} MB, copy {bandwidth / 1e9:.1f} GB/s, "
        f"read {read_rate / 1e9:.1f} GB/s, "
        f"matmul {matmul_rate / 1e9:.0f} GFLOP/s"
    )
    reference = load_reference(model) if config.reference else None
    rows = []
    for batch_size in config.batch_sizes:
        ours = _time_decode(model, config, batch_size)
        law_seconds = _time_token_law(model, config, batch_size)
        # The weights have to be read once a step, and every product has to be done.
        floor = max(weight_bytes / bandwidth, 2 * products * batch_size / matmul_rate)
        row = {
            "batch_size": batch_size,
            "tokens_per_second": batch_size / ours["step_seconds"],
            "share_of_ceiling": floor / ours["step_seconds"],
            "ceiling_tokens_per_second": batch_size / floor,
            "token_law_share": law_seconds / ours["step_seconds"],
            "token_law_seconds": law_seconds,
            **ours,
        }
        if reference is not None:
            step = _time_reference(reference, model, config, batch_size)
            row["reference_tokens_per_second"] = batch_size / step
            row["ratio_to_reference"] = step / ours["step_seconds"]
        rows.append(row)
        report(describe_row(row))
    return {
        "weight_bytes": weight_bytes,
        "copy_bandwidth": bandwidth,
        "read_bandwidth": read_rate,
        "matmul_flops": matmul_rate,
        "rows": rows,
        "config": dataclasses.asdict(config),
    }


def describe_row(row: dict[str, Any]) -> str:
    """One line of the table."""
    text = (
        f"batch {row['batch_size']:3d}: {row['tokens_per_second']:7.1f} tokens/s, "
        f"{row['share_of_ceiling']:4.0%} of the ceiling, token law {row['token_law_share']:.1%} "
        f"of a step, compile {row['compile_seconds']:.1f} s"
    )
    if "ratio_to_reference" in row:
        text += (
            f"; transformers {row['reference_tokens_per_second']:.1f} tokens/s, "
            f"ratio {row['ratio_to_reference']:.2f}"
        )
    return text


def _best(seconds: Callable[[], float], repeats: int) -> float:
    return min(seconds() for _ in range(repeats))


def _seconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - started


def _copy_bandwidth(repeats: int) -> float:
    """Bytes copied by second from one array to another, by all cores; on the host."""
    cores = os.cpu_count() or 1
    sources = np.array_split(np.ones(_COPY_BYTES // 4, np.float32), cores)
    targets = np.array_split(np.zeros(_COPY_BYTES // 4, np.float32), cores)
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:

        def copy() -> float:
            started = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            return time.perf_counter() - started

        return _COPY_BYTES / _best(copy, repeats + 4)


def _device_copy_bandwidth(repeats: int) -> float:
    """Bytes copied by second in an accelerator's own memory."""
    source = jnp.ones((_COPY_BYTES // 4,), jnp.float32)
    copy = jax.jit(lambda values: values + 1.0)
    _seconds(lambda: copy(source))
    return _COPY_BYTES / _best(lambda: _seconds(lambda: copy(source)), repeats + 4)


def _read_bandwidth(repeats: int) -> float:
    """Bytes read by second in a sum; decoding writes little, so this bounds it more closely."""
    source = jnp.ones((_COPY_BYTES // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    _seconds(lambda: total(source))
    return _COPY_BYTES / _best(lambda: _seconds(lambda: total(source)), repeats + 4)


def _matmul_rate(dtype: np.dtype, repeats: int) -> float:
    """Floating-point operations by second of a large square product."""
    square = jnp.full((_MATMUL_SIZE, _MATMUL_SIZE), 0.5, dtype)
    product = jax.jit(lambda left, right: left @ right)
    _seconds(lambda: product(square, square))
    seconds = _best(lambda: _seconds(lambda: product(square, square)), repeats + 2)
    return 2 * _MATMUL_SIZE**3 / seconds


def _law_arguments(config: DecodeBenchConfig, batch_size: int) -> dict[str, Any]:
    one = jnp.ones((batch_size,), jnp.float32)
    return {
        "power": 4 * one,
        "inverse_temperature": one,
        "excluded": jnp.full((batch_size,), -1, jnp.int32),
        "top_k": config.top_k,
    }


def _time_decode(model: LoadedModel, config: DecodeBenchConfig, batch_size: int) -> dict[str, Any]:
    """Decodes from slot 32 to the cache's end: model and token law, fused as in the sampler."""
    num_steps = config.num_slots - PROMPT_TOKENS
    law = _law_arguments(config, batch_size)

    @functools.partial(jax.jit, donate_argnames=("cache",))
    def decode_all(params, tokens, cache, key):
        def decode_one(carry, position):
            tokens, cache = carry
            positions = jnp.full((batch_size,), position)
            logits, cache = model.language_model.decode(params, tokens, positions, cache)
            uniforms = jax.random.uniform(jax.random.fold_in(key, position), (batch_size, 2))
            return (token_law.draw_token(logits, uniforms, **law).token, cache), ()

        slots = PROMPT_TOKENS + jnp.arange(num_steps)
        return jax.lax.scan(decode_one, (tokens, cache), slots)[0]

    tokens = jnp.zeros((batch_size,), jnp.int32)
    cache = model.language_model.init_cache(batch_size, config.num_slots)
    key = jax.random.key(0)
    compile_seconds, program = _compile(decode_all, model.params, tokens, cache, key)
    seconds = []
    for _ in range(config.repeats):
        started = time.perf_counter()
        _, cache = jax.block_until_ready(program(model.params, tokens, cache, key))
        seconds.append(time.perf_counter() - started)
    return {
        "step_seconds": min(seconds) / num_steps,
        "median_step_seconds": statistics.median(seconds) / num_steps,
        "compile_seconds": compile_seconds,
    }


def _compile(function: Any, *arguments: Any) -> tuple[float, Any]:
    """Seconds to compile afresh, past the cache on disk, and the program."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        started = time.perf_counter()
        program = function.lower(*arguments).compile()
        return time.perf_counter() - started, program
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)


def _time_token_law(model: LoadedModel, config: DecodeBenchConfig, batch_size: int) -> float:
    law = _law_arguments(config, batch_size)
    logits = jax.random.normal(
        jax.random.key(1), (batch_size, model.config.vocabulary_size), jnp.float32
    )
    uniforms = jax.random.uniform(jax.random.key(2), (batch_size, 2))
    draw = jax.jit(lambda logits, uniforms: token_law.draw_token(logits, uniforms, **law))
    _seconds(lambda: draw(logits, uniforms))
    return _best(lambda: _seconds(lambda: draw(logits, uniforms)), 10 * config.repeats)


def load_reference(model: LoadedModel) -> Any:
    """The same weights in transformers; None where it is not installed or cannot hold them."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        return None
    from models import transformers_reference

    if model.quantised is not None or not transformers_reference.can_compare(model.config):
        return None
    return transformers_reference.to_transformers(model.config, model.params)


def _time_reference(
    reference: Any, model: LoadedModel, config: DecodeBenchConfig, batch_size: int
) -> float:
    """Seconds a token of ``generate``, its prefill taken off by a run of one token."""
    import torch

    prompt = torch.ones((batch_size, PROMPT_TOKENS), dtype=torch.long)

    def generate(num_tokens: int) -> float:
        started = time.perf_counter()
        with torch.inference_mode():
            reference.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=num_tokens,
                min_new_tokens=num_tokens,
                do_sample=True,
                top_k=config.top_k,
                pad_token_id=0,
            )
        return time.perf_counter() - started

    num_steps = config.num_slots - PROMPT_TOKENS
    generate(1)
    first = generate(1)
    whole = _best(lambda: generate(num_steps), config.repeats)
    return (whole - first) / (num_steps - 1)
