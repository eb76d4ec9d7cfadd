"""``python -m experiments.sample``: samples completions of prompts and shows what it cost.

Without flags it is a demonstration: a small model, three prompts, standard, low-temperature and
Entropy-Cut Metropolis-Hastings sampling side by side.
"""

import dataclasses
import time
from typing import Any

import jax
from absl import flags

from ecmh_jax import Config, Tuning, checks, make_tuning, sampling
from experiments import chains as chains_lib
from experiments import jobs as jobs_lib
from experiments import memory as memory_lib
from experiments import prompts as prompts_lib
from experiments import sampler_options, summaries, text_report
from experiments.jobs import Job
from experiments.launch import setting, start
from experiments.progress import GroupProgress, Progress
from experiments.run_folder import RunFolder
from models.load import DTYPES, fit_length, load_model
from models.quantisation import KINDS

_LONGEST_CONTEXT = 1 << 24  # for models without a longest one: far beyond any memory


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """One run of the launcher; each field is the flag of that name."""

    model: str = setting(
        "smollm2-135m",
        "smollm2-135m (fetched once, 93 MB), a Hugging Face folder, a .gguf file, a hub id "
        "owner/name[@revision], or random:NAME (a published shape with random weights).",
    )
    context_length: int | None = setting(
        None,
        "Positions for which rotary positions that depend on the length are set (LongRoPE, YaRN). "
        "Default: the longest prompt's and --max_new_tokens.",
    )
    revision: str | None = setting(None, "Branch, tag or commit of a hub id.")
    dtype: str | None = setting(None, "Default: float32 on CPU, bfloat16 elsewhere.", DTYPES)
    quantise: str | None = setting(
        None,
        "Keep matrices in int8 on the device (needs qwix). Another p, hence another target; "
        "smaller, and of no use on a CPU.",
        KINDS,
    )
    prompt: tuple[str, ...] = setting(
        (), "A prompt; may be repeated. Default: the demonstration's three.", repeated=True
    )
    prompts_file: str | None = setting(None, 'Prompts: one a line, or .jsonl rows with a "prompt".')
    chat: bool | None = setting(
        None, "Apply the model's chat template. Default: where the model has one."
    )
    sampler: tuple[str, ...] = setting(
        ("standard", "low_temperature", "entropy_cut"),
        f"Separated by commas, of {', '.join(sampling.SAMPLERS)}.",
    )
    option: tuple[str, ...] = setting(
        (),
        "SAMPLER.SETTING=VALUE; may be repeated. Settings and defaults: "
        f"{sampler_options.describe_settings()}.",
        repeated=True,
    )
    power: float = setting(4.0, "alpha of the target p^alpha.")
    proposal_temperature: float | None = setting(None, "tau of the proposal. Default: 1 / power.")
    cut_power: float = setting(4.0, "beta: cuts fall where entropy jumps up, to this power.")
    uniform_mix: float = setting(0.0, "Share of uniform cuts, 0 to 1.")
    cut_first_token: bool = setting(True, "Whether the first token may be cut.")
    top_k: int = setting(50, "Truncation of p itself; 0 for the whole vocabulary.")
    num_chains: int = setting(8, "Chains of each prompt.")
    num_slots: str = setting(
        "auto",
        "Rows that decode together, the others wait for a free slot; auto: all that fit into "
        f"memory, at most {memory_lib.MOST_SLOTS_ON_CPU} on a CPU. It moves the last bits: to "
        "repeat a run elsewhere, give the number that its summary.json holds.",
    )
    max_new_tokens: int = setting(64, "Longest completion.")
    num_stages: int = setting(4, "Stages; must divide max_new_tokens. The paper has 16.")
    steps_per_stage: int = setting(4, "Metropolis-Hastings steps a stage. The paper has 10.")
    refine_finished: bool = setting(
        False, "Keep refining chains that have ended: what makes the final law p^power."
    )
    replay: bool = setting(True, "Decode proposals from their first divergence only.")
    early_rejection: bool = setting(True, "Stop proposals that can no longer be accepted.")
    seed: int = setting(0, "Seed of the run.")
    output_dir: str | None = setting(None, "Receives traces.jsonl, summary.json and flags.txt.")


def run_sample(config: SampleConfig, flags_text: str = "") -> dict[str, Any]:
    """Samples every prompt by every sampler.

    An interrupt (Ctrl-C) ends the run early; the chains that had finished are kept.

    Args:
      config: the run.
      flags_text: what to write to ``flags.txt``.

    Returns:
      The summary, as in ``summary.json``, with the rows of ``traces.jsonl`` under "rows".

    Raises:
      ValueError: a setting or a file is unusable; the message names it.
      OSError: the model cannot be had.
    """
    texts = _prompt_texts(config)
    num_slots = memory_lib.parse_num_slots(config.num_slots)
    run = _static_config(config, prompt_length=1, eos_ids=(), pad_id=0)
    for sampler in config.sampler:  # before any weight is read
        sampling.specialise(sampler, _tuning(config, 1), run)
    options = sampler_options.read_options(config.sampler, config.option)
    checks.check_config(run)
    folder = RunFolder(config.output_dir, flags_text) if config.output_dir else None
    model = load_model(config.model, config.dtype, config.revision, quantise=config.quantise)
    pad_id = model.eos_ids[0] if model.eos_ids else 0
    prompts = prompts_lib.encode_prompts(texts, model, config.chat, pad_id)
    run = _static_config(config, prompts.tokens.shape[1], model.eos_ids, pad_id)
    chains_lib.check(model, prompts, run)
    needed_length = int(prompts.lengths.max()) + run.max_new_tokens
    most = min(model.config.longest_length, _LONGEST_CONTEXT)
    if config.context_length is not None and not needed_length <= config.context_length <= most:
        raise ValueError(
            f"--context_length={config.context_length}; expected {needed_length}, which the "
            f"longest prompt and --max_new_tokens need, to {most}"
        )
    model = fit_length(model, config.context_length or needed_length)
    num_chains = len(texts) * config.num_chains
    demands, schedules = [], {}
    for sampler in config.sampler:
        tuning, schedule = sampling.specialise(sampler, _tuning(config, num_chains), run)
        schedules[sampler] = tuning, schedule
        rows_needed = jobs_lib.rows_of(sampler, options[sampler], num_chains)
        demands.append(memory_lib.Demand(sampler, schedule, *rows_needed))
    memory = memory_lib.reserve(num_slots, model, demands)
    jobs = [
        Job(
            demand.sampler,
            jax.random.key(config.seed),
            model,
            chains_lib.lay_out(prompts, config.num_chains, schedules[demand.sampler][0]),
            demand.config,
            memory.num_slots if num_slots else min(memory.num_slots, demand.most),
            options[demand.sampler],
        )
        for demand in demands
    ]

    rows: list[dict[str, Any]] = []
    runs: dict[str, Progress | GroupProgress] = {}
    interrupted = False
    try:
        for job in jobs:
            progress = runs[job.sampler] = jobs_lib.make_progress(job)
            for finished in jobs_lib.run_job(job, progress):
                rows += [
                    summaries.describe_chain(
                        job.sampler,
                        job.chains,
                        index,
                        chain,
                        progress.forwards_of(index),
                        job.model,
                        job.config,
                    )
                    for index, chain in finished.items()
                ]
                if folder:
                    folder.update_rows(rows)
    except KeyboardInterrupt:
        interrupted = True
    except jax.errors.JaxRuntimeError as error:
        if memory_lib.is_out_of_memory(error):
            raise memory_lib.out_of_memory(memory) from error
        raise
    finally:
        order = {sampler: place for place, sampler in enumerate(config.sampler)}
        rows.sort(key=lambda row: (order[row["sampler"]], row["prompt_id"], row["chain"]))
        if folder and rows:  # a folder without any may be used again
            folder.write_rows(rows)
    summary = summaries.summarise(rows, runs, prompts.texts, model, memory, interrupted)
    if folder:
        folder.write_summary(summary)
    return summary | {"rows": rows}


def _prompt_texts(config: SampleConfig) -> tuple[str, ...]:
    if config.prompt and config.prompts_file:
        raise ValueError("--prompt and --prompts_file are both given; expected one of them")
    if not config.sampler:
        raise ValueError(f"--sampler is empty; expected some of {', '.join(sampling.SAMPLERS)}")
    if config.num_chains < 1:
        raise ValueError(f"--num_chains={config.num_chains}; expected at least 1")
    if config.prompts_file:
        return prompts_lib.read_prompts(config.prompts_file)
    return config.prompt or prompts_lib.DEMONSTRATION


def _static_config(
    config: SampleConfig, prompt_length: int, eos_ids: tuple[int, ...], pad_id: int
) -> Config:
    return Config(
        prompt_length=prompt_length,
        max_new_tokens=config.max_new_tokens,
        num_stages=config.num_stages,
        steps_per_stage=config.steps_per_stage,
        top_k=config.top_k or None,
        eos_ids=eos_ids,
        pad_id=pad_id,
        refine_finished=config.refine_finished,
        cut_first_token=config.cut_first_token,
        replay=config.replay,
        early_rejection=config.early_rejection,
    )


def _tuning(config: SampleConfig, num_chains: int) -> Tuning:
    return make_tuning(
        num_chains,
        power=config.power,
        proposal_temperature=config.proposal_temperature,
        cut_power=config.cut_power,
        uniform_mix=config.uniform_mix,
    )


def main(config: SampleConfig) -> int:
    """Runs the launcher and prints its report; returns the exit status."""
    started = time.perf_counter()
    result = run_sample(config, flags.FLAGS.flags_into_string())
    print(text_report.describe(result, seconds=time.perf_counter() - started))
    return 130 if result["interrupted"] else 0


if __name__ == "__main__":
    start(SampleConfig, main)
