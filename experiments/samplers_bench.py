"""Every sampler at equal decoded tokens, in one process on one model.

Entropy-cut Metropolis-Hastings runs first; what it decodes is what every other sampler may spend.
Best-of-N takes that as its budget, result by result. The others are given the amount of work
(steps, particles, candidates) that comes nearest to it, found from what a first run with a guess
costs; what they spent in the end stands in the table.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ecmh_jax import best_of_n, make_tuning, multiple_try, power_smc, sampling, smc, tmc
from ecmh_jax.base import Config
from ecmh_jax.group_sampling import GROUP_SAMPLERS
from experiments import chains as chains_lib
from experiments import jobs as jobs_lib
from experiments import memory as memory_lib
from experiments import prompts as prompts_lib
from experiments import summaries
from experiments.grading.integers import find_number
from experiments.jobs import Job
from models.load import LoadedModel, fit_length

REFERENCE = "entropy_cut"
EXACT = ("entropy_cut", "uniform_cut", "multiple_try", "smc", "power_smc")
_ONE_DRAW = ("standard", "low_temperature")
_NEAR = 0.1  # share of the tokens by which the first run may miss them
_MOST_CANDIDATES = 256  # of best-of-N, as the paper has it; the budget ends them earlier
_LARGEST = 64  # particles or candidates of a result, and tries of a first guess


@dataclasses.dataclass(frozen=True)
class SamplersBenchConfig:
    """What to run.

    Attributes:
      samplers: some of ``ecmh_jax.SAMPLERS``; the reference is run whether named or not.
      power: alpha.
      top_k: truncation of the token law.
      num_chains: results of each prompt.
      num_slots: rows that decode together.
      num_stages: stages of the schedule.
      stage_length: tokens of a stage.
      steps_per_stage: Metropolis-Hastings steps of a stage, of the reference.
      num_tries: J of ``multiple_try``.
      seed: of the run.
    """

    samplers: tuple[str, ...]
    power: float
    top_k: int | None
    num_chains: int
    num_slots: int
    num_stages: int
    stage_length: int
    steps_per_stage: int
    num_tries: int
    seed: int


class _Setting(NamedTuple):
    """How much work a sampler is given: its run, its options and the number that was chosen."""

    config: Config
    options: Any
    work: int


def run_samplers_bench(
    model: LoadedModel,
    config: SamplersBenchConfig,
    prompts: prompts_lib.EncodedPrompts,
    report: Callable[[str], None],
) -> dict[str, Any]:
    """Runs the samplers and compares them.

    Args:
      model: the model.
      config: what to run.
      prompts: their tokens.
      report: receives a line a sampler.

    Returns:
      The figures: "samplers" is a row a sampler, "chains" one a result.

    Raises:
      ValueError: prompt and completion do not fit into the model's context, or the rows of a
        result into the slots.
    """
    run = Config(
        prompt_length=prompts.tokens.shape[1],
        max_new_tokens=config.num_stages * config.stage_length,
        num_stages=config.num_stages,
        steps_per_stage=config.steps_per_stage,
        top_k=config.top_k,
        eos_ids=model.eos_ids,
        pad_id=model.eos_ids[0] if model.eos_ids else 0,
    )
    chains_lib.check(model, prompts, run)
    model = fit_length(model, int(prompts.lengths.max()) + run.max_new_tokens)
    num_results = len(prompts.texts) * config.num_chains
    demand = memory_lib.Demand(REFERENCE, run, 1, num_results)
    memory_lib.reserve(config.num_slots, model, [demand])
    figures: dict[str, Any] = {"config": dataclasses.asdict(config), "prompts": len(prompts.texts)}
    rows: dict[str, list[dict[str, Any]]] = {}
    table: dict[str, dict[str, Any]] = {}
    names = (REFERENCE, *(name for name in config.samplers if name != REFERENCE))
    for sampler in names:
        spent = [row["decoded_tokens"] for row in rows.get(REFERENCE, [])]
        setting, rows[sampler], seconds = _spend(model, prompts, sampler, config, run, spent)
        table[sampler] = describe(sampler, setting, rows, seconds, config.num_chains)
        report(_line(sampler, table[sampler]))
    figures["samplers"] = table
    figures["chains"] = [
        {name: row[name] for name in _KEPT_OF_ROWS} for of in rows.values() for row in of
    ]
    return figures


_KEPT_OF_ROWS = (
    "sampler",
    "prompt_id",
    "chain",
    "num_tokens",
    "ended",
    "log_prob",
    "entropy",
    "accepted",
    "attempted",
    "decoded_tokens",
    "text",
)


def _spend(
    model: LoadedModel,
    prompts: prompts_lib.EncodedPrompts,
    sampler: str,
    config: SamplersBenchConfig,
    run: Config,
    spent: Sequence[int],
) -> tuple[_Setting, list[dict[str, Any]], float]:
    """Runs a sampler so that it decodes as many tokens as ``spent``; none: as it is configured."""
    if sampler in (REFERENCE, *_ONE_DRAW):
        setting = _Setting(run, None, run.steps_per_stage)
        return setting, *_run(model, prompts, sampler, config, setting, None)
    if sampler == "best_of_n":
        rows = min(8, config.num_slots)
        candidates = rows * math.ceil(_MOST_CANDIDATES / rows)
        setting = _Setting(run, best_of_n.Options(candidates, rows=rows), candidates)
        return setting, *_run(model, prompts, sampler, config, setting, np.asarray(spent))
    work = _guess(sampler, config, run, float(np.mean(spent)))
    for attempt in range(2):
        setting = _set_work(sampler, config, run, work)
        rows, seconds = _run(model, prompts, sampler, config, setting, None)
        ratio = sum(spent) / max(1, sum(row["decoded_tokens"] for row in rows))
        better = max(1, round(setting.work * ratio))
        if attempt or abs(ratio - 1) <= _NEAR or _set_work(sampler, config, run, better) == setting:
            break
        work = better
    return setting, rows, seconds


def _guess(sampler: str, config: SamplersBenchConfig, run: Config, tokens: float) -> int:
    """A first amount of work, from the tokens of a result if every draw filled its horizon."""
    if sampler in ("smc", "power_smc"):
        return round(tokens / run.max_new_tokens)
    if sampler == "tmc":
        return round(tokens / run.max_new_tokens / 2)
    if sampler == "multiple_try":
        return round(config.steps_per_stage / config.num_tries)
    return config.steps_per_stage


def _set_work(sampler: str, config: SamplersBenchConfig, run: Config, work: int) -> _Setting:
    """Particles, candidates (as many rollouts as candidates) or steps a stage, at least 1."""
    work = max(1, work)
    if sampler in ("smc", "power_smc"):
        particles = min(work, _LARGEST, config.num_slots)
        options = smc.Options if sampler == "smc" else power_smc.Options
        return _Setting(run, options(num_particles=particles), particles)
    if sampler == "tmc":
        candidates = max(2, min(work, _LARGEST, config.num_slots))
        kept = max(1, math.isqrt(candidates))
        rollouts = max(2, candidates // kept)
        return _Setting(run, tmc.Options(candidates, kept, rollouts), candidates)
    options = None
    if sampler == "multiple_try":
        options = multiple_try.Options(config.num_tries)
    elif sampler in GROUP_SAMPLERS:
        options = GROUP_SAMPLERS[sampler].default
    return _Setting(dataclasses.replace(run, steps_per_stage=work), options, work)


def _run(
    model: LoadedModel,
    prompts: prompts_lib.EncodedPrompts,
    sampler: str,
    config: SamplersBenchConfig,
    setting: _Setting,
    budget: np.ndarray | None,
) -> tuple[list[dict[str, Any]], float]:
    """Runs a sampler; returns its rows, in the order of the chains, and seconds."""
    tuning = make_tuning(len(prompts.texts) * config.num_chains, power=config.power)
    tuning, run = sampling.specialise(sampler, tuning, setting.config)
    chains = chains_lib.lay_out(prompts, config.num_chains, tuning)
    key = jax.random.key(config.seed)
    job = Job(sampler, key, model, chains, run, config.num_slots, setting.options, budget)
    progress = jobs_lib.make_progress(job)
    rows: dict[int, dict[str, Any]] = {}
    for finished in jobs_lib.run_job(job, progress):
        for index, chain in finished.items():
            rows[index] = summaries.describe_chain(
                sampler, chains, index, chain, progress.forwards_of(index), model, run
            )
    return [rows[index] for index in sorted(rows)], progress.seconds


def describe(
    sampler: str,
    setting: _Setting,
    rows: dict[str, list[dict[str, Any]]],
    seconds: float,
    num_chains: int,
) -> dict[str, Any]:
    """Returns a sampler's row of the table, beside the reference.

    Differences are paired by (prompt, chain), and their standard error goes by prompts.
    """
    own, reference = rows[sampler], rows[REFERENCE]
    log_prob = np.array([row["log_prob"] for row in own])
    difference = log_prob - np.array([row["log_prob"] for row in reference])
    by_prompt = difference.reshape(-1, num_chains).mean(axis=1)
    answers = [find_number(row["text"], last_number=True) for row in own]
    of_prompts = [answers[start : start + num_chains] for start in range(0, len(own), num_chains)]
    attempted = sum(row["attempted"] for row in own)
    decoded = float(np.mean([row["decoded_tokens"] for row in own]))
    least_ess = [row["details"]["least_ess"] for row in own if "least_ess" in row["details"]]
    return {
        "exact": sampler in EXACT,
        "work": setting.work,
        "options": None if setting.options is None else dataclasses.asdict(setting.options),
        "mean_log_prob": float(log_prob.mean()),
        "difference": float(difference.mean()),
        "difference_standard_error": (
            float(by_prompt.std(ddof=1) / math.sqrt(len(by_prompt))) if len(by_prompt) > 1 else None
        ),
        "mean_log_prob_per_token": float(
            np.mean([row["log_prob"] / max(1, row["num_tokens"]) for row in own])
        ),
        "mean_num_tokens": float(np.mean([row["num_tokens"] for row in own])),
        "distinct_answers": float(np.mean([len(set(group) - {None}) for group in of_prompts])),
        "acceptance": sum(row["accepted"] for row in own) / attempted if attempted else None,
        "mean_least_ess": float(np.mean(least_ess)) if least_ess else None,
        "decoded_tokens": decoded,
        "of_the_reference": decoded / float(np.mean([row["decoded_tokens"] for row in reference])),
        "seconds": seconds,
    }


def _line(sampler: str, row: dict[str, Any]) -> str:
    spread = row["difference_standard_error"]
    rate = "" if row["acceptance"] is None else f", accepted {row['acceptance']:.0%}"
    ess = "" if row["mean_least_ess"] is None else f", least ESS {row['mean_least_ess']:.1f}"
    return (
        f"{sampler:22} {'exact' if row['exact'] else '     '} work {row['work']:3}  "
        f"log p {row['mean_log_prob']:7.2f} ({row['difference']:+6.2f}"
        f"{'' if spread is None else f' +- {spread:.2f}'})  {row['mean_num_tokens']:5.1f} tokens  "
        f"{row['distinct_answers']:.2f} answers  decoded {row['decoded_tokens']:6.0f} "
        f"({row['of_the_reference']:.2f} x)  {row['seconds']:6.1f} s{rate}{ess}"
    )
