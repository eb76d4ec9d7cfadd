"""Best-of-N: several independent draws from q, of which the likeliest under p is kept.

    x_1..x_N ~ q, each to end-of-sequence or ``max_new_tokens``
    x = x_j, j = argmax_i score(x_i),    score = log p(x) / n  or  log p(x)

With a budget of decoded tokens the candidates count in the order of their numbers until their
cumulated tokens reach it; the one that crosses it is kept, so that a run of Metropolis-Hastings
and its best-of-N have spent the same, rejected tokens included (arXiv:2605.30327, baselines).

The candidates are exact draws from q: ``low_temperature``, or ``standard`` where the proposal
temperature is 1. The winner follows the law of the best of N such draws, which is not p^power.
"""

import dataclasses
from collections.abc import Callable, Hashable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import ecmh
from ecmh_jax.base import Config, LanguageModel, Params, Result, State, Stats, Trace, Tuning

SCORES = ("mean_log_prob", "total_log_prob")
_NO_LIMIT = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static about best-of-N.

    Attributes:
      num_candidates: N, the most candidates that one result may draw, >= 1.
      score: what the winner has most of: "mean_log_prob", log p of the completion a token, or
        "total_log_prob", which favours short completions.
      rows: candidates of a result that decode together, a divisor of ``num_candidates``; None
        for all. Fewer rows take less memory and more time, and change no candidate.
    """

    num_candidates: int = 32
    score: Literal["mean_log_prob", "total_log_prob"] = "mean_log_prob"
    rows: int | None = None


class Info(NamedTuple):
    """Every candidate of every result, so that a caller may choose by another rule.

    Attributes:
      candidates: a trace with leading axes [B, N]: tokens [B, N, T], length [B, N] with the
        prompt, and so on. A candidate beyond the budget is the bare prompt.
      num_used: [B] int32, candidates within the budget, 1..N; they are the first ones.
      score: [B, N] float32 nats, -inf for a candidate beyond the budget or one whose logits were
        not finite.
      chosen: [B] int32, the candidate that is the result; the first of equals.
      surplus_decoded: [B] int32, tokens that were decoded beside the counted ones and thrown
        away, because candidates that decode together start before the budget is known to be met.
    """

    candidates: Trace
    num_used: jax.Array
    score: jax.Array
    chosen: jax.Array
    surplus_decoded: jax.Array


class _Drawn(NamedTuple):
    """Candidates with leading axes [B, N]."""

    trace: Trace
    decoded: jax.Array
    finite: jax.Array


def check_options(options: Options) -> None:
    """Raises ValueError unless the options make sense together."""
    for name in ("num_candidates", "rows"):
        value = getattr(options, name)
        if name == "rows" and value is None:
            continue
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
    if options.num_candidates % rows_per_chain(options):
        raise ValueError(
            f"rows is {options.rows}; expected a divisor of num_candidates, "
            f"which is {options.num_candidates}"
        )
    if options.score not in SCORES:
        raise ValueError(f"score is {options.score!r}; expected one of {', '.join(SCORES)}")


def rows_per_chain(options: Options) -> int:
    """Rows of the decoding batch that one result takes."""
    return options.num_candidates if options.rows is None else options.rows


def run(
    rng_key,
    model: LanguageModel,
    params: Params,
    prompts,
    prompt_lengths,
    prompt_ids,
    chain_ids,
    tuning: Tuning,
    config: Config,
    options: Options,
    budget=None,
) -> Result:
    """Draws the candidates of every result and keeps the best of each.

    Candidate j of chain c is the low-temperature draw of chain ``c * N + j``, token for token.

    Args:
      rng_key: scalar typed key, the run's seed.
      model: the language model.
      params: its weights.
      prompts: [B, P] int32, padded on the right.
      prompt_lengths: [B] int32, 1..P.
      prompt_ids: [B] int32 and
      chain_ids: [B] int32: identity of each result.
      tuning: per-result numbers; q has the caller's proposal temperature.
      config: the run; its schedule of stages is not used.
      options: the candidates.
      budget: [B] int32, decoded tokens that each result may spend, or None for no limit. A
        budget below 1 counts as 1, which buys one candidate.

    Returns:
      The best candidates; ``stats.decoded`` counts the tokens of the candidates that were used,
      and ``finite`` is False where none of those had finite logits. ``info`` is an ``Info``.
    """
    config = dataclasses.replace(config, num_stages=1, steps_per_stage=0)
    state = ecmh.init(model, params, prompts, prompt_lengths, prompt_ids, chain_ids, config)
    if budget is None:
        budget = jnp.full_like(state.chain_id, _NO_LIMIT)
    chex.assert_shape(budget, state.chain_id.shape)
    budget = jnp.maximum(budget, 1)
    drawn = _draw_candidates(rng_key, model, params, state, tuning, config, options, budget)
    used = used_candidates(drawn.decoded, budget)
    score = score_candidates(drawn.trace, prompt_lengths, options.score)
    score, chosen = choose(score, used, drawn.finite)
    decoded = count_decoded(drawn.decoded, used)
    candidates = _blank_unused(drawn.trace, used, state.trace)
    rows = jnp.arange(len(chosen))
    none = jnp.zeros_like(decoded)
    return Result(
        trace=jax.tree.map(lambda leaf: leaf[rows, chosen], candidates),
        stats=Stats(none, none, none, decoded, none, none),
        finite=(used & drawn.finite).any(axis=1),
        info=Info(
            candidates=candidates,
            num_used=used.sum(axis=1, dtype=jnp.int32),
            score=score,
            chosen=chosen,
            surplus_decoded=drawn.decoded.sum(axis=1) - decoded,
        ),
    )


def used_candidates(decoded: jax.Array, budget: jax.Array) -> jax.Array:
    """Which candidates the budget allows: those that begin before it is spent.

    Args:
      decoded: [B, N] int32, decoded tokens of each candidate.
      budget: [B] int32, decoded tokens, >= 1.

    Returns:
      [B, N] bool, true up to and with the candidate that crosses the budget.
    """
    spent_before = jnp.cumsum(decoded, axis=1) - decoded
    return spent_before < budget[:, None]


def score_candidates(trace: Trace, prompt_lengths: jax.Array, score: str) -> jax.Array:
    """Scores [B, N] float32 nats of candidates [B, N], higher is better."""
    total = trace.log_prob.sum(axis=-1)
    if score == "total_log_prob":
        return total
    # A candidate that failed at its first token has none.
    return total / jnp.maximum(trace.length - prompt_lengths[:, None], 1)


def choose(score: jax.Array, used: jax.Array, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the scores [B, N], -inf where a candidate may not win, and the best one's [B]."""
    score = jnp.where(used & finite, score, -jnp.inf)
    return score, score.argmax(axis=1).astype(jnp.int32)


def count_decoded(decoded: jax.Array, used: jax.Array) -> jax.Array:
    """Tokens [B] int32 that the used candidates cost."""
    return jnp.where(used, decoded, 0).sum(axis=1)


def choose_by_majority(
    info: Info,
    prompt_lengths,
    answer_of: Callable[[list[int]], Hashable | None],
) -> np.ndarray:
    """Chooses the best-scored candidate of the most frequent answer (self-consistency).

    On the host. Candidates beyond the budget or without finite logits have no vote. Equally
    frequent answers are told apart by the higher sum of their candidates' scores.

    Args:
      info: of a best-of-N run.
      prompt_lengths: [B] integers, live prompt tokens.
      answer_of: maps a completion's tokens, an end-of-sequence token included, to its answer, or
        to None, which wins only where there is no other answer.

    Returns:
      The chosen candidate of each result, [B] int32; ``info.chosen`` where nothing has a vote.
    """
    tokens, lengths = np.asarray(info.candidates.tokens), np.asarray(info.candidates.length)
    score = np.asarray(info.score, np.float64)
    chosen = np.array(info.chosen, np.int32)
    for row, prompt_length in enumerate(np.asarray(prompt_lengths)):
        voters = np.flatnonzero(score[row] > -np.inf).tolist()
        answers = [
            answer_of(tokens[row, voter, prompt_length : lengths[row, voter]].tolist())
            for voter in voters
        ]
        if voters:
            chosen[row] = voters[_best_of_majority(answers, score[row, voters].tolist())]
    return chosen


def _best_of_majority(answers: list[Hashable | None], scores: list[float]) -> int:
    """Returns the best-scored candidate of the most frequent answer; the first of equals."""
    groups: dict[Hashable | None, list[int]] = {}
    for candidate, answer in enumerate(answers):
        groups.setdefault(answer, []).append(candidate)
    if len(groups) > 1:
        groups.pop(None, None)

    def votes(group: list[int]) -> tuple[int, float]:
        return len(group), sum(scores[candidate] for candidate in group)

    winners = max(groups.values(), key=votes)
    return max(winners, key=lambda candidate: scores[candidate])


def _draw_candidates(
    rng_key, model, params, state: State, tuning: Tuning, config: Config, options: Options, budget
) -> _Drawn:
    """Draws round after round of ``rows`` candidates a result; who has met the budget sits out."""
    num_results, rows = len(state.chain_id), rows_per_chain(options)
    num_rounds = options.num_candidates // rows
    extend = ecmh.build_extend(model, config)

    def repeat(tree):
        return jax.tree.map(lambda leaf: jnp.repeat(leaf, rows, axis=0), tree)

    bare, row_tuning = repeat(state), repeat(tuning)

    def draw_round(spent, round_number):
        candidate = round_number * rows + jnp.arange(rows)
        row_id = state.chain_id[:, None] * options.num_candidates + candidate[None]
        drawn = extend(
            rng_key,
            bare._replace(
                chain_id=row_id.reshape(-1), frozen=jnp.repeat(spent >= budget, rows, axis=0)
            ),
            params,
            row_tuning,
        )
        drawn = _Drawn(drawn.trace, drawn.stats.decoded, drawn.finite)
        drawn = jax.tree.map(lambda leaf: leaf.reshape(num_results, rows, *leaf.shape[1:]), drawn)
        return spent + drawn.decoded.sum(axis=1), drawn

    _, drawn = jax.lax.scan(draw_round, jnp.zeros_like(budget), jnp.arange(num_rounds))

    def by_result(leaf):
        leaf = jnp.moveaxis(leaf, 0, 1)
        return leaf.reshape(num_results, options.num_candidates, *leaf.shape[3:])

    return jax.tree.map(by_result, drawn)


def _blank_unused(candidates: Trace, used: jax.Array, bare: Trace) -> Trace:
    """Puts the bare prompts [B] in the place of the candidates [B, N] that are not used."""

    def leaf(candidate, prompt):
        chosen = used.reshape(*used.shape, *(1,) * (candidate.ndim - 2))
        return jnp.where(chosen, candidate, prompt[:, None])

    return jax.tree.map(leaf, candidates, bare)
