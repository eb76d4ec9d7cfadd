"""Faulty Metropolis-Hastings kernels as exact matrices: negative controls for the oracle's tests.

Every fault is one that a plausible implementation has. Those of the published Entropy-Cut code are
`capped_at_current_length`, `sliced_suffix` and `eos_masked_at_cut`; `published` has all three, and
for uniform cuts lacks the cut term too.
"""

from __future__ import annotations

import numpy as np

from tests.oracle import StateSpace, laws, log_cut_probabilities, state_space
from tests.toy_models import ToyModel

MUTANTS = {
    "capped_at_current_length": "a proposal gets no longer than the current trace",
    "sliced_suffix": "the current suffix is cut to the proposal's length in the ratio",
    "eos_masked_at_cut": "EOS cannot be drawn at the cut, the ratio does not know",
    "no_cut_term": "log c(t | x') - log c(t | x) is left out of the ratio",
    "untruncated_q": "log q of the ratio is that of the whole vocabulary",
    "off_by_one_at_eos": "the EOS token's own weight is left out of the ratio",
    "published": "capped, sliced and masked; with uniform cuts also without the cut term",
}


def _faults(mutant: str | None, sampler: str) -> frozenset[str]:
    """Resolves a mutant's name into its faults; None has none."""
    if mutant is None:
        return frozenset()
    if mutant not in MUTANTS:
        raise ValueError(f"mutant is {mutant!r}, expected one of {sorted(MUTANTS)}")
    if mutant != "published":
        return frozenset([mutant])
    faults = frozenset(["capped_at_current_length", "sliced_suffix", "eos_masked_at_cut"])
    return faults | {"no_cut_term"} if sampler == "uniform_cut" else faults


def mutant_transition_matrix(
    model: ToyModel,
    horizon: int,
    mutant: str | None,
    power: float,
    cut_power: float = 4.0,
    uniform_mix: float = 0.0,
    proposal_temperature: float | None = None,
    top_k: int | None = None,
    sampler: str = "entropy_cut",
    cut_first_token: bool = True,
) -> tuple[StateSpace, np.ndarray]:
    """One step of a faulty kernel.

    Args:
      model: the toy model.
      horizon: the stage's horizon in tokens.
      mutant: a name from `MUTANTS`, or None for the exact kernel, written a second time.
      power: exponent of the target.
      cut_power: exponent of the entropy jumps.
      uniform_mix: share of uniform cuts.
      proposal_temperature: None means 1 / power.
      top_k: truncation of p, None for the whole vocabulary.
      sampler: "entropy_cut" or "uniform_cut".
      cut_first_token: whether position 1 can be cut.

    Returns:
      `(space, matrix)`, the matrix [N, N] over `space.states`. The space is the stage's, except
      where proposals are capped: then it also holds the unfinished traces shorter than the
      horizon, which such a kernel moves to and never extends again.
    """
    faults = _faults(mutant, sampler)
    capped = "capped_at_current_length" in faults
    space = state_space(model, horizon, top_k, keep_unfinished=capped)
    tables = laws(model, power, proposal_temperature, top_k)
    log_q = space.along(tables.log_q)
    log_weight = space.along(tables.log_weight)
    if "untruncated_q" in faults:
        whole = laws(model, power, proposal_temperature, None)
        log_weight = power * space.along(tables.log_p) - space.along(whole.log_q)
    if "off_by_one_at_eos" in faults:
        log_weight[space.finished, space.lengths[space.finished] - 1] = 0.0
    log_cut = log_cut_probabilities(
        space, space.along(tables.entropy), cut_power, uniform_mix, sampler, cut_first_token
    )
    # Weight of the first L tokens in column L, so that a suffix's weight is a difference.
    weight_of_first = np.pad(np.cumsum(log_weight, axis=1), ((0, 0), (1, 0)))
    matrix = np.zeros((len(space.states), len(space.states)))
    for cut, first, last in space.families:
        family = slice(first, last)
        current = first + np.flatnonzero(log_cut[family, cut] > -np.inf)
        log_proposal = log_q[family, cut:].sum(axis=1)
        if "eos_masked_at_cut" in faults:
            log_proposal = log_proposal - _log_not_eos(model, space, tables.log_q, cut, family)
        proposed = np.exp(log_cut[current, cut, None] + log_proposal[None, :])
        proposed *= _can_be_proposed(space, current, family, horizon, capped)
        length_scored = space.lengths[current, None]
        if "sliced_suffix" in faults:
            length_scored = np.minimum(length_scored, space.lengths[None, family])
        current_weight = weight_of_first[current[:, None], length_scored]
        log_ratio = weight_of_first[None, family, -1] - current_weight
        if "no_cut_term" not in faults:
            log_ratio = log_ratio + log_cut[None, family, cut] - log_cut[current, cut, None]
        matrix[current, family] += proposed * np.exp(np.minimum(log_ratio, 0.0))
    return space, matrix + np.diag(1.0 - matrix.sum(axis=1))


def _log_not_eos(
    model: ToyModel, space: StateSpace, log_q: np.ndarray, cut: int, family: slice
) -> np.ndarray:
    """Log normaliser of q without EOS at the cut; +inf for the members that hold EOS there."""
    at_cut = space.tokens[family, cut]
    others = np.delete(np.exp(log_q[space.nodes[family.start, cut]]), model.eos_id)
    # Where EOS is the only token, nothing can be proposed, and nothing is normalised.
    log_others = np.log(others.sum()) if others.any() else 0.0
    return np.where(at_cut == model.eos_id, np.inf, log_others)


def _can_be_proposed(
    space: StateSpace, current: np.ndarray, family: slice, horizon: int, capped: bool
) -> np.ndarray:
    """Where a proposal may stop: [current, family] bool (one row if it is the same for all)."""
    lengths, finished = space.lengths[None, family], space.finished[None, family]
    limit = space.lengths[current, None] if capped else np.full((1, 1), horizon)
    return (finished & (lengths <= limit)) | (~finished & (lengths == limit))


def embed(law: np.ndarray, stage: StateSpace, space: StateSpace) -> np.ndarray:
    """Rewrites a law over a stage's states as one over a space that contains them."""
    chance = dict(zip(stage.states, law.tolist(), strict=True))
    return np.array([chance.get(state, 0.0) for state in space.states])


def off_stage(space: StateSpace, horizon: int) -> np.ndarray:
    """Marks the members of a space that are no states of the stage, [N] bool."""
    return ~space.finished & (space.lengths < horizon)
