"""What one sampler has done so far: its running cost, and how much work is left."""

import collections

import jax
import numpy as np

from ecmh_jax import group_sampling
from ecmh_jax.base import Config, Stats
from ecmh_jax.chain_queue import Update
from ecmh_jax.engine import Status


class Progress:
    """Running totals of one sampler over all its chains.

    Tokens are counted as ``summaries`` defines them, those of unfinished chains included.

    Attributes:
      seconds: wall time of the queue, compiling left out.
      compile_seconds: wall time of compiling, apart.
      forwards: decode steps of the batch.
      drawn: tokens drawn in them.
      discarded: those of them that free slots drew ahead for others in vain.
      finished: chains that are done.
      work_done: of ``work``, what is done, in blocks; never falls.
    """

    def __init__(self, num_chains: int, num_slots: int, steps_per_tick: int, config: Config):
        """Starts with nothing done."""
        self.seconds, self.compile_seconds = 0.0, 0.0
        self.forwards, self.drawn, self.discarded, self.finished = 0, 0, 0, 0
        self.work_done = 0.0
        self._num_chains, self._num_slots = num_chains, num_slots
        self._steps_per_tick, self._config = steps_per_tick, config
        self._ticks_of: collections.Counter[int] = collections.Counter()
        self._done: set[int] = set()
        self._finished_counts: collections.Counter[str] = collections.Counter()
        self._counts = self._finished_counts

        # Work is measured in blocks of config.stage_length tokens. An extension draws one; a step
        # of stage k would redraw k / 2 if cuts fell evenly. Only the proportions matter.
        stages = np.arange(1, config.num_stages + 1)
        self._step_work = stages / 2
        of_stages = 1 + config.steps_per_stage * self._step_work
        self._work_before = np.concatenate([[0.0], np.cumsum(of_stages)])

    @property
    def work(self) -> float:
        """All the work there is, in blocks, if every chain runs through all stages."""
        return self._num_chains * float(self._work_before[-1])

    def add(self, update: Update, seconds: float) -> None:
        """Adds one tick; ``seconds`` is the wall time since the queue started."""
        self.seconds = seconds
        self.forwards += self._steps_per_tick
        self.drawn += int(update.status.drawn)
        self.discarded += int(update.status.discarded)
        self._ticks_of.update(update.chains[update.chains >= 0].tolist())
        for index, chain in update.finished.items():
            self._done.add(index)
            self._finished_counts.update(_totals(chain.stats))
        self.finished = len(self._done)
        # A finished chain may still sit in its slot.
        rows = [row for row, chain in enumerate(update.chains) if chain >= 0]
        rows = [row for row in rows if update.chains[row] not in self._done]
        status = jax.tree.map(
            lambda field: field[rows], update.status._replace(drawn=(), discarded=())
        )
        self._counts = self._finished_counts + collections.Counter(_totals(status.stats))
        self.work_done = max(self.work_done, self._measure_work(status))

    def _measure_work(self, running: Status) -> float:
        """Work of the finished chains and of the running ones, given by slot."""
        steps_per_stage, whole = self._config.steps_per_stage, self._work_before[-1]
        index = np.clip(running.stage, 1, self._config.num_stages) - 1
        steps = np.clip(running.stats.attempted - index * steps_per_stage, 0, steps_per_stage)
        settled = self._work_before[index] + (steps > 0) + steps * self._step_work[index]
        # Counters of a chain do not know the move it is in, but the tokens drawn do.
        in_flight = (self.decoded_tokens() - self._counts["decoded"]) / self._config.stage_length
        under_way = min(in_flight, np.maximum(1, self._step_work[index])[running.busy].sum())
        done = self.finished * whole + np.where(running.busy, settled, whole).sum() + under_way
        return min(float(done), self.work)

    def forwards_of(self, index: int) -> int:
        """Decode steps of the batch while chain ``index`` held a slot."""
        return self._ticks_of[index] * self._steps_per_tick

    def decoded_tokens(self) -> int:
        """Tokens decoded for chains, discarded ones left out."""
        return self.drawn - self.discarded

    def slot_utilisation(self) -> float:
        """Share of the decode steps of all slots in which a token was drawn."""
        return self.drawn / (self.forwards * self._num_slots) if self.forwards else 0.0

    def tokens_per_second(self) -> float:
        """Decoded tokens by second, discarded ones left out."""
        return self.decoded_tokens() / self.seconds if self.seconds else 0.0

    def effective_tokens_per_second(self) -> float:
        """Tokens by second, replayed and saved ones counted as if they had been decoded."""
        proposed = self.decoded_tokens() + self._counts["replayed"] + self._counts["saved"]
        return proposed / self.seconds if self.seconds else 0.0

    def describe(self) -> str:
        """One line for the progress bar."""
        parts = [f"{self.finished}/{self._num_chains} chains"]
        if attempted := self._counts["attempted"]:
            parts.append(f"accepted {self._counts['accepted'] / attempted:.0%}")
        parts.append(
            f"{self.tokens_per_second():.0f} tokens/s "
            f"({self.effective_tokens_per_second():.0f} effective)"
        )
        parts.append(f"slots {self.slot_utilisation():.0%} busy")
        return ", ".join(parts)


class GroupProgress:
    """As ``Progress``, for a sampler whose results advance in groups, round by round.

    Attributes:
      forwards: None: such a sampler does not count its decode steps.
      discarded: tokens of candidates that a budget turned out not to allow.
    """

    def __init__(self, num_chains: int):
        """Starts with nothing done."""
        self.seconds, self.compile_seconds = 0.0, 0.0
        self.forwards = None
        self.discarded, self.finished = 0, 0
        self.work, self.work_done = float(num_chains), 0.0
        self._num_chains = num_chains
        self._decoded_before, self._drawn = 0, 0
        self._finished_counts: collections.Counter[str] = collections.Counter()

    def add(self, update: group_sampling.Update, seconds: float) -> None:
        """Adds one round; ``seconds`` is the wall time since the sampler started."""
        self.seconds = seconds
        self._drawn = self._decoded_before + update.decoded
        self.work_done = self.finished + len(update.members) * update.round / update.num_rounds
        if update.result is not None:
            self._decoded_before = self._drawn
            self.finished += len(update.members)
            self._finished_counts.update(_totals(update.result.stats))
            self.discarded += int(np.sum(getattr(update.result.info, "surplus_decoded", 0)))

    def forwards_of(self, index: int) -> None:
        """None, as ``forwards``."""
        del index

    def slot_utilisation(self) -> None:
        """None: decode steps are not counted."""

    def decoded_tokens(self) -> int:
        """As ``Progress``, those included that only filled up the last group."""
        return self._drawn - self.discarded

    def tokens_per_second(self) -> float:
        """Decoded tokens by second, those included that only filled up the last group."""
        return self.decoded_tokens() / self.seconds if self.seconds else 0.0

    def effective_tokens_per_second(self) -> float:
        """As ``Progress``; replayed and saved tokens are those of finished results."""
        counts = self._finished_counts
        proposed = self.decoded_tokens() + counts["replayed"] + counts["saved"]
        return proposed / self.seconds if self.seconds else 0.0

    def describe(self) -> str:
        """One line for the progress bar."""
        return (
            f"{self.finished}/{self._num_chains} results, {self.tokens_per_second():.0f} tokens/s"
        )


def _totals(stats: Stats) -> dict[str, int]:
    return {name: int(np.sum(field)) for name, field in stats._asdict().items()}
