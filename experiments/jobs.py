"""A sampler over many chains, whatever its kind: compiled first, then run with its progress."""

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from ecmh_jax import chain_queue, group_sampling
from ecmh_jax.base import Config
from ecmh_jax.engine import Finished
from ecmh_jax.group_sampling import GROUP_SAMPLERS
from experiments import chains as chains_lib
from experiments.progress import GroupProgress, Progress
from models.load import LoadedModel


class Job(NamedTuple):
    """What one sampler is to do.

    Attributes:
      sampler: one of ``ecmh_jax.SAMPLERS``.
      rng_key: scalar typed key, the run's seed.
      model: the model.
      chains: the chains.
      config: the sampler's own schedule.
      num_slots: rows that decode together.
      options: its own settings, None for a chain a row.
      budget: [N] integers, decoded tokens that each result of ``best_of_n`` may spend; None for no
        limit.
    """

    sampler: str
    rng_key: jax.Array
    model: LoadedModel
    chains: chain_queue.Chains
    config: Config
    num_slots: int
    options: Any = None
    budget: np.ndarray | None = None


def rows_of(sampler: str, options: Any, num_chains: int) -> tuple[int, int]:
    """Rows that a sampler needs at least, and those beyond which more are of no use."""
    if sampler not in GROUP_SAMPLERS:
        return 1, num_chains
    rows = GROUP_SAMPLERS[sampler].module.rows_per_chain(options)
    return rows, rows * num_chains


def make_progress(job: Job) -> Progress | GroupProgress:
    """Returns the progress of a job of which nothing is done."""
    num_chains = len(job.chains.prompts)
    if job.sampler in GROUP_SAMPLERS:
        return GroupProgress(num_chains)
    return Progress(num_chains, job.num_slots, chains_lib.STEPS_PER_TICK, job.config)


def run_job(job: Job, progress: Progress | GroupProgress) -> Iterator[dict[int, Finished]]:
    """Yields chains as they finish, by their index; adds to ``progress`` and shows it."""
    with tqdm(
        total=progress.work,
        desc=f"{job.sampler}: compiling",
        bar_format="{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]",
        smoothing=0,  # time left by the average so far: chains do not finish evenly
        disable=None,
    ) as bar:
        progress.compile_seconds = _compile(job)
        bar.set_description_str(job.sampler, refresh=False)
        bar.reset()
        started = time.perf_counter()
        if isinstance(progress, GroupProgress):
            updates = _run_groups(job, progress, started)
        else:
            updates = _run_queue(job, progress, started)
        for finished in updates:
            bar.set_postfix_str(progress.describe(), refresh=False)
            bar.update(progress.work_done - bar.n)
            if finished:
                yield finished


def _compile(job: Job) -> float:
    if job.sampler in GROUP_SAMPLERS:
        return chains_lib.compile_rounds(
            job.rng_key,
            job.model,
            job.chains,
            job.config,
            job.sampler,
            job.options,
            job.num_slots,
            job.budget,
        )
    return chains_lib.compile_programs(job.rng_key, job.model, job.config, job.num_slots)


def _run_queue(job: Job, progress: Progress, started: float) -> Iterator[dict[int, Finished]]:
    for update in chain_queue.run_queue(
        job.rng_key,
        job.model.language_model,
        job.model.params,
        job.chains,
        job.config,
        job.num_slots,
        chains_lib.STEPS_PER_TICK,
    ):
        progress.add(update, time.perf_counter() - started)
        yield update.finished


def _run_groups(job: Job, progress: GroupProgress, started: float) -> Iterator[dict[int, Finished]]:
    for update in group_sampling.run_groups(
        job.rng_key,
        job.model.language_model,
        job.model.params,
        job.chains,
        job.config,
        job.sampler,
        job.options,
        job.num_slots,
        job.budget,
    ):
        progress.add(update, time.perf_counter() - started)
        finished: dict[int, Finished] = {}
        if update.result is not None:
            for place, index in enumerate(update.members):
                finished[int(index)] = Finished(
                    *group_sampling.select(job.sampler, update.result, place)
                )
        yield finished
