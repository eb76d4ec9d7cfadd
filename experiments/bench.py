"""``python -m experiments.bench``: speed, side by side in one run.

``--what=decode`` times decoding alone; ``--what=engine`` the engine against lockstep;
``--what=samplers`` compares what the samplers draw for the same number of decoded tokens.
"""

import dataclasses
import datetime
import json
import os
import platform
from typing import Any

import jax

import ecmh_jax
from ecmh_jax import SAMPLERS
from experiments import decode_bench, engine_bench, samplers_bench
from experiments.launch import setting, start
from experiments.prompts import EncodedPrompts
from models.attention import IMPLEMENTATIONS
from models.load import DTYPES, LoadedModel, load_model
from models.quantisation import KINDS


@dataclasses.dataclass(frozen=True)
class BenchConfig:
    """One run of the launcher; each field is the flag of that name."""

    what: str = setting("decode", "Which benchmark.", ("decode", "engine", "samplers"))
    model: str = setting("smollm2-135m", "As in experiments.sample.")
    dtype: str | None = setting(None, "Default: float32 on CPU, bfloat16 elsewhere.", DTYPES)
    quantise: str | None = setting(None, "As in experiments.sample.", KINDS)
    decode_attention: str | None = setting(
        None, "Default: the best known for the device.", IMPLEMENTATIONS
    )
    batch_sizes: tuple[str, ...] = setting(
        ("1", "8", "32", "64"), "Chains that decode together, separated by commas."
    )
    cache_slots: int = setting(
        320, "decode: slots of the KV cache; decoding fills them from 32 on."
    )
    top_k: int = setting(50, "Truncation of the token law.")
    repeats: int = setting(2, "Runs of each figure; the best counts, as others share the machine.")
    reference: bool = setting(True, "Time transformers too, where it is installed.")
    forms: tuple[str, ...] = setting(
        tuple(engine_bench.FORMS), f"engine: some of {', '.join(engine_bench.FORMS)}."
    )
    sampler: str = setting("entropy_cut", "engine.", ("entropy_cut", "uniform_cut"))
    samplers: tuple[str, ...] = setting(SAMPLERS, f"samplers: some of {', '.join(SAMPLERS)}.")
    power: float = setting(4.0, "engine, samplers: alpha.")
    prompts_file: str | None = setting(
        None, "engine, samplers: as in experiments.sample; default: eight of our own."
    )
    num_prompts: int = setting(8, "engine, samplers: how many of the prompts, from the first on.")
    num_chains: int = setting(4, "engine, samplers: chains of each prompt.")
    num_slots: int = setting(32, "engine, samplers: rows that decode together.")
    num_stages: int = setting(8, "engine, samplers: stages.")
    stage_length: int = setting(20, "engine, samplers: tokens of a stage.")
    steps_per_stage: int = setting(
        5, "engine, samplers: Metropolis-Hastings steps of a stage of entropy_cut."
    )
    num_tries: int = setting(4, "samplers: J of multiple_try.")
    steps_per_tick: int = setting(4, "engine: decode steps of a call.")
    usual_proposals: int = setting(
        24, "engine: proposals timed in the usual way, by transformers; 0 for none."
    )
    parts: bool = setting(True, "engine: time the parts of a decode step and read its memory.")
    seed: int = setting(0, "engine: seed of the run.")
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
    check, run = {
        "decode": (_check_decode, _run_decode),
        "engine": (_check_engine, _run_engine),
        "samplers": (_check_samplers, _run_samplers),
    }[config.what]
    check(config)
    if config.output:  # before the work, not after it
        with open(config.output, "a", encoding="utf-8"):
            pass
    model = load_model(
        config.model,
        config.dtype,
        quantise=config.quantise,
        decode_attention=config.decode_attention,
    )
    result = {"machine": describe_machine(), "model": model.source, **run(config, model)}
    if config.output:
        with open(config.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
            file.write("\n")
    return result


def _check_decode(config: BenchConfig) -> None:
    if not all(size.isdigit() and int(size) > 0 for size in config.batch_sizes):
        raise ValueError(f"--batch_sizes={','.join(config.batch_sizes)}; expected numbers > 0")
    if config.cache_slots <= decode_bench.PROMPT_TOKENS or config.repeats < 1:
        raise ValueError(
            f"--cache_slots={config.cache_slots} --repeats={config.repeats}; expected more than "
            f"{decode_bench.PROMPT_TOKENS} slots and at least one repeat"
        )


def _run_decode(config: BenchConfig, model: LoadedModel) -> dict[str, Any]:
    return decode_bench.run_decode_bench(
        model,
        decode_bench.DecodeBenchConfig(
            batch_sizes=tuple(int(size) for size in config.batch_sizes),
            num_slots=config.cache_slots,
            repeats=config.repeats,
            top_k=config.top_k,
            reference=config.reference,
        ),
        report=_report,
    )


def _check_engine(config: BenchConfig) -> None:
    unknown = [form for form in config.forms if form not in engine_bench.FORMS]
    if unknown or not config.forms:
        raise ValueError(
            f"--forms={','.join(config.forms)}; expected some of {', '.join(engine_bench.FORMS)}"
        )
    _check_least(config, "steps_per_tick", "repeats", *_OF_CHAINS, usual_proposals=0)
    if config.usual_proposals == 1:
        raise ValueError("--usual_proposals=1; expected 0 or at least 2, for a standard error")


_OF_CHAINS = (
    "num_prompts",
    "num_chains",
    "num_slots",
    "num_stages",
    "stage_length",
    "steps_per_stage",
)


def _check_least(config: BenchConfig, *at_least_one: str, **others: int) -> None:
    for name, bound in {**dict.fromkeys(at_least_one, 1), **others}.items():
        if getattr(config, name) < bound:
            raise ValueError(f"--{name}={getattr(config, name)}; expected at least {bound}")


def _check_samplers(config: BenchConfig) -> None:
    unknown = [name for name in config.samplers if name not in SAMPLERS]
    if unknown or not config.samplers:
        raise ValueError(
            f"--samplers={','.join(config.samplers)}; expected some of {', '.join(SAMPLERS)}"
        )
    _check_least(config, "num_tries", *_OF_CHAINS)
    if config.num_slots < config.num_tries:
        raise ValueError(
            f"--num_slots={config.num_slots}; expected at least --num_tries={config.num_tries}"
        )


def _run_samplers(config: BenchConfig, model: LoadedModel) -> dict[str, Any]:
    return samplers_bench.run_samplers_bench(
        model,
        samplers_bench.SamplersBenchConfig(
            samplers=config.samplers,
            power=config.power,
            top_k=config.top_k or None,
            num_chains=config.num_chains,
            num_slots=config.num_slots,
            num_stages=config.num_stages,
            stage_length=config.stage_length,
            steps_per_stage=config.steps_per_stage,
            num_tries=config.num_tries,
            seed=config.seed,
        ),
        _encode(config, model),
        report=_report,
    )


def _encode(config: BenchConfig, model: LoadedModel) -> EncodedPrompts:
    return engine_bench.encode(config.prompts_file, model, config.num_prompts)


def _run_engine(config: BenchConfig, model: LoadedModel) -> dict[str, Any]:
    return engine_bench.run_engine_bench(
        model,
        engine_bench.EngineBenchConfig(
            forms=config.forms,
            sampler=config.sampler,
            power=config.power,
            top_k=config.top_k or None,
            num_chains=config.num_chains,
            num_slots=config.num_slots,
            num_stages=config.num_stages,
            stage_length=config.stage_length,
            steps_per_stage=config.steps_per_stage,
            steps_per_tick=config.steps_per_tick,
            usual_proposals=config.usual_proposals if config.reference else 0,
            parts=config.parts,
            repeats=config.repeats,
            seed=config.seed,
        ),
        _encode(config, model),
        report=_report,
    )


def _report(line: str) -> None:
    print(line, flush=True)


def main(config: BenchConfig) -> int:
    """Runs the benchmark; returns the exit status."""
    run_bench(config)
    return 0


if __name__ == "__main__":
    start(BenchConfig, main)
