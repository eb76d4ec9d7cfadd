"""Enumerated laws and states of toy models: what the oracle's formulas are summed over.

NumPy float64, no JAX. Notation as in `tests.oracle`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tests.toy_models import ToyModel, child_index

State = tuple[int, ...]


def truncated_law(logits: np.ndarray, top_k: int | None) -> np.ndarray:
    """Softmax over the `top_k` largest logits; ties go to the lowest token id.

    Args:
      logits: [..., V], nats.
      top_k: how many tokens to keep, None for all.

    Returns:
      [..., V] probabilities, exactly 0 for the tokens left out.
    """
    kept = np.argsort(-logits, axis=-1, kind="stable")[..., :top_k]
    unnormalised = np.zeros_like(logits)
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    np.put_along_axis(unnormalised, kept, np.take_along_axis(shifted, kept, axis=-1), axis=-1)
    return unnormalised / unnormalised.sum(axis=-1, keepdims=True)


def entropy(law: np.ndarray) -> np.ndarray:
    """Shannon entropy of laws [..., V], in nats, with 0 log 0 = 0."""
    return -np.sum(law * np.log(np.where(law > 0.0, law, 1.0)), axis=-1)


def proposal_law(law: np.ndarray, proposal_temperature: float) -> np.ndarray:
    """The law q = p^(1 / proposal_temperature), renormalised; [..., V]."""
    # Dividing by the largest probability first keeps small temperatures from underflowing.
    powered = (law / law.max(axis=-1, keepdims=True)) ** (1.0 / proposal_temperature)
    return powered / powered.sum(axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Laws:
    """What one row of logits says about the token drawn from it, for every row of a model.

    Attributes:
      log_p: [num_prefixes, V], nats, -inf for truncated tokens.
      log_q: [num_prefixes, V], nats, -inf for truncated tokens.
      log_weight: [num_prefixes, V], power * log_p - log_q, -inf for truncated tokens.
      entropy: [num_prefixes], nats.
    """

    log_p: np.ndarray
    log_q: np.ndarray
    log_weight: np.ndarray
    entropy: np.ndarray


def laws(
    model: ToyModel, power: float, proposal_temperature: float | None, top_k: int | None
) -> Laws:
    """Tabulates a model's laws; `proposal_temperature` None means 1 / power."""
    temperature = 1.0 / power if proposal_temperature is None else proposal_temperature
    law = truncated_law(model.logits, top_k)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = np.log(law)
        log_q = np.log(proposal_law(law, temperature))
        log_weight = np.where(law > 0.0, power * log_p - log_q, -np.inf)
    return Laws(log_p, log_q, log_weight, entropy(law))


@dataclasses.dataclass(frozen=True, eq=False)
class StateSpace:
    """The states of a stage with the table rows of their tokens.

    Attributes:
      states: N completions in lexicographic order, so that completions sharing a prefix are
        neighbours.
      lengths: [N] int, n, the EOS included.
      finished: [N] bool, whether the completion ends in EOS.
      tokens: [N, horizon] int, 0 past the end.
      nodes: [N, horizon] int, the table row of x_<t, 0 past the end.
      live: [N, horizon] bool, whether t <= n.
      families: `(cut, first, last)` for every prefix that can be continued: its `cut` tokens are
        kept, and states[first:last] are the ways to continue it.
    """

    states: list[State]
    lengths: np.ndarray
    finished: np.ndarray
    tokens: np.ndarray
    nodes: np.ndarray
    live: np.ndarray
    families: list[tuple[int, int, int]]

    def along(self, table: np.ndarray) -> np.ndarray:
        """Reads a table [num_prefixes, V] or [num_prefixes] along every state: [N, horizon]."""
        values = table[self.nodes, self.tokens] if table.ndim == 2 else table[self.nodes]
        return np.where(self.live, values, 0.0)


def state_space(
    model: ToyModel, horizon: int, top_k: int | None = None, keep_unfinished: bool = False
) -> StateSpace:
    """Enumerates the completions of positive probability.

    Args:
      model: the toy model.
      horizon: longest completion, at most `model.horizon`.
      top_k: truncation; completions with a truncated token have probability 0 and are left out.
      keep_unfinished: also list the unfinished completions shorter than the horizon. They are
        no states of the stage, but faulty kernels move there.

    Returns:
      The space.
    """
    support = truncated_law(model.logits, top_k) > 0.0
    found: list[State] = []
    rows: list[tuple[int, ...]] = []
    families: list[tuple[int, int, int]] = []

    def visit(prefix: State, path: tuple[int, ...], node: int) -> None:
        ended = bool(prefix) and prefix[-1] == model.eos_id
        is_leaf = ended or len(prefix) == horizon
        if is_leaf or (keep_unfinished and prefix):
            found.append(prefix)
            rows.append(path)
        if is_leaf:
            return
        first = len(found)
        for token in np.flatnonzero(support[node]).tolist():
            child = child_index(node, token, model.vocabulary_size)
            visit((*prefix, token), (*path, node), child)
        families.append((len(prefix), first, len(found)))

    visit((), (), 0)
    lengths = np.array([len(state) for state in found])
    padding = [(0,) * (horizon - length) for length in lengths]
    return StateSpace(
        states=found,
        lengths=lengths,
        finished=np.array([state[-1] == model.eos_id for state in found]),
        tokens=np.array([state + pad for state, pad in zip(found, padding, strict=True)]),
        nodes=np.array([row + pad for row, pad in zip(rows, padding, strict=True)]),
        live=np.arange(horizon)[None, :] < lengths[:, None],
        families=families,
    )
