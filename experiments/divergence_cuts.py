"""Where the study of suffix divergence cuts a trace: where entropy jumps up most, and least."""

import bisect
import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

KINDS = ("top", "bottom")  # decile of the upward jumps
_DIGITS = 6  # of a jump
_ROUNDING = 1e-9  # 10 % of 70 are 7 tokens, whatever the last bit says


class CutRule(NamedTuple):
    """How cuts are chosen.

    Attributes:
      cuts: of each kind in a trace, >= 1; fewer where no more fit.
      distance: tokens that cuts of one kind are apart at least, >= 1.
      margin: share of the trace at either end that is not cut, 0 <= margin < 0.5.
      decile: share of the tokens whose jumps are the top, or the bottom, 0 < decile <= 0.5.
    """

    cuts: int
    distance: int
    margin: float
    decile: float


class Cut(NamedTuple):
    """A place to cut a trace: ``cut`` in 1..n, the first token that is drawn again."""

    problem: str
    kind: str  # of KINDS
    cut: int
    entropy: float  # nats, of the law that the token was drawn from
    jump: float  # nats, max(H_t - H_{t-1}, 0), H_0 = 0

    @property
    def key(self) -> tuple[str, int, str]:
        """Who it is, within its folder."""
        return self.problem, self.cut, self.kind


def choose_cuts(problem: str, entropy: Sequence[float], rule: CutRule, seed: int) -> list[Cut]:
    """Chooses where to cut a trace: ``rule.cuts`` places of each kind, or as many as fit.

    All sets of places of a kind that keep the distance are equally likely: nothing but the jump
    favours a part of the trace. Jumps equal to the decile's last one belong to it; where half of
    the tokens have no jump, the bottom "decile" is that half. What is at the bottom is not at the
    top.

    Args:
      problem: its id; other problems choose independently.
      entropy: [n] nats, of the trace's tokens.
      rule: how.
      seed: of the choice.

    Returns:
      The top ones, then the bottom ones, each in the order of the trace.
    """
    jumps = np.maximum(np.diff(np.asarray(entropy, float), prepend=0.0), 0.0)
    margin = math.ceil(rule.margin * len(jumps) - _ROUNDING)
    places = np.arange(margin, len(jumps) - margin)
    if not len(places):
        return []
    ranked = np.sort(jumps[places])
    size = math.ceil(rule.decile * len(places) - _ROUNDING)
    bottom, top = ranked[size - 1], ranked[-size]
    is_bottom = jumps[places] <= bottom
    members = {"top": (jumps[places] >= top) & ~is_bottom, "bottom": is_bottom}
    chosen = []
    for kind in KINDS:
        generator = random.Random(f"{seed} {kind} {problem}")
        candidates = places[members[kind]].tolist()
        for place in _choose_apart(candidates, rule.cuts, rule.distance, generator):
            jump = round(float(jumps[place]), _DIGITS)
            chosen.append(Cut(problem, kind, place + 1, float(entropy[place]), jump))
    return chosen


def _choose_apart(
    places: Sequence[int], count: int, distance: int, generator: random.Random
) -> list[int]:
    """Draws evenly among the sets of ``count`` places, or of the most that fit."""
    following = [bisect.bisect_left(places, place + distance) for place in places]
    # ways[i][k]: sets of k among the places from i on, each a distance from the one before
    ways = [[1] + [0] * count for _ in range(len(places) + 1)]
    for index in reversed(range(len(places))):
        for number in range(1, count + 1):
            ways[index][number] = ways[index + 1][number] + ways[following[index]][number - 1]
    left = max(number for number in range(count + 1) if ways[0][number])
    chosen, index = [], 0
    while left:
        if generator.randrange(ways[index][left]) < ways[index + 1][left]:
            index += 1
        else:
            chosen.append(places[index])
            index, left = following[index], left - 1
    return chosen
