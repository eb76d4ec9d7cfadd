"""Exact laws of Entropy-Cut Metropolis-Hastings on toy models, by enumeration.

NumPy float64, no JAX, nothing imported from the library: this file is the second opinion. It is
written from the formulas, with whole distributions where the library draws samples.

Notation, for a completion x of n tokens, positions t = 1..n (0-based in arrays):

    p(v | x_<t)   next-token law after top-k truncation and renormalisation
    q             p^(1 / proposal_temperature), renormalised: the proposal law
    H_t           entropy of p(. | x_<t), the law from which token t was drawn; nats
    log_weight_t  power * log p(x_t) - log q(x_t)
    c(t | x)      probability of cutting before token t, so that x_<t is kept

A stage with horizon h has as its states the completions that end in EOS at a length n <= h, and
those of h tokens without EOS. Its target is pi(x) proportional to p(x)^power.
Vectors over states follow the order of `states`, matrices have the current state as their row.
"""

from __future__ import annotations

import numpy as np

from tests.enumeration import (
    Laws,
    State,
    StateSpace,
    entropy,
    laws,
    proposal_law,
    state_space,
    truncated_law,
)
from tests.toy_models import ToyModel

__all__ = [
    "Laws",
    "State",
    "StateSpace",
    "coupled_suffix_law",
    "cut_probabilities",
    "entropy",
    "extension_law",
    "final_law",
    "laws",
    "log_cut_probabilities",
    "proposal_law",
    "state_space",
    "states",
    "target",
    "total_variation",
    "transition_matrix",
    "truncated_law",
]


def states(model: ToyModel, horizon: int, top_k: int | None = None) -> list[State]:
    """Lists the states of a stage: EOS at a length <= horizon, or `horizon` tokens without EOS."""
    return state_space(model, horizon, top_k).states


def target(model: ToyModel, horizon: int, power: float, top_k: int | None = None) -> np.ndarray:
    """The stage target pi(x) proportional to p(x)^power, [N] over `states`."""
    space = state_space(model, horizon, top_k)
    log_p = space.along(laws(model, power, None, top_k).log_p).sum(axis=1)
    unnormalised = np.exp(power * (log_p - log_p.max()))
    return unnormalised / unnormalised.sum()


def cut_probabilities(
    entropies: np.ndarray,
    cut_power: float,
    uniform_mix: float,
    cut_first_token: bool = True,
    uniform: bool = False,
) -> np.ndarray:
    """The cut law c(t | x) = (1 - uniform_mix) w_t / sum_s w_s + uniform_mix / n.

    The weights are w_t = max(H_t - H_{t-1}, 0)^cut_power with H_0 = 0 and 0^0 = 1. Where they all
    vanish, and always for `uniform`, the law is uniform.

    Args:
      entropies: [n], H_t for t = 1..n, the EOS's position included; nats.
      cut_power: exponent of the entropy jumps.
      uniform_mix: share of the uniform law, in [0, 1].
      cut_first_token: False takes position 1 out of the weights and of both uniform laws.
      uniform: whether to ignore the entropies.

    Returns:
      [n] probabilities; all 0 if there is no position to cut (n = 1 without the first token).
    """
    num_tokens = len(entropies)
    may_cut = np.ones(num_tokens, bool)
    may_cut[0] = cut_first_token
    if not may_cut.any():
        return np.zeros(num_tokens)
    uniform_law = may_cut / may_cut.sum()
    jumps = np.maximum(np.diff(entropies, prepend=0.0), 0.0)
    weights = np.where(may_cut, jumps**cut_power, 0.0)
    if uniform or weights.sum() == 0.0:
        return uniform_law
    return (1.0 - uniform_mix) * weights / weights.sum() + uniform_mix * uniform_law


def log_cut_probabilities(
    space: StateSpace,
    entropies: np.ndarray,
    cut_power: float,
    uniform_mix: float,
    sampler: str,
    cut_first_token: bool,
) -> np.ndarray:
    """Log cut law of every state, [N, horizon]; -inf where a state is never cut."""
    if sampler not in ("entropy_cut", "uniform_cut"):
        raise ValueError(f"sampler is {sampler!r}, expected 'entropy_cut' or 'uniform_cut'")
    cuts = np.zeros(entropies.shape)
    for row, length in enumerate(space.lengths):
        cuts[row, :length] = cut_probabilities(
            entropies[row, :length],
            cut_power,
            uniform_mix,
            cut_first_token,
            uniform=sampler == "uniform_cut",
        )
    with np.errstate(divide="ignore"):
        return np.log(cuts)


def transition_matrix(
    model: ToyModel,
    horizon: int,
    power: float,
    cut_power: float = 4.0,
    uniform_mix: float = 0.0,
    proposal_temperature: float | None = None,
    top_k: int | None = None,
    sampler: str = "entropy_cut",
    cut_first_token: bool = True,
) -> np.ndarray:
    """One Metropolis-Hastings step of a stage, as a matrix.

    P(x, y) = sum_t c(t | x) q(y_t.. | x_<t) min(1, A_t(x, y)) over the cuts t at which y continues
    x_<t, with whole suffixes on both sides:

        log A_t(x, y) = sum_{s>=t} log_weight_s(y) - sum_{s>=t} log_weight_s(x)
                        + log c(t | y) - log c(t | x)

    and the rejected mass stays at x.

    Args:
      model: the toy model.
      horizon: the stage's horizon in tokens.
      power: exponent of the target.
      cut_power: exponent of the entropy jumps.
      uniform_mix: share of uniform cuts.
      proposal_temperature: None means 1 / power.
      top_k: truncation of p, None for the whole vocabulary.
      sampler: "entropy_cut" or "uniform_cut".
      cut_first_token: whether position 1 can be cut.

    Returns:
      [N, N] over `states(model, horizon, top_k)`.
    """
    space = state_space(model, horizon, top_k)
    tables = laws(model, power, proposal_temperature, top_k)
    log_q = space.along(tables.log_q)
    log_weight = space.along(tables.log_weight)
    log_cut = log_cut_probabilities(
        space, space.along(tables.entropy), cut_power, uniform_mix, sampler, cut_first_token
    )
    matrix = np.zeros((len(space.states), len(space.states)))
    # A state without any cut stays where it is.
    rejected = np.where(np.isneginf(log_cut).all(axis=1), 1.0, 0.0)
    for cut, first, last in space.families:
        family = slice(first, last)
        # Only states that are cut here propose; any member of the family can be proposed.
        current = first + np.flatnonzero(log_cut[family, cut] > -np.inf)
        score = log_weight[:, cut:].sum(axis=1) + log_cut[:, cut]
        log_ratio = score[None, family] - score[current, None]
        accepted = np.exp(np.minimum(log_ratio, 0.0))
        proposed = np.exp(log_cut[current, cut, None] + log_q[None, family, cut:].sum(axis=2))
        matrix[current, family] += proposed * accepted
        rejected[current] += (proposed * (1.0 - accepted)).sum(axis=1)
    return matrix + np.diag(rejected)


def _law_after_draws(
    space: StateSpace, log_q: np.ndarray, prefix: State, chance: float = 1.0
) -> np.ndarray:
    """Law [N] of a state whose tokens after `prefix` are drawn from q, times `chance`."""
    kept = len(prefix)
    shares_prefix = np.array([state[:kept] == prefix for state in space.states])
    return np.where(shares_prefix, chance * np.exp(log_q[:, kept:].sum(axis=1)), 0.0)


def extension_law(
    model: ToyModel,
    state: State,
    horizon: int,
    proposal_temperature: float,
    top_k: int | None = None,
) -> np.ndarray:
    """Law of a trace that q extends until EOS or the horizon.

    Args:
      model: the toy model.
      state: tokens so far, possibly none; a state that ends in EOS is not extended.
      horizon: the stage's horizon in tokens.
      proposal_temperature: of q.
      top_k: truncation.

    Returns:
      [N] over `states(model, horizon, top_k)`. With `state` = () this is a low-temperature
      rollout; with `state` = x_<t it is the law of a proposal that cuts x before token t.
    """
    space = state_space(model, horizon, top_k)
    log_q = space.along(laws(model, 1.0, proposal_temperature, top_k).log_q)
    return _law_after_draws(space, log_q, state)


def coupled_suffix_law(
    model: ToyModel,
    state: State,
    cut: int,
    horizon: int,
    proposal_temperature: float,
    top_k: int | None = None,
) -> np.ndarray:
    """Law of the proposal that replays the current trace until a first divergence.

    From token `cut` on, each token of the old trace is kept with probability q(x_s). At the first
    one that is not, the token is drawn from q without x_s, and everything after it freely from q.
    Keeping every token is the null move.

    Args:
      model: the toy model.
      state: the current state x of the stage.
      cut: number of tokens kept for certain, 0..n-1.
      horizon: the stage's horizon in tokens.
      proposal_temperature: of q.
      top_k: truncation.

    Returns:
      [N] over `states(model, horizon, top_k)`, to be compared with
      `extension_law(model, state[:cut], ...)`.
    """
    space = state_space(model, horizon, top_k)
    tables = laws(model, 1.0, proposal_temperature, top_k)
    log_q = space.along(tables.log_q)
    current = space.states.index(state)
    law = np.zeros(len(space.states))
    replayed = 1.0  # Probability that every token so far was kept.
    for position in range(cut, len(state)):
        next_token = np.exp(tables.log_q[space.nodes[current, position]])
        stay = next_token[state[position]]
        others = next_token.copy()
        others[state[position]] = 0.0
        if others.any():
            others /= others.sum()
        for token in np.flatnonzero(others).tolist():
            chance = replayed * (1.0 - stay) * others[token]
            law += _law_after_draws(space, log_q, (*state[:position], token), chance)
        replayed *= stay
    law[current] += replayed
    return law


def final_law(
    model: ToyModel,
    num_stages: int,
    stage_length: int,
    steps_per_stage: int,
    power: float,
    cut_power: float = 4.0,
    uniform_mix: float = 0.0,
    proposal_temperature: float | None = None,
    top_k: int | None = None,
    sampler: str = "entropy_cut",
    refine_finished: bool = False,
    cut_first_token: bool = True,
) -> np.ndarray:
    """Exact law of the final trace of the stagewise schedule.

    Stage k extends every unfinished trace to k * stage_length tokens and makes `steps_per_stage`
    steps of its own transition matrix. A chain that ends a stage finished is frozen from then on,
    unless `refine_finished`.

    Args:
      model: the toy model, with a horizon of at least num_stages * stage_length.
      num_stages: number of stages.
      stage_length: tokens a stage adds.
      steps_per_stage: Metropolis-Hastings steps a stage.
      power: exponent of the target.
      cut_power: exponent of the entropy jumps.
      uniform_mix: share of uniform cuts.
      proposal_temperature: None means 1 / power.
      top_k: truncation.
      sampler: "entropy_cut" or "uniform_cut".
      refine_finished: whether finished chains keep moving in later stages.
      cut_first_token: whether position 1 can be cut.

    Returns:
      [N] over `states(model, num_stages * stage_length, top_k)`.
    """
    temperature = 1.0 / power if proposal_temperature is None else proposal_temperature
    log_q_table = laws(model, power, temperature, top_k).log_q
    moving: dict[State, float] = {(): 1.0}
    frozen: dict[State, float] = {}
    for stage in range(1, num_stages + 1):
        horizon = stage * stage_length
        space = state_space(model, horizon, top_k)
        log_q = space.along(log_q_table)
        law = np.zeros(len(space.states))
        for state, chance in moving.items():
            if state[-1:] == (model.eos_id,) and not refine_finished:
                frozen[state] = frozen.get(state, 0.0) + chance
            else:
                law += _law_after_draws(space, log_q, state, chance)
        step = transition_matrix(
            model, horizon, power, cut_power, uniform_mix, temperature, top_k, sampler,
            cut_first_token,
        )  # fmt: skip
        law = law @ np.linalg.matrix_power(step, steps_per_stage)
        moving = dict(zip(space.states, law.tolist(), strict=True))
    final_states = states(model, num_stages * stage_length, top_k)
    return np.array([moving[state] + frozen.get(state, 0.0) for state in final_states])


def total_variation(law: np.ndarray, other: np.ndarray) -> float:
    """Total-variation distance: half the sum of |law - other|."""
    return 0.5 * float(np.abs(law - other).sum())
