"""The exact law of a multiple-try step on toy models, by enumeration; NumPy float64, no JAX."""

import numpy as np

from tests import enumeration, oracle


def multiple_try_matrix(
    model,
    horizon,
    num_tries,
    power,
    cut_power=4.0,
    uniform_mix=0.0,
    proposal_temperature=None,
    top_k=None,
    sampler="entropy_cut",
    cut_first_token=True,
):
    """One multiple-try step as a matrix [N, N], summed over every tuple of tries.

    P(x, y) = sum_t c(t | x) sum_{x'_1..x'_J} prod_j q(x'_j) sum_{j: x'_j = y} (W_j / W)
              * min(1, W / (W - W_j + W_x)), in float64; the rest stays at x.
    """
    space = enumeration.state_space(model, horizon, top_k)
    tables = enumeration.laws(model, power, proposal_temperature, top_k)
    log_q = space.along(tables.log_q)
    log_weight = space.along(tables.log_weight)
    log_cut = oracle.log_cut_probabilities(
        space, space.along(tables.entropy), cut_power, uniform_mix, sampler, cut_first_token
    )
    matrix = np.zeros((len(space.states), len(space.states)))
    rejected = np.where(np.isneginf(log_cut).all(axis=1), 1.0, 0.0)
    for cut, first, last in space.families:
        chances = np.exp(log_q[first:last, cut:].sum(axis=1))
        weights = np.exp(log_weight[first:last, cut:].sum(axis=1) + log_cut[first:last, cut])
        grids = np.meshgrid(*[np.arange(last - first)] * num_tries, indexing="ij")
        tuples = np.stack([grid.reshape(-1) for grid in grids])  # [J, M^J]
        chance = chances[tuples].prod(axis=0)
        tried = weights[tuples]
        total = tried.sum(axis=0)
        picked = tried / np.where(total > 0, total, 1.0)
        for member in np.flatnonzero(weights > 0):
            x = first + member
            accepted = np.minimum(1.0, total / (total - tried + weights[member]))
            flow = np.exp(log_cut[x, cut]) * chance * picked * accepted
            matrix[x, first:last] += np.bincount(
                tuples.reshape(-1), flow.reshape(-1), minlength=last - first
            )
            stays = np.exp(log_cut[x, cut]) * chance * (1.0 - (picked * accepted).sum(axis=0))
            rejected[x] += stays.sum()
    return matrix + np.diag(rejected)
