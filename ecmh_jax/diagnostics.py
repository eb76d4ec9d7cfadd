"""What a run did: acceptance, cuts, lengths, distinct traces, answers, and export to ArviZ.

Everything here runs on the host, in NumPy, on the ``Result`` of a Metropolis-Hastings sampler.
``convergence`` has the effective sample sizes and R-hat of the draws that ``chain_draws`` makes;
``summarise_chains`` asks it about log p, length and entropy.
"""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ecmh_jax import convergence
from ecmh_jax.base import Info, Trace


class DistinctTraces(NamedTuple):
    """How many different traces the chains of each prompt hold; G prompts.

    Attributes:
      prompt_ids: [G], ascending.
      num_chains: [G].
      num_distinct: [G], 1..num_chains.
    """

    prompt_ids: np.ndarray
    num_chains: np.ndarray
    num_distinct: np.ndarray


def chain_draws(record: ArrayLike, stage: int | None = -1, chains: Any = None) -> np.ndarray:
    """Turns a field of ``Info`` into draws.

    Args:
      record: [num_stages, steps_per_stage, B, ...].
      stage: which stage, counted from 0 or from the end; None joins all stages, whose targets
        differ.
      chains: rows of the batch to keep, an index or a mask as NumPy takes them; default all.

    Returns:
      [C, N, ...], N the steps of one stage or of all.

    Raises:
      ValueError: the record lacks its leading axes or has no such stage.
    """
    records = np.asarray(record)
    if records.ndim < 3:
        raise ValueError(
            f"record has shape {records.shape}; expected [num_stages, steps_per_stage, B, ...]"
        )
    num_stages = len(records)
    if stage is None:
        steps = records.reshape(-1, *records.shape[2:])
    elif -num_stages <= stage < num_stages:
        steps = records[stage]
    else:
        raise ValueError(f"stage is {stage}; expected {-num_stages}..{num_stages - 1} or None")
    draws = np.swapaxes(steps, 0, 1)
    return draws if chains is None else draws[chains]


def completion_lengths(info: Info, trace: Trace, prompt_lengths: ArrayLike) -> np.ndarray:
    """Tokens of every chain's completion after every step, from the records of a finished run.

    A step that was not attempted is recorded as zeros. Its chain was frozen, and then kept its
    final length, or it had no cut, which only a completion of one token has, and only while a later
    step of it may still be attempted.

    Args:
      info: records with leading axes [num_stages, steps_per_stage, B].
      trace: the final traces of the same chains.
      prompt_lengths: [B] live prompt tokens.

    Returns:
      [num_stages, steps_per_stage, B] int64; ``chain_draws`` makes draws of it.
    """
    attempted = np.asarray(info.attempted)
    flat = attempted.reshape(-1, attempted.shape[-1])
    attempted_later = np.cumsum(flat[::-1], axis=0)[::-1].reshape(attempted.shape) > 0
    final = np.asarray(trace.length, np.int64) - np.asarray(prompt_lengths, np.int64)
    recorded = np.where(info.accepted, info.proposal_length, info.current_length)
    return np.where(attempted, recorded, np.where(attempted_later, 1, final[None, None]))


def chain_quantities(
    info: Info,
    trace: Trace,
    prompt_lengths: ArrayLike,
    stage: int | None = -1,
    chains: Any = None,
) -> dict[str, np.ndarray]:
    """Returns draws [C, N] of what each chain's completion is after every step, by name.

    ``log_prob`` (nats), ``num_tokens`` and ``mean_entropy`` (nats a token). A frozen chain keeps
    its values, so that every chain has all draws.

    Args:
      info: records with leading axes [num_stages, steps_per_stage, B].
      trace: the final traces of the same chains.
      prompt_lengths: [B] live prompt tokens.
      stage: as in ``chain_draws``.
      chains: as in ``chain_draws``; those of one prompt, if ``convergence`` is to be asked.

    Raises:
      ValueError: the records lack their leading axes or have no such stage.
    """
    log_prob = chain_draws(info.log_prob, stage, chains)
    lengths = completion_lengths(info, trace, prompt_lengths)
    return {
        "log_prob": log_prob,
        "num_tokens": chain_draws(lengths, stage, chains),
        "mean_entropy": chain_draws(info.mean_entropy, stage, chains),
    }


def summarise_chains(
    info: Info,
    trace: Trace,
    prompt_lengths: ArrayLike,
    stage: int | None = -1,
    chains: Any = None,
) -> dict[str, convergence.Summary]:
    """Returns mean, error, effective sample sizes and R-hat of each of the ``chain_quantities``.

    Chains that froze at different traces have not mixed, and R-hat says so. Chains that froze at
    one and the same look perfect: read ``distinct_traces`` beside it.

    Args:
      info: records with leading axes [num_stages, steps_per_stage, B].
      trace: the final traces of the same chains.
      prompt_lengths: [B] live prompt tokens.
      stage: as in ``chain_draws``; stages have targets of their own.
      chains: as in ``chain_draws``: the chains of one prompt.

    Raises:
      ValueError: the records lack their leading axes or have no such stage, or there is no chain.
    """
    quantities = chain_quantities(info, trace, prompt_lengths, stage, chains)
    return {name: convergence.summarise(draws) for name, draws in quantities.items()}


def acceptance_by_stage(info: Info) -> np.ndarray:
    """Accepted over attempted steps of each stage, all chains together.

    Args:
      info: records with leading axes [num_stages, steps_per_stage, B].

    Returns:
      [num_stages] float64 in 0..1, NaN for a stage without attempts.
    """
    return _ratio(np.sum(info.accepted, axis=(1, 2)), np.sum(info.attempted, axis=(1, 2)))


def cut_histogram(info: Info, num_bins: int, longest: int | None = None) -> np.ndarray:
    """Counts attempted steps by where they cut.

    Cut t of a completion of n tokens falls into bin floor(num_bins (t - 1) / n): by its place in
    its own completion. With ``longest`` n is that number instead: by its distance in tokens from
    the prompt.

    Args:
      info: records of any equal shape; slice them to look at one stage or prompt.
      num_bins: >= 1.
      longest: tokens of the longest completion, >= every cut; default each completion's own.

    Returns:
      [num_bins] int64, which sum to the attempted steps.

    Raises:
      ValueError: num_bins or longest is out of range.
    """
    return np.bincount(_cut_bins(info, num_bins, longest)[0], minlength=num_bins)


def acceptance_by_cut(info: Info, num_bins: int, longest: int | None = None) -> np.ndarray:
    """Accepted over attempted steps by where they cut, in the bins of ``cut_histogram``.

    Args:
      info: records of any equal shape.
      num_bins: >= 1.
      longest: as in ``cut_histogram``.

    Returns:
      [num_bins] float64 in 0..1, NaN for a bin without attempts.

    Raises:
      ValueError: num_bins or longest is out of range.
    """
    bins, accepted = _cut_bins(info, num_bins, longest)
    return _ratio(
        np.bincount(bins[accepted], minlength=num_bins), np.bincount(bins, minlength=num_bins)
    )


def distinct_traces(trace: Trace, prompt_ids: ArrayLike) -> DistinctTraces:
    """Counts the different token sequences among the chains of each prompt.

    Args:
      trace: B traces.
      prompt_ids: [B] integers.

    Raises:
      ValueError: there is not one prompt id a chain.
    """
    ids, lengths = np.asarray(prompt_ids), np.asarray(trace.length)
    if ids.shape != lengths.shape:
        raise ValueError(
            f"prompt_ids have shape {ids.shape}; expected {lengths.shape}, one a chain"
        )
    # The length tells a live token from the same id used as padding.
    rows = np.concatenate([ids[:, None], lengths[:, None], np.asarray(trace.tokens)], axis=1)
    prompts, num_chains = np.unique(ids, return_counts=True)
    _, num_distinct = np.unique(np.unique(rows, axis=0)[:, 0], return_counts=True)
    return DistinctTraces(prompts, num_chains, num_distinct)


def answer_indicator(answers: ArrayLike, reference: object) -> np.ndarray:
    """1 where an answer equals the reference, else 0; float64 of the shape of ``answers``.

    Args:
      answers: anything comparable, such as strings or numbers; None where there is no answer, which
        equals nothing, None included.
      reference: one answer.
    """
    entries = np.asarray(answers, dtype=object)
    equal = [entry is not None and entry == reference for entry in entries.ravel()]
    return np.asarray(equal, np.float64).reshape(entries.shape)


def answer_agreement(answers: ArrayLike) -> np.ndarray:
    """Share of chains that hold the most common answer, after each step.

    Args:
      answers: [C, N] hashable answers, None where a chain has none: it counts as a chain and agrees
        with nobody.

    Returns:
      [N] float64 in 0..1.

    Raises:
      ValueError: answers are not of shape [C, N] with C >= 1.
    """
    entries = np.asarray(answers, dtype=object)
    if entries.ndim != 2 or not len(entries):
        raise ValueError(f"answers have shape {entries.shape}; expected [C, N], C at least 1")
    votes = [[answer for answer in column if answer is not None] for column in entries.T]
    most = [max(map(column.count, column), default=0) for column in votes]
    return np.asarray(most, np.float64) / len(entries)


def to_data_tree(
    quantities: Mapping[str, ArrayLike],
    info: Info | None = None,
    stage: int | None = -1,
    chains: Any = None,
) -> Any:
    """Returns an ``xarray.DataTree`` that ArviZ reads, with dimensions ``chain`` and ``draw``.

    Args:
      quantities: names and draws [C, N, ...]: the group ``posterior``.
      info: records with leading axes [num_stages, steps_per_stage, B]: the group ``sample_stats``,
        under their own names, with the fields of ``info.proposal`` beside them where it was kept.
      stage: the stage that the draws are of, as in ``chain_draws``.
      chains: rows of the batch that the draws are of, as in ``chain_draws``.

    Raises:
      ValueError: arviz_base is not installed, or shapes do not go together.
    """
    groups = {"posterior": {name: np.asarray(draws) for name, draws in quantities.items()}}
    if info is not None:
        records = info._asdict()
        proposal = records.pop("proposal", ())
        records |= proposal._asdict() if proposal else {}
        groups["sample_stats"] = {
            name: chain_draws(record, stage, chains) for name, record in records.items()
        }
    # A quantity may have the name of a record, as ``log_prob`` does.
    shapes = {
        f"{group}/{name}": draws.shape
        for group, members in groups.items()
        for name, draws in members.items()
    }
    if not quantities or min(map(len, shapes.values())) < 2:
        raise ValueError(f"draws have shapes {shapes}; expected at least one quantity of [C, N]")
    if len({shape[:2] for shape in shapes.values()}) != 1:
        raise ValueError(f"draws have shapes {shapes}; expected the same C and N of all")
    try:
        # An optional extra, so looked up when it is asked for.
        arviz_base = importlib.import_module("arviz_base")
    except ImportError as error:
        raise ValueError(
            "arviz_base is not installed, which to_data_tree needs: pip install 'ecmh_jax[arviz]'"
        ) from error
    # ArviZ would take more chains than draws for swapped axes; here it is an ordinary run.
    return arviz_base.from_dict(groups, check_conventions=False)


def _cut_bins(info: Info, num_bins: int, longest: int | None):
    """The bin of every attempted step and whether it was accepted, both [steps]."""
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}; expected at least 1")
    attempted = np.asarray(info.attempted)
    cuts = np.asarray(info.cut, np.int64)[attempted]
    lengths = np.asarray(info.current_length, np.int64)[attempted]
    if longest is not None:
        last_cut = cuts.max(initial=1)
        if longest < last_cut:
            raise ValueError(f"longest is {longest}; expected at least the last cut, {last_cut}")
        lengths = np.full_like(cuts, longest)
    return (cuts - 1) * num_bins // lengths, np.asarray(info.accepted)[attempted]


def _ratio(part, whole):
    """``part / whole``, NaN where whole is 0."""
    part = np.asarray(part, np.float64)
    whole = np.broadcast_to(np.asarray(whole, np.float64), part.shape)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
