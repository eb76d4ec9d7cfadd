"""The account of what chains cost, on numbers worked out by hand."""

import numpy as np
import pytest

from ecmh_jax.base import Config, Info, Stats, Trace
from ecmh_jax.chain_queue import Update
from ecmh_jax.engine import Finished, Status
from experiments import summaries
from experiments.progress import Progress
from experiments.quantities import describe_quantity
from models.config import TransformerConfig

CONFIG = Config(prompt_length=4, max_new_tokens=6, num_stages=2, steps_per_stage=2)


def counters(**values):
    """Counters of one chain, or of several."""
    return Stats(**{name: np.asarray(values.get(name, 0)) for name in Stats._fields})


def chain(stats, **info):
    """A finished chain with the records [2 stages, 2 steps] given; the rest is zero."""
    nothing = np.zeros((2, 2), int)
    records = {name: np.asarray(info.get(name, nothing)) for name in Info._fields}
    trace = Trace(*(np.zeros(10) for _ in Trace._fields))
    return Finished(trace, stats, np.bool_(True), Info(**records))


# Three tokens of prompt. Stage 1 draws slots 3, 4, 5; its first step leaves the trace at its second
# token and draws slots 4, 5; the other redraws the same trace. Stage 2 ends after slots 6, 7; its
# first step leaves at the first token and draws slots 3, 4, 5; the chain is not stepped again.
WALK = chain(
    counters(decoded=10, attempted=3),
    attempted=[[True, True], [True, False]],
    cut=[[1, 2], [1, 0]],
    divergence=[[2, 0], [1, 0]],
    current_length=[[3, 3], [5, 0]],
    decoded=[[2, 0], [3, 0]],
)


def test_positions_of_a_chain():
    expected = (3 + 4 + 5) + (4 + 5) + (6 + 7) + (3 + 4 + 5)
    assert summaries.sum_positions(WALK, 3, CONFIG) == expected


def test_positions_of_extensions_that_end_early():
    # Stage 1 ends after slot 3, and its first step draws slots 3, 4, 5; stage 2 draws 6, 7, 8.
    grown = chain(
        counters(decoded=7, attempted=3),
        attempted=[[True, True], [True, False]],
        cut=[[1, 1], [1, 0]],
        divergence=[[1, 0], [0, 0]],
        current_length=[[1, 3], [6, 0]],
        decoded=[[3, 0], [0, 0]],
    )
    expected = 3 + (3 + 4 + 5) + (6 + 7 + 8)
    assert summaries.sum_positions(grown, 3, CONFIG) == expected

    # A text that has ended is not extended, but stepped: stage 2 draws slots 4, 5, 6 in its step.
    ended = chain(
        counters(decoded=5, attempted=2),
        attempted=[[True, False], [True, False]],
        cut=[[1, 0], [2, 0]],
        divergence=[[0, 0], [2, 0]],
        current_length=[[2, 0], [2, 0]],
        decoded=[[0, 0], [3, 0]],
    )
    assert summaries.sum_positions(ended, 3, CONFIG) == (3 + 4) + (4 + 5 + 6)


def test_positions_without_replay():
    kept = chain(
        counters(decoded=9, attempted=2),
        attempted=[[True, True], [False, False]],
        cut=[[1, 2], [0, 0]],
        divergence=[[2, 0], [0, 0]],
        current_length=[[3, 3], [0, 0]],
        decoded=[[3, 3], [0, 0]],
    )
    config = Config(4, 6, num_stages=2, steps_per_stage=2, replay=False)
    expected = (3 + 4 + 5) + (3 + 4 + 5) + (4 + 5 + 6)
    assert summaries.sum_positions(kept, 3, config) == expected


@pytest.mark.parametrize(
    ("attempted", "decoded", "expected"),
    [
        (0, 4, 3 + 4 + 5 + 6),  # no step at all: one run from the prompt on
        (1, 5, (3 + 4 + 5) + (6 + 7)),  # failed in the extension of stage 2
    ],
)
def test_positions_of_extensions_without_a_step_after_them(attempted, decoded, expected):
    flags = [[bool(attempted), False], [False, False]]
    finished = chain(
        counters(decoded=decoded),
        attempted=flags,
        cut=[[1, 0], [0, 0]],
        current_length=[[3, 0], [0, 0]],
    )
    assert summaries.sum_positions(finished, 3, CONFIG) == expected


def test_flops():
    network = TransformerConfig(
        vocabulary_size=11,
        num_layers=3,
        embedding_size=8,
        num_heads=4,
        num_kv_heads=2,
        head_size=6,
        feed_forward_size=10,
        context_length=64,
    )
    attention = 8 * 24 + 2 * (8 * 12) + 24 * 8
    matrices = 3 * (attention + 3 * 8 * 10) + 11 * 8
    assert summaries.count_flops(network, 1, 0) == 2 * matrices
    assert summaries.count_flops(network, 0, 1) == 4 * 4 * 6 * 3
    assert summaries.count_flops(network, 5, 7) == 5 * 2 * matrices + 7 * 4 * 4 * 6 * 3


def row(sampler, decoded, num_tokens, prompt_id=0):
    """A row of traces.jsonl with what the account reads."""
    counts = ("attempted", "accepted", "null_moves", "replayed_tokens", "saved_tokens")
    return dict.fromkeys(counts, 0) | {
        "sampler": sampler,
        "prompt_id": prompt_id,
        "tokens": list(range(num_tokens)),
        "num_tokens": num_tokens,
        "log_prob": -1.0,
        "ended": "length",
        "decoded_tokens": decoded,
        "proposed_tokens": decoded + 2,
        "flops": 10 * decoded,
        "steps": [],
    }


def test_multiple_of_a_standard_sample():
    rows = [row("standard", 4, 4), row("standard", 6, 6)]
    rows += [row("entropy_cut", 20, 8), row("entropy_cut", 30, 8)]
    numbers = summaries.describe_samplers(rows, ("standard", "entropy_cut"))
    assert numbers["standard"]["standard_samples_per_chain"] == 1.0
    assert numbers["entropy_cut"]["standard_sample_tokens"] == 5.0
    assert numbers["entropy_cut"]["standard_sample_from"] == "standard"
    assert numbers["entropy_cut"]["standard_samples_per_chain"] == 25 / 5
    assert numbers["entropy_cut"]["decoded_tokens"] == 50
    assert numbers["entropy_cut"]["proposed_tokens"] == 54
    assert numbers["entropy_cut"]["flops"] == 500

    alone = summaries.describe_samplers(rows[2:], ("entropy_cut",))["entropy_cut"]
    assert alone["standard_sample_from"] == "own_completions"
    assert alone["standard_samples_per_chain"] == 25 / 8


def test_multiple_where_nothing_was_drawn():
    failed = summaries.describe_samplers([row("standard", 0, 0)], ("standard",))["standard"]
    assert failed["standard_samples_per_chain"] is None
    assert failed["mean_log_prob_per_token"] is None


def update(chains, finished, busy, stage, drawn, waiting, discarded=0, **stats):
    """A tick of two slots."""
    status = Status(
        np.asarray(busy),
        np.asarray(stage),
        counters(**stats),
        np.asarray(drawn),
        np.asarray(discarded),
    )
    return Update(finished, status, np.asarray(chains), waiting)


def test_progress_of_three_chains_on_two_slots():
    progress = Progress(num_chains=3, num_slots=2, steps_per_tick=8, config=CONFIG)
    # In blocks of 3 tokens: 1 + 2 * 1/2 in stage 1, 1 + 2 * 2/2 in stage 2.
    assert progress.work == 3 * 5
    nothing = np.zeros(2, int)
    zeros = dict.fromkeys(Stats._fields, nothing)

    # Both are in their first extension, of which no counter tells.
    progress.add(update([0, 1], {}, [True] * 2, [1, 1], 3, 1, **zeros), 0.5)
    assert progress.work_done == 3 / 3
    assert progress.finished == 0
    assert progress.slot_utilisation() == 3 / 16
    assert progress.describe() == "0/3 chains, 6 tokens/s (6 effective), slots 19% busy"

    # Both are extended, and have no step yet: the bar waits for them.
    settled = zeros | {"decoded": np.asarray([3, 3])}
    progress.add(update([0, 1], {}, [True] * 2, [1, 1], 3, 1, **settled), 1.0)
    assert progress.work_done == 1

    # Chain 0 ends in this tick, with ten tokens; chain 1 is after the first step of stage 2.
    stats = zeros | {
        "attempted": np.asarray([2, 3]),
        "accepted": np.asarray([1, 3]),
        "decoded": np.asarray([10, 8]),
        "replayed": np.asarray([4, 5]),
        "saved": np.asarray([1, 0]),
    }
    progress.add(update([0, 1], {}, [False, True], [2, 2], 12, 1, **stats), 2.0)
    assert progress.work_done == 5 + (2 + 1 + 1)
    assert progress.tokens_per_second() == 18 / 2.0
    assert progress.effective_tokens_per_second() == (18 + 10) / 2.0

    # It is reported one tick later, from the same slot: it must not count twice.
    first = chain(counters(attempted=2, accepted=1, decoded=10, replayed=4, saved=1))
    progress.add(update([0, 1], {0: first}, [False, True], [2, 2], 0, 1, **stats), 3.0)
    assert progress.finished == 1
    assert progress.work_done == 9
    assert progress.effective_tokens_per_second() == 28 / 3.0
    assert progress.describe().startswith("1/3 chains, accepted 80%, ")
    assert [progress.forwards_of(index) for index in range(3)] == [32, 32, 0]

    # The slot's next chain starts from nothing; work done never falls.
    stats = {name: values * np.asarray([0, 1]) for name, values in stats.items()}
    progress.add(update([2, 1], {}, [True, True], [1, 2], 0, 0, **stats), 4.0)
    assert progress.work_done == 9
    last = {index: chain(counters(decoded=9)) for index in (1, 2)}
    progress.add(update([2, 1], last, [False, False], [2, 2], 13, 0, discarded=3, **stats), 5.0)
    assert progress.work_done == progress.work
    assert progress.forwards == 48
    # Discarded tokens keep slots busy, but nobody gets them.
    assert progress.slot_utilisation() == pytest.approx(31 / 96)
    assert progress.tokens_per_second() == 28 / 5.0
    assert progress.effective_tokens_per_second() == (28 + 4 + 1) / 5.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (8.858e6, "8.86 MB"), (999.6e6, "1 GB")],
)
def test_quantities(value, text):
    assert describe_quantity(value, "B") == text
