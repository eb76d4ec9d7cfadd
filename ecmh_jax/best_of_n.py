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
from ecmh_jax.base import Config, LanguageModel, Params, Result, State, Stats, Trace
from ecmh_jax.rounds import Batch, Rounds, repeat

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


class _Carry(NamedTuple):
    """Results [B] before any token, with their prompts' cache, and what each has spent [B]."""

    bare: State
    spent: jax.Array


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


def build(model: LanguageModel, config: Config, options: Options) -> Rounds:
    """Returns the sampler: a round draws ``rows`` candidates of every result.

    Candidate j of chain c is the low-temperature draw of chain ``c * N + j``, token for token. Who
    has met the budget sits out; a budget below 1 counts as 1, which buys one candidate.

    Args:
      model: the language model.
      config: the run; its schedule of stages is not used.
      options: the candidates. Their law q has the proposal temperature of each result's tuning.

    Returns:
      Its functions. ``stats.decoded`` counts the tokens of the candidates that were used, and
      ``finite`` is False where none of those had finite logits. ``info`` is an ``Info``.
    """
    config = dataclasses.replace(config, num_stages=1, steps_per_stage=0)
    rows = rows_per_chain(options)
    extend = ecmh.build_extend(model, config)

    def begin(rng_key, params: Params, batch: Batch) -> _Carry:
        del rng_key
        state = ecmh.init_batch(model, params, batch, config)
        return _Carry(state, jnp.zeros_like(state.chain_id))

    def advance(rng_key, params: Params, batch: Batch, carry: _Carry, index):
        bare, spent = carry
        candidate = index * rows + jnp.arange(rows)
        row_id = bare.chain_id[:, None] * options.num_candidates + candidate[None]
        drawn = extend(
            rng_key,
            repeat(bare, rows)._replace(
                chain_id=row_id.reshape(-1),
                frozen=jnp.repeat(spent >= _budget_of(batch), rows, axis=0),
            ),
            params,
            repeat(batch.tuning, rows),
        )
        drawn = _Drawn(drawn.trace, drawn.stats.decoded, drawn.finite)
        drawn = jax.tree.map(lambda leaf: leaf.reshape(len(spent), rows, *leaf.shape[1:]), drawn)
        return _Carry(bare, spent + drawn.decoded.sum(axis=1)), drawn

    def finish(rng_key, batch: Batch, carry: _Carry, records: _Drawn) -> Result:
        del rng_key

        def by_result(leaf):  # [rounds, B, rows, ...] to [B, N, ...]
            leaf = jnp.moveaxis(leaf, 0, 1)
            return leaf.reshape(leaf.shape[0], options.num_candidates, *leaf.shape[3:])

        drawn = jax.tree.map(by_result, records)
        return _choose_among(drawn, carry.bare.trace, batch, options)

    return Rounds(options.num_candidates // rows, begin, advance, finish, lambda carry: carry.spent)


def _budget_of(batch: Batch) -> jax.Array:
    if batch.budget is None:
        return jnp.full_like(batch.chain_ids, _NO_LIMIT)
    chex.assert_shape(batch.budget, batch.chain_ids.shape)
    return jnp.maximum(batch.budget, 1)


def _choose_among(drawn: _Drawn, bare: Trace, batch: Batch, options: Options) -> Result:
    """The best of the candidates [B, N] that the budgets allow; ``bare`` [B] are the prompts."""
    used = used_candidates(drawn.decoded, _budget_of(batch))
    score = score_candidates(drawn.trace, batch.prompt_lengths, options.score)
    score, chosen = choose(score, used, drawn.finite)
    decoded = count_decoded(drawn.decoded, used)
    candidates = _blank_unused(drawn.trace, used, bare)
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


def _blank_unused(candidates: Trace, used: jax.Array, bare: Trace) -> Trace:
    """Puts the bare prompts [B] in the place of the candidates [B, N] that are not used."""

    def leaf(candidate, prompt):
        chosen = used.reshape(*used.shape, *(1,) * (candidate.ndim - 2))
        return jnp.where(chosen, candidate, prompt[:, None])

    return jax.tree.map(leaf, candidates, bare)
