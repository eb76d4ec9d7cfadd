"""Made-up evaluations, seeded: rows, sessions, settings and history of the real form.

Nothing is sampled from a model: texts are words drawn at random, entropies have jumps where a
sentence starts, and the chains of Metropolis-Hastings samplers are simulated with random ratios.
What must hold among the numbers of a row does hold.
"""

import hashlib
import json
import pathlib
from typing import Any

import numpy as np

_TEXT = (
    "So the sum is then because we add two half of all apples left over twice each day "
    "cost total number minus first next answer gives must find that one three price equals"
)
WORDS = _TEXT.split()
EOS = 0
NUM_STAGES = 4
STAGE_LENGTH = 16
STEPS_PER_STAGE = 3
# Chance to be right beyond a problem's own, in log odds, and decoded tokens by token of the result.
SAMPLERS: dict[str, tuple[float, float]] = {
    "standard": (-1.0, 1.0),
    "low_temperature": (0.3, 1.0),
    "uniform_cut": (0.9, 5.5),
    "entropy_cut": (1.4, 4.5),
    "best_of_n": (0.8, 8.0),
    "smc": (0.7, 16.0),
}
STEPPED = ("entropy_cut", "uniform_cut", "multiple_try")


def make_settings(samplers: tuple[str, ...] = tuple(SAMPLERS)) -> dict[str, Any]:
    """A ``settings.json``."""
    return {
        "task": "gsm8k",
        "data": {"file": "gsm8k_test.jsonl", "sha256": "0" * 64, "rows": 40},
        "model": {"name": "random:tiny"},
        "config": {
            "max_new_tokens": NUM_STAGES * STAGE_LENGTH,
            "num_stages": NUM_STAGES,
            "steps_per_stage": STEPS_PER_STAGE,
        },
        "samplers": {name: {} for name in samplers},
    }


def make_rows(
    seed: int = 0,
    num_problems: int = 20,
    num_seeds: int = 4,
    samplers: tuple[str, ...] = tuple(SAMPLERS),
) -> list[dict[str, Any]]:
    """Rows of every problem, sampler and seed.

    Args:
      seed: of all of it; a row depends on it, its problem, its sampler and its seed alone.
      num_problems: problems "0", "1", ...
      num_seeds: seeds 0, 1, ...
      samplers: any names; those that SAMPLERS lacks behave like ``low_temperature``.
    """
    return [
        make_row(seed, str(problem), sampler, row_seed)
        for sampler in samplers
        for problem in range(num_problems)
        for row_seed in range(num_seeds)
    ]


def make_row(seed: int, problem: str, sampler: str, row_seed: int) -> dict[str, Any]:
    """One row."""
    of_problem = _generator(seed, problem)
    ability, multiple = SAMPLERS.get(sampler, SAMPLERS["low_temperature"])
    chance = 1 / (1 + np.exp(-(of_problem.normal(-0.8, 1.8) + ability)))
    gold = int(of_problem.integers(2, 99))
    rng = _generator(seed, problem, sampler, row_seed)
    correct = bool(rng.random() < chance)
    horizon = NUM_STAGES * STAGE_LENGTH
    length = min(horizon, int(rng.integers(18, horizon + horizon // 5)))
    ended = "eos" if length < horizon else "length"
    sharpness = 1.0 if sampler == "standard" else 0.5
    tokens, entropies, log_probs = _draw_trace(rng, length, ended == "eos", sharpness)
    steps: list[list[Any]] = []
    if sampler in STEPPED:
        steps = _draw_steps(rng, sampler, tokens, entropies, log_probs)
    answer = gold if correct else gold + int(rng.integers(1, 4))
    words = " ".join(WORDS[token - 1] for token in tokens if token)
    proposed = round(length * multiple * rng.uniform(0.8, 1.2)) if multiple > 1 else length
    replayed = round(proposed * 0.2) if steps else 0
    saved = round(proposed * 0.25) if steps else 0
    return {
        "task": "gsm8k",
        "problem": problem,
        "sampler": sampler,
        "seed": row_seed,
        "settings": hashlib.sha256(sampler.encode()).hexdigest()[:12],
        "text": f"{words} #### {answer}",
        "tokens": tokens,
        "num_tokens": length,
        "ended": ended,
        "answer": str(answer) if correct or rng.random() < 0.9 else None,
        "gold": str(gold),
        "correct": correct,
        "log_prob": round(float(np.sum(log_probs)), 5),
        "entropy": round(float(np.sum(entropies)), 5),
        "token_log_prob": [round(value, 4) for value in log_probs],
        "token_entropy": [round(value, 4) for value in entropies],
        "attempted": len(steps),
        "accepted": sum(step[4] for step in steps),
        "null_moves": sum(step[3] == 0 for step in steps),
        "proposed_tokens": proposed,
        "decoded_tokens": proposed - replayed - saved,
        "replayed_tokens": replayed,
        "saved_tokens": saved,
        "flops": 270_000_000 * (proposed - replayed - saved),
        "steps": steps,
    }


def make_sessions(rows: list[dict[str, Any]], parts: int = 2) -> list[dict[str, Any]]:
    """Sessions that made the rows, as if the run had been resumed ``parts - 1`` times."""
    sessions = []
    for part in range(parts):
        for sampler in dict.fromkeys(row["sampler"] for row in rows):
            made = [row for row in rows if row["sampler"] == sampler][part::parts]
            decoded = sum(row["decoded_tokens"] for row in made)
            sessions.append(
                {
                    "sampler": sampler,
                    "seconds": round(decoded / 180, 3),
                    "compile_seconds": 2.5,
                    "forwards": decoded // 8,
                    "decoded_tokens": decoded,
                    "rows": len(made),
                }
            )
    return sessions


def make_history(seed: int, row: dict[str, Any]) -> dict[str, Any]:
    """The history of a row: an extension and some steps, with terms that add up."""
    rng = _generator(seed, "history", row["problem"], row["sampler"], row["seed"])
    tokens, entropies, _ = _draw_trace(rng, STAGE_LENGTH, False, 0.5)
    moves = [{"stage": 1, "step": 0, "kind": "extension", "tokens": tokens, "entropy": entropies}]
    for step in range(1, STEPS_PER_STAGE + 1):
        cut = int(rng.integers(1, STAGE_LENGTH + 1))
        new, new_entropies, _ = _draw_trace(rng, STAGE_LENGTH, False, 0.5)
        proposal = tokens[: cut - 1] + new[cut - 1 :]
        proposal_entropies = entropies[: cut - 1] + new_entropies[cut - 1 :]
        differing = [at for at in range(STAGE_LENGTH) if proposal[at] != tokens[at]]
        weight_new, weight_old, cut_change = (float(rng.normal(centre)) for centre in (-2, -2, 0))
        log_ratio, log_uniform = weight_new - weight_old + cut_change, float(np.log(rng.random()))
        accepted = log_ratio >= log_uniform
        moves.append(
            {
                "stage": 1,
                "step": step,
                "kind": "step",
                "cut": cut,
                "divergence": differing[0] + 1 if differing else 0,
                "accepted": accepted,
                "stopped": False,
                "log_uniform": log_uniform,
                "log_ratio": log_ratio,
                "weight_new": weight_new,
                "weight_old": weight_old,
                "cut_change": cut_change,
                "current_tokens": tokens,
                "current_entropy": entropies,
                "proposal_tokens": proposal,
                "proposal_entropy": proposal_entropies,
            }
        )
        if accepted:
            tokens, entropies = proposal, proposal_entropies
    return {
        "problem": row["problem"],
        "sampler": row["sampler"],
        "seed": row["seed"],
        "power": 4.0,
        "cut_power": 4.0,
        "prompt": "How many apples are left?",
        "gold": row["gold"],
        "pieces": {
            str(token): "<eos>" if token == EOS else f" {WORDS[token - 1]}"
            for token in range(len(WORDS) + 1)
        },
        "stage_length": STAGE_LENGTH,
        "moves": moves,
    }


def write_folder(
    path: pathlib.Path,
    rows: list[dict[str, Any]],
    history: list[dict[str, Any]] | None = None,
) -> pathlib.Path:
    """Writes an evaluation's folder and returns its path."""
    path.mkdir(parents=True, exist_ok=True)
    samplers = tuple(dict.fromkeys(row["sampler"] for row in rows))
    (path / "settings.json").write_text(json.dumps(make_settings(samplers)))
    files = {"rows": rows, "sessions": make_sessions(rows)}
    for name, records in (files | ({"history": history} if history else {})).items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return path


def _generator(*words: Any) -> np.random.Generator:
    digest = hashlib.sha256(repr(words).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _draw_trace(
    rng: np.random.Generator, length: int, ends: bool, sharpness: float
) -> tuple[list[int], list[float], list[float]]:
    """Tokens, entropies and log-probabilities; decision points every few tokens."""
    tokens = rng.integers(1, len(WORDS) + 1, length).tolist()
    if ends:
        tokens[-1] = EOS
    decides = rng.random(length) < 0.15
    entropies = np.where(decides, rng.uniform(1.5, 3.0, length), rng.exponential(0.25, length))
    log_probs = -sharpness * entropies * rng.exponential(1.0, length)
    return tokens, entropies.tolist(), log_probs.tolist()


def _draw_steps(
    rng: np.random.Generator,
    sampler: str,
    tokens: list[int],
    entropies: list[float],
    log_probs: list[float],
) -> list[list[Any]]:
    """Steps of all stages up to that in which the trace ends; the last state is the trace's."""
    steps = []
    length = len(tokens)
    for stage in range(1, -(-length // STAGE_LENGTH) + 1):
        reached = min(length, stage * STAGE_LENGTH)
        jumps = np.maximum(np.diff(entropies[:reached], prepend=0.0), 0) ** 4
        law = jumps / jumps.sum() if sampler == "entropy_cut" else np.full(reached, 1 / reached)
        total = float(np.sum(log_probs[:reached]))
        gap = 6.0
        for step in range(1, STEPS_PER_STAGE + 1):
            cut = int(rng.choice(reached, p=law)) + 1
            is_null = bool(rng.random() < 0.15)
            accepted = is_null or bool(rng.random() < 0.5)
            gap *= 0.6 if accepted and not is_null else 1.0
            left = 0.0 if step == STEPS_PER_STAGE else gap
            steps.append(
                [
                    stage,
                    step,
                    cut,
                    0 if is_null else min(reached, cut + int(rng.integers(0, 3))),
                    accepted,
                    0.0 if is_null else round(float(rng.normal(-1, 2)), 5),
                    round(total - left, 5),
                    round(float(np.mean(entropies[:reached])), 5),
                ]
            )
    return steps
