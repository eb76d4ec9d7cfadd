"""From finished chains to rows, costs and a summary.

What a chain costs, here and in every file that a run writes:

* decoded tokens: drawn from fresh logits, each by one forward pass of its chain.
* replayed tokens: tokens of proposals taken over from the current trace without the model.
* saved tokens: those that a proposal stopped by certain rejection was spared, at most.
* proposed tokens: decoded + replayed + saved, what the plain algorithm would decode, at most.
* discarded tokens: drawn ahead by free slots, in vain; they belong to no chain.
* forwards: decode steps of the batch; of a chain, those during which it held a slot. Samplers that
  advance in rounds (``ecmh_jax.rounds``) do not count them: null.
* flops: floating-point operations of the decoded tokens (``count_flops``), prefill left out. For
  samplers in rounds the places of tokens are not known: each is taken to stand in the middle of its
  result, which moves attention's share alone.
* standard sample: one completion decoded once, without steps. Its length is that of the samples of
  ``standard`` where the run has any ("standard"), else of the sampler's own completions
  ("own_completions"). ``standard_samples_per_chain`` is decoded tokens by chain over that length.
* slot utilisation: share of the decode steps of all slots in which a token was drawn.
* effective tokens per second: proposed instead of decoded ones.

Figures by time cover unfinished chains too; all others are of finished chains.
"""

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

import ecmh_jax
from ecmh_jax import best_of_n, multiple_try, particles, tmc
from ecmh_jax.base import Config, Info
from ecmh_jax.chain_queue import Chains
from ecmh_jax.engine import Finished
from ecmh_jax.group_sampling import GROUP_SAMPLERS
from experiments.memory import Reservation
from experiments.progress import GroupProgress, Progress
from models import rotary
from models.config import TransformerConfig
from models.load import LoadedModel


def describe_chain(
    sampler: str,
    chains: Chains,
    index: int,
    finished: Finished,
    forwards: int | None,
    model: LoadedModel,
    config: Config,
) -> dict[str, Any]:
    """Returns a chain's row of ``traces.jsonl``.

    Args:
      sampler: its sampler.
      chains: all chains of the queue.
      index: its index among them.
      finished: the chain at the end of its schedule, NumPy.
      forwards: decode steps of the batch while it held a slot, where they are counted.
      model: the model.
      config: the sampler's run.
    """
    trace, stats = finished.trace, finished.stats
    start, end = int(chains.prompt_lengths[index]), int(trace.length)
    tokens = trace.tokens[start:end].tolist()
    ended = bool(tokens) and tokens[-1] in config.eos_ids
    decoded, replayed, saved = int(stats.decoded), int(stats.replayed), int(stats.saved)
    if sampler in GROUP_SAMPLERS:
        positions = decoded * (start + end) // 2
    else:
        positions = sum_positions(finished, start, config)
    return {
        "prompt_id": int(chains.prompt_ids[index]),
        "chain": int(chains.chain_ids[index]),
        "sampler": sampler,
        "text": model.tokenizer.decode(tokens),
        "tokens": tokens,
        "num_tokens": len(tokens),
        "ended": "eos" if ended else "length" if finished.finite else "not_finite",
        "log_prob": round(float(trace.log_prob[start:end].sum()), 5),
        "entropy": round(float(trace.entropy[start:end].sum()), 5),
        "accepted": int(stats.accepted),
        "attempted": int(stats.attempted),
        "null_moves": int(stats.null_moves),
        "proposed_tokens": decoded + replayed + saved,
        "decoded_tokens": decoded,
        "replayed_tokens": replayed,
        "saved_tokens": saved,
        "forwards": forwards,
        "flops": count_flops(model.config, decoded, positions),
        "steps": _describe_steps(finished.info),
        "details": _describe_details(finished.info),
    }


def _describe_steps(info: Any) -> list[list[Any]]:
    """Each Metropolis-Hastings step.

    Stage, step, cut, divergence, accepted, log A, and log p and mean entropy of the completion
    after it. For ``multiple_try`` the log of W / (W - W_j + W_current) takes the place of log A.
    """
    if isinstance(info, multiple_try.Info):
        log_ratio = info.log_acceptance
    elif isinstance(info, Info):
        log_ratio = info.log_ratio
    else:
        return []
    return [
        [
            int(stage) + 1,
            int(step) + 1,
            int(info.cut[stage, step]),
            int(info.divergence[stage, step]),
            bool(info.accepted[stage, step]),
            *(
                round(float(field[stage, step]), 5)
                for field in (log_ratio, info.log_prob, info.mean_entropy)
            ),
        ]
        for stage, step in np.argwhere(info.attempted)
    ]


def _describe_details(info: Any) -> dict[str, Any]:
    """What a sampler has to say beside its trace; empty for Metropolis-Hastings."""
    if isinstance(info, particles.Info):
        considered = info.ess[info.ess > 0]
        return {
            "log_evidence": _finite(info.log_evidence),
            "least_ess": _finite(considered.min()) if considered.size else None,
            "resampled": int(info.resampled.sum()),
            "num_ancestors": int(info.num_ancestors),
        }
    if isinstance(info, tmc.Info):
        return {
            "mean_distinct": _finite(info.num_distinct.mean()),
            "mean_kept_share": _finite(info.kept_share.mean()),
            "mean_effective_blocks": _finite(info.effective_blocks.mean()),
        }
    if isinstance(info, best_of_n.Info):
        return {
            "num_used": int(info.num_used),
            "chosen": int(info.chosen),
            "surplus_decoded": int(info.surplus_decoded),
        }
    return {}


def _finite(value: Any) -> float | None:
    """A number for JSON, which knows no infinity."""
    return round(float(value), 5) if np.isfinite(value) else None


def sum_positions(finished: Finished, prompt_length: int, config: Config) -> int:
    """Returns the number of slots that each decoded token was drawn after, summed over them.

    That of a step's tokens follows from where its proposal starts. Extensions start at the horizon
    before theirs, and the first step of a stage tells how far its extension came. The remaining
    tokens are those of an extension without a step after it: of a schedule without steps, or of a
    chain that failed there.

    Args:
      finished: the chain.
      prompt_length: its live prompt tokens.
      config: the run.
    """
    info, block = finished.info, config.stage_length
    total = 0
    remaining, num_stages = int(finished.stats.decoded), 0
    runs = []  # first slot and number of tokens
    first_cut = info.divergence if config.replay else info.cut
    for stage, step in np.argwhere(info.attempted):
        if step == 0:
            num_stages += 1
            runs.append((stage * block, max(0, info.current_length[stage, 0] - stage * block)))
        runs.append((first_cut[stage, step] - 1, info.decoded[stage, step]))
    for start, count in runs:
        total += _sum_run(prompt_length + int(start), int(count))
        remaining -= int(count)
    return total + _sum_run(prompt_length + num_stages * block, remaining)


def _sum_run(start: int, count: int) -> int:
    """The sum of ``count`` integers from ``start`` on."""
    return count * start + count * (count - 1) // 2


def count_flops(config: TransformerConfig, decoded: int, positions: int) -> int:
    """Returns the floating-point operations of decoding.

    A token takes 2 for each matrix parameter that it passes through (the head counts, the lookup
    of its embedding does not), and 4 for each query head, its size and each slot attended to:
    scores and weighted values.

    Args:
      config: the shape of the network.
      decoded: tokens.
      positions: slots attended to, summed over the tokens.
    """
    attention = config.query_size * config.num_layers * positions
    return 2 * config.matrix_elements * decoded + 4 * attention


def summarise(
    rows: Sequence[dict[str, Any]],
    runs: dict[str, Progress | GroupProgress],
    prompts: Sequence[str],
    model: LoadedModel,
    memory: Reservation,
    interrupted: bool,
) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
      rows: finished chains.
      runs: what was run, by sampler.
      prompts: their texts.
      model: what was sampled.
      memory: what the run took.
      interrupted: whether the run was stopped early.
    """
    device = jax.devices()[0]
    return {
        "model": {
            "name": model.name,
            "source": model.source,
            "dtype": str(model.dtype),
            "weights": model.quantised or str(model.dtype),
            "rotary": rotary.describe(model.config.rotary, model.needed_length),
            "needed_length": model.needed_length,
        },
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": {"ecmh_jax": ecmh_jax.__version__, "jax": jax.__version__},
        "memory": memory.describe(),
        "interrupted": interrupted,
        "samplers": {
            sampler: numbers | _describe_run(runs[sampler])
            for sampler, numbers in describe_samplers(rows, runs).items()
        },
        "prompts": [
            {
                "prompt_id": index,
                "prompt": prompt,
                "samplers": describe_samplers(
                    [row for row in rows if row["prompt_id"] == index], runs
                ),
            }
            for index, prompt in enumerate(prompts)
        ],
    }


def _describe_run(run: Progress | GroupProgress) -> dict[str, Any]:
    utilisation = run.slot_utilisation()
    return {
        "forwards": run.forwards,
        "discarded_tokens": run.discarded,
        "slot_utilisation": None if utilisation is None else round(utilisation, 4),
        "seconds": round(run.seconds, 3),
        "compile_seconds": round(run.compile_seconds, 3),
        "tokens_per_second": round(run.tokens_per_second(), 1),
        "effective_tokens_per_second": round(run.effective_tokens_per_second(), 1),
    }


def describe_samplers(
    rows: Sequence[dict[str, Any]], samplers: Iterable[str]
) -> dict[str, dict[str, Any]]:
    """Returns the figures of finished chains by sampler; ``rows`` as in ``traces.jsonl``."""
    by_sampler = {
        sampler: [row for row in rows if row["sampler"] == sampler] for sampler in samplers
    }
    return {
        sampler: _describe_rows(of_sampler)
        | _describe_multiple(of_sampler, by_sampler.get("standard", []))
        for sampler, of_sampler in by_sampler.items()
    }


def _describe_multiple(
    rows: Sequence[dict[str, Any]], standard: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Decoded tokens by chain as a multiple of one standard sample."""
    if standard:
        length = _mean([row["decoded_tokens"] for row in standard])
    else:
        length = _mean([row["num_tokens"] for row in rows])
    decoded = _mean([row["decoded_tokens"] for row in rows])
    return {
        "standard_sample_tokens": length,
        "standard_sample_from": "standard" if standard else "own_completions",
        "standard_samples_per_chain": round(decoded / length, 5) if decoded and length else None,
    }


def _describe_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over chains; log p is of whole completions, under the truncated law, in nats."""
    by_stage: dict[int, list[bool]] = collections.defaultdict(list)
    for row in rows:
        for stage, _, _, _, accepted, *_ in row["steps"]:
            by_stage[stage].append(accepted)
    log_probs = [row["log_prob"] for row in rows]
    return {
        "chains": len(rows),
        "mean_log_prob": _mean(log_probs),
        "standard_error": _standard_error(log_probs),
        "mean_log_prob_per_token": _mean(
            [row["log_prob"] / row["num_tokens"] for row in rows if row["num_tokens"]]
        ),
        "mean_num_tokens": _mean([row["num_tokens"] for row in rows]),
        "distinct": len({tuple(row["tokens"]) for row in rows}),
        "ended_with_eos": sum(row["ended"] == "eos" for row in rows),
        "not_finite": sum(row["ended"] == "not_finite" for row in rows),
        "acceptance_by_stage": {
            str(stage): _mean(accepted) for stage, accepted in sorted(by_stage.items())
        },
        **{
            name: sum(row[name] for row in rows)
            for name in (
                "attempted",
                "accepted",
                "null_moves",
                "proposed_tokens",
                "decoded_tokens",
                "replayed_tokens",
                "saved_tokens",
                "flops",
            )
        },
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 5) if len(values) else None


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return round(float(np.std(values, ddof=1)) / math.sqrt(len(values)), 5)
