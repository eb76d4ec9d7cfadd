"""Levenshtein distances between token sequences, all pairs of a few sequences at once."""

from collections.abc import Sequence

import numpy as np

_PADDING = -1  # no token id; what stands there never reaches a result


def edit_distances(sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the Levenshtein distance of each pair: fewest insertions, deletions, substitutions.

    The table of a pair is filled row by row, the rows of all pairs together. Within a row only an
    insertion looks to the left, and a run of them costs its length, so a running minimum of
    ``entry - column`` takes the place of a loop: O(N^2 L^2) for N sequences of L tokens, of which L
    steps are Python's.

    Args:
      sequences: N sequences of token ids >= 0; any lengths, 0 too.

    Returns:
      [N, N] integers, symmetric, zero on the diagonal.
    """
    count = len(sequences)
    lengths = np.array([len(sequence) for sequence in sequences], int)
    distances = np.zeros((count, count), int)
    left, right = np.triu_indices(count, k=1)
    if not len(left):
        return distances
    tokens = np.full((count, int(lengths.max())), _PADDING)
    for row, sequence in zip(tokens, sequences, strict=True):
        row[: len(sequence)] = sequence
    columns = np.arange(tokens.shape[1] + 1)
    table = np.broadcast_to(columns, (len(left), len(columns)))  # row 0: insertions alone
    ends = lengths[right]
    found = np.where(lengths[left] == 0, ends, 0)
    for step in range(tokens.shape[1]):
        replaced = table[:, :-1] + (tokens[left, step, None] != tokens[right])
        entries = np.minimum(table + 1, np.insert(replaced, 0, step + 1, axis=1))
        table = np.minimum.accumulate(entries - columns, axis=1) + columns
        found = np.where(lengths[left] == step + 1, table[np.arange(len(left)), ends], found)
    distances[left, right] = distances[right, left] = found
    return distances


def mean_edit_distance(sequences: Sequence[Sequence[int]]) -> float:
    """Returns the mean over all pairs of the edit distance by the longer one's length, 0 to 1.

    Args:
      sequences: at least two.

    Raises:
      ValueError: there are fewer.
    """
    if len(sequences) < 2:
        raise ValueError(f"{len(sequences)} sequences; expected at least two, to make a pair")
    lengths = np.array([len(sequence) for sequence in sequences])
    longer = np.maximum(np.maximum.outer(lengths, lengths), 1)  # two empty ones are equal
    pairs = np.triu_indices(len(sequences), k=1)
    return float((edit_distances(sequences) / longer)[pairs].mean())
