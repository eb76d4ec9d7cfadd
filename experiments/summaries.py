"""From device reports to rows, costs and a summary."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import ecmh_jax
from ecmh_jax.base import Config, State
from experiments.chains import Chains, Report
from models.load import LoadedModel

STEP_FIELDS = ("stage", "step", "cut", "divergence", "accepted", "log_ratio")


@dataclasses.dataclass
class Cost:
    """Running totals of one sampler over all its batches.

    Attributes:
      seconds: wall time of device calls.
      compile_seconds: wall time of compiling, apart.
      decoded: tokens decoded.
      attempted: Metropolis-Hastings steps by stage.
      accepted: accepted ones by stage.
    """

    seconds: float = 0.0
    compile_seconds: float = 0.0
    decoded: int = 0
    attempted: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    accepted: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)

    def add(self, report: Report) -> None:
        """Adds one device call."""
        self.seconds += report.seconds
        self.decoded += report.decoded
        if report.info is not None:
            self.attempted[report.stage] += int(report.info.attempted.sum())
            self.accepted[report.stage] += int(report.info.accepted.sum())

    def tokens_per_second(self) -> float:
        """Decoded tokens by second."""
        return self.decoded / self.seconds if self.seconds else 0.0

    def describe(self, stage: int) -> str:
        """One line for the progress bar."""
        parts = [f"stage {stage}", f"{self.tokens_per_second():.0f} tokens/s"]
        if attempted := self.attempted.total():
            parts.insert(1, f"accepted {self.accepted.total() / attempted:.0%}")
        return ", ".join(parts)


class History:
    """What the chains of one batch did, until their rows are taken."""

    def __init__(self, chains: Chains, sampler: str, model: LoadedModel, config: Config):
        """Starts with no steps and no rows taken."""
        self._chains, self._sampler, self._model, self._config = chains, sampler, model, config
        self._waiting = chains.real.copy()
        self._steps: list[list[list[Any]]] = [[] for _ in chains.real]

    def add(self, report: Report) -> None:
        """Records a device call's steps, chain by chain."""
        info = report.info
        if info is None:
            return
        for row in np.flatnonzero(info.attempted):
            self._steps[row].append(
                [
                    report.stage,
                    report.step,
                    int(info.cut[row]),
                    int(info.divergence[row]),
                    bool(info.accepted[row]),
                    round(float(info.log_ratio[row]), 5),
                ]
            )

    def take_rows(self, state: State, done: np.ndarray) -> list[dict[str, Any]]:
        """Returns the rows of the chains that are ``done`` [B] bool and were not taken yet."""
        taken = np.flatnonzero(self._waiting & done)
        self._waiting[taken] = False
        if not len(taken):
            return []
        trace, stats, finite = jax.tree.map(np.asarray, (state.trace, state.stats, state.finite))
        return [self._row(row, trace, stats, bool(finite[row])) for row in taken.tolist()]

    def _row(self, row: int, trace: Any, stats: Any, finite: bool) -> dict[str, Any]:
        start, end = int(self._chains.prompt_lengths[row]), int(trace.length[row])
        tokens = trace.tokens[row, start:end].tolist()
        ended = bool(tokens) and tokens[-1] in self._config.eos_ids
        return {
            "prompt_id": int(self._chains.prompt_ids[row]),
            "chain": int(self._chains.chain_ids[row]),
            "sampler": self._sampler,
            "text": self._model.tokenizer.decode(tokens),
            "tokens": tokens,
            "num_tokens": len(tokens),
            "ended": "eos" if ended else "length" if finite else "not_finite",
            "log_prob": round(float(trace.log_prob[row, start:end].sum()), 5),
            "entropy": round(float(trace.entropy[row, start:end].sum()), 5),
            "accepted": int(stats.accepted[row]),
            "attempted": int(stats.attempted[row]),
            "null_moves": int(stats.null_moves[row]),
            "decoded_tokens": int(stats.decoded[row]),
            "replayed_tokens": int(stats.replayed[row]),
            "saved_tokens": int(stats.saved[row]),
            "steps": self._steps[row],
        }


def summarise(
    rows: Sequence[dict[str, Any]],
    costs: dict[str, Cost],
    prompts: Sequence[str],
    model: LoadedModel,
    interrupted: bool,
) -> dict[str, Any]:
    """Returns the content of ``summary.json``.

    Args:
      rows: finished chains.
      costs: by sampler.
      prompts: their texts.
      model: what was sampled.
      interrupted: whether the run was stopped early.
    """
    device = jax.devices()[0]
    return {
        "model": {"name": model.name, "source": model.source, "dtype": str(model.dtype)},
        "device": {"platform": device.platform, "kind": device.device_kind},
        "versions": {"ecmh_jax": ecmh_jax.__version__, "jax": jax.__version__},
        "interrupted": interrupted,
        "samplers": {
            sampler: _describe_rows([row for row in rows if row["sampler"] == sampler])
            | {
                "seconds": round(cost.seconds, 3),
                "compile_seconds": round(cost.compile_seconds, 3),
                "tokens_per_second": round(cost.tokens_per_second(), 1),
            }
            for sampler, cost in costs.items()
        },
        "prompts": [
            {
                "prompt_id": index,
                "prompt": prompt,
                "samplers": {
                    sampler: _describe_rows(
                        [
                            row
                            for row in rows
                            if row["sampler"] == sampler and row["prompt_id"] == index
                        ]
                    )
                    for sampler in costs
                },
            }
            for index, prompt in enumerate(prompts)
        ],
    }


def _describe_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over chains; log p is of whole completions, under the truncated law, in nats."""
    by_stage: dict[int, list[bool]] = collections.defaultdict(list)
    for row in rows:
        for stage, _, _, _, accepted, _ in row["steps"]:
            by_stage[stage].append(accepted)
    log_probs = [row["log_prob"] for row in rows]
    return {
        "chains": len(rows),
        "mean_log_prob": _mean(log_probs),
        "standard_error": _standard_error(log_probs),
        "mean_log_prob_per_token": _mean([row["log_prob"] / row["num_tokens"] for row in rows]),
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
                "decoded_tokens",
                "replayed_tokens",
                "saved_tokens",
            )
        },
    }


def _mean(values: Sequence[float]) -> float | None:
    return round(float(np.mean(values)), 5) if len(values) else None


def _standard_error(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return round(float(np.std(values, ddof=1)) / math.sqrt(len(values)), 5)
