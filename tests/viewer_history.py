"""Made-up evaluations for the page's tests: real Metropolis-Hastings on a small law over words.

A trace is a walk through a graph of phrases: the next phrase is a decision, the words within it are
nearly certain, so entropy jumps where a decision falls. Every number of a row and of its history is
what the algorithm gives on this law, with replay and certain rejection; none is invented.
"""

import math
import re
from typing import Any, NamedTuple

import numpy as np

POWER = 4.0
CUT_POWER = 4.0
STAGE_LENGTH = 16
NUM_STAGES = 6
STEPS_PER_STAGE = 6
END = "<|end|>"
SAMPLERS = ("standard", "low_temperature", "uniform_cut", "entropy_cut")
PROBLEMS = ((48, 2), (60, 3), (90, 5))  # rolls sold in the morning; the afternoon sells a share

# Each phrase: its probability, its words, the graph's next node.
_GRAPH = {
    "start": (
        (0.36, "Let's work through this step by step.\n", "morning"),
        (0.30, "In the morning the bakery sells {a} rolls.\n", "afternoon"),
        (0.20, "We need the rolls of both halves of the day.\n", "morning"),
        (0.14, "First, note what is given: {a} rolls in the morning.\n", "afternoon"),
    ),
    "morning": (
        (0.48, "Morning: {a} rolls.\n", "afternoon"),
        (0.32, "The morning gives {a} rolls.\n", "afternoon"),
        (0.20, "Call the rolls of the morning m = {a}.\n", "afternoon"),
    ),
    "afternoon": (
        (0.36, "One in {k} of {a} is {b}, so the afternoon gives {b}.\n", "sum"),
        (0.24, "In the afternoon it sells {a} / {k} = {b} rolls.\n", "sum"),
        (0.22, "Then it sells {k} fewer, so {a} - {k} = {c} rolls.\n", "wrong"),
        (0.18, "Afternoon: {a} * {k} = {d} rolls.\n", "worse"),
    ),
    "sum": (
        (0.78, "Adding up, {a} + {b} = {right}.\n", "answer"),
        (0.14, "Together: {a} + {b} = {right} rolls.\n", "answer"),
        (0.08, "So in all it sells {right} rolls in the day.\n", "answer"),
    ),
    "wrong": (
        (0.4, "So the bakery sells {a} + {c} = {wrong}.\n", "wrong_answer"),
        (0.35, "Together: {a} + {c} = {wrong} rolls.\n", "wrong_answer"),
        (0.25, "Adding both gives {wrong}.\n", "wrong_answer"),
    ),
    "worse": (
        (0.4, "Together: {a} + {d} = {worse}.\n", "worse_answer"),
        (0.35, "In all that is {worse} rolls.\n", "worse_answer"),
        (0.25, "Hmm, so the sum is {worse}.\n", "worse_answer"),
    ),
    "answer": (
        (0.7, "#### {right}", "end"),
        (0.3, "The answer is {right}.\n#### {right}", "end"),
    ),
    "wrong_answer": (
        (0.6, "#### {wrong}", "end"),
        (0.4, "The answer is {wrong}.\n#### {wrong}", "end"),
    ),
    "worse_answer": (
        (0.6, "#### {worse}", "end"),
        (0.4, "The answer is {worse}.\n#### {worse}", "end"),
    ),
}
_SYNONYMS = {" sells": " bakes", " gives": " brings", " rolls": " loaves", "Together:": "Total:"}
_FILLER = " just"


class Trace(NamedTuple):
    """A completion; of each word its log p, log-weight and entropy, in nats."""

    words: list[str]
    log_prob: list[float]
    log_weight: list[float]
    entropy: list[float]

    def upto(self, length: int) -> "Trace":
        head = (self.log_prob[:length], self.log_weight[:length], self.entropy[:length])
        return Trace(self.words[:length], *head)

    def add(self, word: str, law: dict[str, float]) -> None:
        total = sum(p**POWER for p in law.values())
        self.words.append(word)
        self.log_prob.append(math.log(law[word]))
        self.log_weight.append(math.log(total))  # the same for any word: tau is 1 / POWER
        self.entropy.append(-sum(p * math.log(p) for p in law.values()))


class WordLaw:
    """The next-word law of one problem."""

    def __init__(self, rolls: int, share: int):
        numbers: dict[str, int] = {"a": rolls, "k": share, "b": rolls // share}
        numbers |= {"c": rolls - share, "d": rolls * share}
        numbers |= {name: rolls + numbers[of] for name, of in zip(_TOTALS, "bcd", strict=True)}
        self.gold = str(numbers["right"])
        self.graph = {
            node: [
                (p, re.findall(r"\n| ?\S+", phrase.format(**numbers)), following)
                for p, phrase, following in phrases
            ]
            for node, phrases in _GRAPH.items()
        }

    def next_words(self, words: list[str]) -> dict[str, float]:
        """Returns the probabilities of what may follow ``words``, none of which is the end."""
        node, phrase, place = "start", None, 0
        for word in words:
            if word == _FILLER:
                continue
            if phrase is None:
                phrase = next(
                    entry for entry in self.graph[node] if word in (entry[1][0], _other(entry[1]))
                )
                place = 0
            place += 1
            if place == len(phrase[1]):
                node, phrase = phrase[2], None
        if phrase is not None:
            expected = phrase[1][place]
            sure = 0.9 + 0.098 * math.sin(7.0 * place + len(words)) ** 2
            return _with_slips(expected, sure)
        if node == "end":
            return {END: 0.97, _FILLER: 0.03}
        law: dict[str, float] = {}
        for p, phrase_words, _ in self.graph[node]:
            for word, share in _with_slips(phrase_words[0], 0.98).items():
                law[word] = law.get(word, 0.0) + p * share
        return law


_TOTALS = ("right", "wrong", "worse")


def _other(words: list[str]) -> str | None:
    return _SYNONYMS.get(words[0])


def _with_slips(word: str, sure: float) -> dict[str, float]:
    if word in _SYNONYMS:
        return {word: 0.72, _SYNONYMS[word]: 0.25, _FILLER: 0.03}
    return {word: sure, _FILLER: 1.0 - sure}


def _draw(rng: np.random.Generator, law: dict[str, float], temperature: float) -> str:
    weights = np.array(list(law.values())) ** (1.0 / temperature)
    return str(rng.choice(list(law), p=weights / weights.sum()))


def _continue(
    rng: np.random.Generator, law: WordLaw, trace: Trace, horizon: int, temperature: float
) -> Trace:
    while len(trace.words) < horizon and END not in trace.words[-1:]:
        choices = law.next_words(trace.words)
        trace.add(_draw(rng, choices, temperature), choices)
    return trace


def cut_law(entropy: list[float], uniform: bool) -> np.ndarray:
    """Returns log c(t | x) of every position, from the jumps of the entropy."""
    jumps = np.maximum(np.diff(entropy, prepend=0.0), 0.0) ** CUT_POWER
    if uniform or not jumps.sum():
        jumps = np.ones(len(entropy))
    with np.errstate(divide="ignore"):
        return np.log(jumps / jumps.sum())


def run_chain(rng: np.random.Generator, law: WordLaw, uniform: bool) -> tuple[Trace, list[dict]]:
    """Runs one chain and returns its last trace and every move, words in place of token ids."""
    trace, moves = Trace([], [], [], []), []
    for stage in range(1, NUM_STAGES + 1):
        if trace.words[-1:] == [END]:
            break  # the paper freezes a chain after the stage in which it ends
        horizon = stage * STAGE_LENGTH
        trace = _continue(rng, law, trace, horizon, 1.0 / POWER)
        moves.append({"stage": stage, "step": 0, "kind": "extension"} | _named("", trace))
        for step in range(1, STEPS_PER_STAGE + 1):
            trace, move = _step(rng, law, trace, horizon, uniform)
            moves.append({"stage": stage, "step": step, "kind": "step"} | move)
    return trace, moves


def _named(prefix: str, trace: Trace) -> dict[str, Any]:
    entropy = [round(value, 4) for value in trace.entropy]
    return {f"{prefix}tokens": list(trace.words), f"{prefix}entropy": entropy}


def _step(
    rng: np.random.Generator, law: WordLaw, current: Trace, horizon: int, uniform: bool
) -> tuple[Trace, dict[str, Any]]:
    log_cut = cut_law(current.entropy, uniform)
    cut = int(rng.choice(len(log_cut), p=np.exp(log_cut)))
    log_uniform = math.log(1.0 - rng.random())
    proposal = current.upto(cut)
    divergence, stopped = 0, False
    new = old = change = log_ratio = 0.0
    while len(proposal.words) < horizon and END not in proposal.words[-1:]:
        choices = law.next_words(proposal.words)
        proposal.add(_draw(rng, choices, 1.0 / POWER), choices)
        place = len(proposal.words)
        if not divergence and proposal.words[-1] != current.words[place - 1]:
            divergence = place
        if not divergence:
            continue
        new = sum(proposal.log_weight[divergence - 1 :])
        old = sum(current.log_weight[divergence - 1 :])
        change = float(cut_law(proposal.entropy, uniform)[cut] - log_cut[cut])
        log_ratio = new - old + change
        if log_ratio < log_uniform:
            stopped = len(proposal.words) < horizon and proposal.words[-1] != END
            break
    accepted = log_ratio >= log_uniform
    move = {"cut": cut + 1, "divergence": divergence, "accepted": accepted, "stopped": stopped}
    move |= {"log_uniform": log_uniform, "log_ratio": log_ratio}
    move |= {"weight_new": new, "weight_old": old, "cut_change": change}
    move = {k: round(v, 5) if isinstance(v, float) else v for k, v in move.items()}
    move |= _named("current_", current) | _named("proposal_", proposal)
    return (proposal if accepted else current), move


def make_evaluation(num_seeds: int = 3, seed: int = 0) -> dict[str, Any]:
    """Returns the arguments of ``build_page``: every problem by every sampler, made up.

    Args:
      num_seeds: runs of each sampler on each problem.
      seed: of everything that is drawn.
    """
    ids: dict[str, int] = {}
    rows, history = [], []
    for problem, (rolls, share) in enumerate(PROBLEMS):
        law = WordLaw(rolls, share)
        for place, sampler in enumerate(SAMPLERS):
            for run in range(num_seeds):
                rng = np.random.default_rng([seed, problem, place, run])
                moves: list[dict[str, Any]] = []
                if sampler.endswith("_cut"):
                    trace, moves = run_chain(rng, law, uniform=sampler == "uniform_cut")
                else:
                    temperature = 1.0 if sampler == "standard" else 1.0 / POWER
                    start = Trace([], [], [], [])
                    trace = _continue(rng, law, start, NUM_STAGES * STAGE_LENGTH, temperature)
                _number(moves, ids)
                key = {"problem": str(problem), "sampler": sampler, "seed": run}
                rows.append(_row(key, law.gold, trace, moves, ids))
                if moves:
                    prompt = (
                        f"A bakery sells {rolls} rolls in the morning and one for every {share} of "
                        "them in the afternoon. How many rolls does it sell in all?"
                    )
                    extra = {"power": POWER, "cut_power": CUT_POWER, "stage_length": STAGE_LENGTH}
                    extra |= {"prompt": prompt, "gold": law.gold, "moves": moves}
                    history.append(key | extra)
    pieces = {str(token): word for word, token in ids.items()}
    for entry in history:
        entry["pieces"] = pieces
    return {
        "title": "Bakery problems, four samplers",
        "settings": {
            "task": "bakery",
            "model": {"name": "phrase-graph", "dtype": "float64"},
            "data": {"file": "bakery.jsonl", "rows": len(PROBLEMS), "sha256": "9f2c01ab44de"},
            "config": {"stage_length": STAGE_LENGTH, "num_stages": NUM_STAGES},
            "samplers": {name: {"power": POWER, "cut_power": CUT_POWER} for name in SAMPLERS},
        },
        "table": [_table_row(name, [r for r in rows if r["sampler"] == name]) for name in SAMPLERS],
        "notes": [f"{len(PROBLEMS)} made-up problems, {num_seeds} seeds each.", "alpha = 4."],
        "figures": [("Share of right answers by sampler.", draw_bars(rows))],
        "rows": rows,
        "history": history,
    }


def verdict_of(move: dict[str, Any]) -> str:
    """Returns what the page should call a move."""
    if move["kind"] == "extension":
        return "Extension"
    if not move["divergence"]:
        return "Null move"
    return "Accepted" if move["accepted"] else "Rejected early" if move["stopped"] else "Rejected"


def _number(moves: list[dict[str, Any]], ids: dict[str, int]) -> None:
    for move in moves:
        for name in ("tokens", "current_tokens", "proposal_tokens"):
            if name in move:
                move[name] = [ids.setdefault(word, 100 + len(ids)) for word in move[name]]


def _row(
    key: dict[str, Any], gold: str, trace: Trace, moves: list[dict], ids: dict[str, int]
) -> dict[str, Any]:
    words = [word for word in trace.words if word != END]
    text = "".join(words)
    found = re.search(r"#### (\d+)( just)*$", text)
    answer = found.group(1) if found else None
    steps = [move for move in moves if move["kind"] == "step"]
    return key | {
        "text": text,
        "tokens": [ids.setdefault(word, 100 + len(ids)) for word in trace.words],
        "num_tokens": len(trace.words),
        "ended": "eos" if trace.words[-1] == END else "length",
        "answer": answer,
        "gold": gold,
        "correct": answer == gold,
        "log_prob": round(sum(trace.log_prob), 5),
        "entropy": round(sum(trace.entropy), 5),
        "token_log_prob": [round(value, 4) for value in trace.log_prob],
        "token_entropy": [round(value, 4) for value in trace.entropy],
        "attempted": len(steps),
        "accepted": sum(move["accepted"] for move in steps),
        "null_moves": sum(not move["divergence"] for move in steps),
    }


def _table_row(sampler: str, rows: list[dict[str, Any]]) -> dict[str, str | float | None]:
    attempted = sum(row["attempted"] for row in rows)
    accepted = sum(row["accepted"] for row in rows)
    return {
        "sampler": sampler,
        "accuracy": f"{100 * np.mean([row['correct'] for row in rows]):.1f} %",
        "log p": f"{np.mean([row['log_prob'] for row in rows]):.2f}".replace("-", "\u2212"),
        "tokens": f"{np.mean([row['num_tokens'] for row in rows]):.1f}",
        "right of": f"{sum(row['correct'] for row in rows)} / {len(rows)}",
        "acceptance": f"{100 * accepted / attempted:.0f} %" if attempted else None,
    }


def draw_bars(rows: list[dict[str, Any]]) -> str:
    """Returns an SVG of the share of right answers by sampler."""
    parts = []
    for place, sampler in enumerate(SAMPLERS):
        share = np.mean([row["correct"] for row in rows if row["sampler"] == sampler])
        y = 16 + 34 * place
        parts.append(
            f'<text x="120" y="{y + 15}" text-anchor="end">{sampler}</text>'
            f'<rect x="130" y="{y}" width="{300 * share:.1f}" height="20" fill="#0072b2"/>'
            f'<text x="{136 + 300 * share:.1f}" y="{y + 15}">{100 * share:.0f} %</text>'
        )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 480 160" width="480" height="160" '
        f'style="font: 13px sans-serif">{"".join(parts)}</svg>'
    )
