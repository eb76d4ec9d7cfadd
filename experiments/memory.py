"""Memory: what a slot takes, how many slots fit, and what to say when they do not."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from ecmh_jax import engine
from ecmh_jax.base import Config
from experiments.quantities import describe_quantity
from models.load import LoadedModel

_KEPT_BACK = 0.1  # for prefill, collected chains and what else the process does
MOST_SLOTS_ON_CPU = 64  # a CPU gains little from more
_LOGITS_ROWS = 4


class Reservation(NamedTuple):
    """What a run takes.

    Attributes:
      num_slots: chains that decode together.
      weights_bytes: the model's weights, and the work space that does not grow with the slots.
      slot_bytes: one slot, the work space of decoding it included.
      available_bytes: what was free for slots with the weights in place, a tenth kept back.
    """

    num_slots: int
    weights_bytes: int
    slot_bytes: int
    available_bytes: int

    def describe(self) -> dict[str, Any]:
        """Returns the content of "memory" in ``summary.json``."""
        slots_bytes = self.num_slots * self.slot_bytes
        return self._asdict() | {
            "slots_bytes": slots_bytes,
            "total_bytes": self.weights_bytes + slots_bytes,
        }


def parse_num_slots(text: str) -> int | None:
    """Reads ``--num_slots``; None is auto.

    Raises:
      ValueError: it is neither "auto" nor a number of at least 1.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--num_slots={text}; expected 'auto' or a number of at least 1")
    return int(text)


class Demand(NamedTuple):
    """What one sampler asks of the memory.

    Attributes:
      sampler: its name.
      config: its run.
      least: rows that it needs at least.
      most: rows beyond which more are of no use.
    """

    sampler: str
    config: Config
    least: int
    most: int


def reserve(num_slots: int | None, model: LoadedModel, demands: Sequence[Demand]) -> Reservation:
    """Chooses the number of slots, or checks the one that was asked for.

    Args:
      num_slots: as asked for, or None for as many as are of use, as far as they fit.
      model: the model, its weights on the device.
      demands: of the samplers that will run one after the other; the largest counts.

    Raises:
      ValueError: the slots do not fit, or are too few for a sampler; the message names the estimate
        and the number that is possible.
    """
    device = jax.devices()[0]
    configs = [demand.config for demand in demands]
    slot_bytes = max(estimate_slot_bytes(model, config) for config in configs)
    work_bytes = _widened_bytes(model.params) + max(_row_bytes(model, config) for config in configs)
    available = max(0, int((free_bytes(device) - work_bytes) * (1 - _KEPT_BACK)))
    most = available // slot_bytes
    free = f"{describe_quantity(available, 'B')} are free for slots"
    if most < 1:
        raise ValueError(
            f"--max_new_tokens={configs[0].max_new_tokens}: a single slot needs about "
            f"{describe_quantity(slot_bytes, 'B')} and {free}; expected room for one at least: "
            "lower --max_new_tokens"
        )
    if num_slots is None:
        chosen = max(demand.most for demand in demands)
        if device.platform == "cpu":
            chosen = min(chosen, MOST_SLOTS_ON_CPU)
        chosen = min(most, max(chosen, *(demand.least for demand in demands), 1))
    else:
        chosen = num_slots
    for demand in demands:
        if chosen < demand.least:
            raise ValueError(
                f"--num_slots={chosen if num_slots else 'auto'}: a result of {demand.sampler} "
                f"decodes {demand.least} rows together, "
                + (f"and {most} fit; " if num_slots is None else "")
                + f"expected at least {demand.least} slots, or a lower --option={demand.sampler}..."
            )
    if chosen > most:
        raise ValueError(
            f"--num_slots={num_slots} needs about {describe_quantity(chosen * slot_bytes, 'B')} "
            f"for {chosen} slots ({describe_quantity(slot_bytes, 'B')} each) and {free}; "
            f"expected at most {most}"
        )
    weights_bytes = tree_bytes(model.params) + work_bytes
    return Reservation(chosen, weights_bytes, slot_bytes, available)


def estimate_slot_bytes(model: LoadedModel, config: Config) -> int:
    """Bytes that one more slot takes: its rows of ``Slots``, and the work space of a tick.

    The work space is an allowance: four float32 rows of logits, all but the banks once more, and on
    a CPU the banks in float32 where they are narrower. The tick of SmolLM2-135M, compiled for a
    CPU, takes at most that, and so does a row of the samplers in rounds; on accelerators neither
    is measured yet.
    """
    slot = _abstract_slot(model, config)
    beside_banks = slot._replace(chains=slot.chains._replace(cache=()), cache=())
    logits = 4 * _LOGITS_ROWS * model.config.vocabulary_size
    return tree_bytes(slot) + tree_bytes(beside_banks) + _widened_bytes(slot) + logits


def _row_bytes(model: LoadedModel, config: Config) -> int:
    """One slot's row of one bank, through which rows move from bank to bank."""
    return tree_bytes(_abstract_slot(model, config).cache)


def _abstract_slot(model: LoadedModel, config: Config) -> engine.Slots:
    return jax.eval_shape(lambda: engine.init_slots(model.language_model, 1, config))


def tree_bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree, abstract ones too."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _widened_bytes(tree: Any) -> int:
    """Bytes of a program's float32 copy of what is narrower: a CPU computes in nothing else."""
    if jax.default_backend() != "cpu":
        return 0
    leaves = (leaf for leaf in jax.tree.leaves(tree) if leaf.dtype != bool)
    return sum(4 * leaf.size for leaf in leaves if leaf.dtype.itemsize < 4)


def free_bytes(device: Any) -> int:
    """Free memory of a JAX device where it tells, else of the host."""
    statistics = device.memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics["bytes_in_use"]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            kilobytes = {line.split(":")[0]: line.split()[1] for line in file}
        return int(kilobytes["MemAvailable"]) * 1024
    except (OSError, KeyError):  # no Linux: all of it is the best that is known
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the device ran out of memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def out_of_memory(reservation: Reservation) -> ValueError:
    """The error of a run whose slots did not fit although they should have."""
    slots = reservation.num_slots
    lower = f"at most --num_slots={slots // 2}" if slots > 1 else "a lower --max_new_tokens"
    return ValueError(
        f"the device ran out of memory with --num_slots={slots}, which was estimated at "
        f"{describe_quantity(slots * reservation.slot_bytes, 'B')} "
        f"({describe_quantity(reservation.slot_bytes, 'B')} each) where "
        f"{describe_quantity(reservation.available_bytes, 'B')} were free; try {lower}"
    )
