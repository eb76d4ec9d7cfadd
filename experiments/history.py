"""Every step of a chain, for the trace viewer: from the engine's records to JSON."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from ecmh_jax.engine import Finished
from experiments.arms import Arm
from experiments.jobs import Job
from experiments.tasks import Problem
from models.load import LoadedModel

_DIGITS = 4


def describe(
    arm: Arm,
    problem: Problem,
    seed: int,
    prompt: str,
    finished: Finished,
    job: Job,
) -> dict[str, Any]:
    """Returns a chain's line of ``history.jsonl``.

    Args:
      arm: its arm.
      problem: its problem.
      seed: its seed.
      prompt: the problem as the model was given it.
      finished: the chain, run with ``config.record_proposals``.
      job: what it was part of.
    """
    moves = []
    info, record = finished.info, finished.info.proposal
    stage_before = -1
    for stage, step in np.argwhere(info.attempted):
        current = _completion(
            record.current_tokens[stage, step],
            record.current_entropy[stage, step],
            info.current_length[stage, step],
        )
        if stage != stage_before:
            moves.append(
                {"stage": int(stage) + 1, "step": 0, "kind": "extension"}
                | dict(zip(("tokens", "entropy"), current, strict=True))
            )
            stage_before = stage
        proposal = _completion(
            record.proposal_tokens[stage, step],
            record.proposal_entropy[stage, step],
            info.proposal_length[stage, step],
        )
        moves.append(
            {
                "stage": int(stage) + 1,
                "step": int(step) + 1,
                "kind": "step",
                "cut": int(info.cut[stage, step]),
                "divergence": int(info.divergence[stage, step]),
                "accepted": bool(info.accepted[stage, step]),
                "stopped": bool(record.stopped[stage, step]),
                "log_uniform": _number(record.log_uniform[stage, step]),
                "log_ratio": _number(info.log_ratio[stage, step]),
                "weight_new": _number(record.weight_new[stage, step]),
                "weight_old": _number(record.weight_old[stage, step]),
                "cut_change": _number(record.cut_change[stage, step]),
                "current_tokens": current[0],
                "current_entropy": current[1],
                "proposal_tokens": proposal[0],
                "proposal_entropy": proposal[1],
            }
        )
    used = {token for move in moves for name in _TOKENS for token in move.get(name, ())}
    return {
        "problem": problem.problem_id,
        "sampler": arm.name,
        "seed": seed,
        "power": arm.power,
        "cut_power": arm.cut_power,
        "prompt": prompt,
        "gold": problem.gold,
        "pieces": describe_pieces(job.model, used),
        "stage_length": job.config.stage_length,
        "moves": moves,
    }


_TOKENS = ("tokens", "current_tokens", "proposal_tokens")


def describe_pieces(model: LoadedModel, tokens: Iterable[int]) -> dict[str, str]:
    """Texts of tokens, each by itself; special ones by their names."""
    return {
        str(token): model.tokenizer.decode([token], skip_special_tokens=False)
        for token in sorted(set(tokens))
    }


def _completion(tokens: np.ndarray, entropy: np.ndarray, length: Any) -> tuple[list, list]:
    return tokens[: int(length)].tolist(), [_number(value) for value in entropy[: int(length)]]


def _number(value: Any) -> float | None:
    return round(float(value), _DIGITS) if np.isfinite(value) else None
