"""``python -m experiments.bench --what=decode``: speed, side by side in one run."""

import dataclasses
import datetime
import json
import os
import platform
from typing import Any

import jax

import ecmh_jax
from experiments import decode_bench
from experiments.launch import setting, start
from models.load import DTYPES, load_model


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """One run of the launcher; each field is the flag of that name."""

    what: str = setting("decode", "Which benchmark.", ("decode",))
    model: str = setting("smollm2-135m", "As in experiments.sample.")
    dtype: str | None = setting(None, "Default: float32 on CPU, bfloat16 elsewhere.", DTYPES)
    batch_sizes: tuple[str, ...] = setting(
        ("1", "8", "32", "64"), "Chains that decode together, separated by commas."
    )
    num_slots: int = setting(320, "Slots of the KV cache; decoding fills them from 32 on.")
    top_k: int = setting(50, "Truncation of the token law.")
    repeats: int = setting(2, "Runs of each figure; the best counts, as others share the machine.")
    reference: bool = setting(True, "Time transformers too, where it is installed.")
    output: str | None = setting(None, "JSON file for the figures.")


def describe_machine() -> dict[str, Any]:
    """What a figure depends on."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "ecmh_jax": ecmh_jax.__version__,
    }


def run_bench(config: BenchConfig) -> dict[str, Any]:
    """Runs a benchmark, printing a line a row, and returns its figures.

    Raises:
      ValueError: a setting is unusable; the message names it.
      OSError: the model cannot be had or the output cannot be written.
    """
    if not all(size.isdigit() and int(size) > 0 for size in config.batch_sizes):
        raise ValueError(f"--batch_sizes={','.join(config.batch_sizes)}; expected numbers > 0")
    if config.num_slots <= decode_bench.PROMPT_TOKENS or config.repeats < 1:
        raise ValueError(
            f"--num_slots={config.num_slots} --repeats={config.repeats}; expected more than "
            f"{decode_bench.PROMPT_TOKENS} slots and at least one repeat"
        )
    model = load_model(config.model, config.dtype)
    figures = decode_bench.run_decode_bench(
        model,
        decode_bench.DecodeBenchConfig(
            batch_sizes=tuple(int(size) for size in config.batch_sizes),
            num_slots=config.num_slots,
            repeats=config.repeats,
            top_k=config.top_k,
            reference=config.reference,
        ),
        report=lambda line: print(line, flush=True),
    )
    result = {"machine": describe_machine(), "model": model.source, **figures}
    if config.output:
        with open(config.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return result


def main(config: BenchConfig) -> int:
    """Runs the benchmark; returns the exit status."""
    run_bench(config)
    return 0


if __name__ == "__main__":
    start(BenchConfig, main)
