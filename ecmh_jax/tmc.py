"""Twisted Monte Carlo: blocks chosen by their power and by a guess of what can follow them.

After "Scalable Power Sampling" (arXiv:2601.21590, Algorithm 2). Summed over all that can follow,
the power distribution gives a block x after a prefix

    p_pow(x | prefix)  proportional to  p(x | prefix)^power * zeta(x),
    zeta(x) = sum over continuations y of  p(y | x)^power
            = E_{y ~ q(. | x)}[ exp(sum of log_weight over y) ]

and zeta is 1 for a block that ends in end-of-sequence or fills ``max_new_tokens``. A stage is

    draw ``num_candidates`` blocks from q and merge equal ones
    keep the ``num_kept`` blocks of the largest base weight
    for each of them: ``num_rollouts`` continuations from q -> estimated zeta
    draw a block in proportion to base weight * zeta, with the jackknife's correction

Base weights, the two laws that a set of draws can stand for:

* ``"set"``, as published: p^power once for each distinct block. The candidates are taken for the
  set of all blocks, not for a sample, so there is no 1/q; merging is then what keeps a block that q
  draws often from counting as often. Its limit is right only once the draws cover the blocks that
  matter: where nearly all draws are distinct, q has chosen the set and p^power chooses again, so
  that the law is sharper than p^power.
* ``"importance"``: multiplicity * p^power / q, self-normalised importance sampling. Its limit is
  right with any number of blocks if ``num_kept`` is ``num_candidates``.

What is kept is decided by the base weight and not by log p a token, because it is the share of the
mass that the estimate itself assigns: what is left out bounds the distance that leaving it out
makes before zeta, and ``Info.kept_share`` reports it. A short block that ended is not favoured
beyond its due: zeta is 1 for it and at most 1 for the others if power >= 1.

An approximation of p^power in all: the candidates are finitely many, zeta is estimated, and looks
``rollout_stages`` stages ahead only. A block is never revised.
"""

import dataclasses
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp

from ecmh_jax import ecmh, random_keys, suffix, token_law, transition
from ecmh_jax.base import Cache, Config, LanguageModel, Params, Result, State, Tuning
from ecmh_jax.rounds import Batch, Rounds, repeat

BASE_WEIGHTS = ("set", "importance")
_ROLLOUTS = 1  # the step that rollouts are for the random numbers; candidates are step 0


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static about twisted Monte Carlo; the defaults are the paper's.

    Attributes:
      num_candidates: blocks drawn a stage, >= 1.
      num_kept: distinct blocks that get rollouts, 1..num_candidates.
      num_rollouts: continuations of each kept block, >= 1; >= 2 for the jackknife.
      rollout_stages: stages that a rollout looks ahead, >= 1; never past ``max_new_tokens``.
      base_weight: "set" or "importance", see above.
      jackknife: correct the bias of the normalised probabilities.
    """

    num_candidates: int = 64
    num_kept: int = 8
    num_rollouts: int = 8
    rollout_stages: int = 1
    base_weight: Literal["set", "importance"] = "set"
    jackknife: bool = True


class Info(NamedTuple):
    """What each stage did; all [num_stages, B]. What has ended goes on with one empty block.

    Attributes:
      num_distinct: int32, distinct candidates with finite logits.
      kept_share: float32, share of the distinct candidates' base weight that was kept.
      effective_blocks: float32, 1 / sum of squares of the probabilities from which the block was
        drawn, 1..num_kept.
      chosen: int32, the candidate whose block was taken.
      log_zeta: float32 nats, its estimated log zeta.
    """

    num_distinct: jax.Array
    kept_share: jax.Array
    effective_blocks: jax.Array
    chosen: jax.Array
    log_zeta: jax.Array


def check_options(options: Options) -> None:
    """Raises ValueError unless the options make sense together."""
    for name in ("num_candidates", "num_kept", "num_rollouts", "rollout_stages"):
        value = getattr(options, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least 1")
    if options.num_kept > options.num_candidates:
        raise ValueError(
            f"num_kept is {options.num_kept}; expected at most num_candidates, "
            f"which is {options.num_candidates}"
        )
    if options.jackknife and options.num_rollouts < 2:
        raise ValueError(
            f"num_rollouts is {options.num_rollouts}; expected at least 2 with the jackknife, "
            "which leaves one out"
        )
    if options.base_weight not in BASE_WEIGHTS:
        raise ValueError(
            f"base_weight is {options.base_weight!r}; expected one of {', '.join(BASE_WEIGHTS)}"
        )


def rows_per_chain(options: Options) -> int:
    """Rows of the decoding batch that one result takes."""
    return max(options.num_candidates, options.num_kept * options.num_rollouts)


def build(model: LanguageModel, config: Config, options: Options) -> Rounds:
    """Returns the sampler: results grow by a block a round, which is a stage of the schedule.

    Args:
      model: the language model.
      config: the run; ``steps_per_stage`` is not used.
      options: candidates and rollouts.

    Returns:
      Its functions; ``stats.decoded`` counts candidates and rollouts, and ``info`` is an ``Info``.
    """

    def begin(rng_key, params: Params, batch: Batch) -> State:
        del rng_key
        return ecmh.init_batch(model, params, batch, config)

    def advance(rng_key, params: Params, batch: Batch, state: State, index):
        del index  # the state counts its stages
        return _take_block(rng_key, model, params, state, batch.tuning, config, options)

    def finish(rng_key, batch: Batch, state: State, info: Info) -> Result:
        del rng_key, batch
        return Result(trace=state.trace, stats=state.stats, finite=state.finite, info=info)

    return Rounds(config.num_stages, begin, advance, finish, lambda state: state.stats.decoded)


def _take_block(
    rng_key, model, params, state: State, tuning: Tuning, config: Config, options: Options
) -> tuple[State, Info]:
    """One stage of every result: candidates, rollouts, choice."""
    state = state._replace(stage=state.stage + 1)
    rows = options.num_candidates
    drawn = _identify(repeat(state, rows), state.chain_id, options)
    drawn = _extend(rng_key, model, params, drawn, drawn.stage, repeat(tuning, rows), config)
    cache, drawn = drawn.cache, drawn._replace(cache=None)
    candidates = jax.tree.map(lambda leaf: leaf.reshape(-1, rows, *leaf.shape[1:]), drawn)
    log_base = _log_base_weights(candidates, state.trace.length, tuning, config, options)

    log_kept, kept = jax.lax.top_k(log_base, options.num_kept)
    kept_rows = (jnp.arange(len(kept))[:, None] * rows + kept).reshape(-1)
    kept_state = _take(drawn._replace(cache=cache), kept_rows)
    # What is kept only because there are no more distinct blocks needs no rollouts.
    kept_state = kept_state._replace(
        frozen=kept_state.frozen | (log_kept.reshape(-1) == -jnp.inf),
    )
    log_rollout, cache, rollout_cost = _roll_out(
        rng_key, model, params, kept_state, state.chain_id, tuning, config, options
    )
    probabilities = block_probabilities(log_kept, log_rollout, options.jackknife)
    uniform = random_keys.group_uniform(transition.step_keys(rng_key, state), 0)
    place = token_law.invert_distribution(probabilities, uniform)

    results = jnp.arange(len(place))
    chosen = kept[results, place]
    finite = candidates.finite[results, chosen]
    cost = candidates.stats.decoded.sum(axis=1) + rollout_cost
    state = state._replace(
        trace=jax.tree.map(lambda leaf: leaf[results, chosen], candidates.trace),
        # A rollout writes beyond its block only, where nothing is read before it is written again.
        cache=_take(cache, (results * options.num_kept + place) * options.num_rollouts),
        finite=finite,
        frozen=state.frozen | ~finite,
        stats=state.stats._replace(decoded=state.stats.decoded + cost),
    )
    base = _shifted_exp(log_base)
    kept_mass = base[results[:, None], kept].sum(axis=1)
    return state, Info(
        num_distinct=(log_base > -jnp.inf).sum(axis=1, dtype=jnp.int32),
        kept_share=kept_mass / jnp.maximum(base.sum(axis=1), 1.0),
        effective_blocks=1.0 / jnp.square(probabilities).sum(axis=1),
        chosen=chosen,
        log_zeta=log_mean(log_rollout)[results, place],
    )


def rollout_stage(stage: jax.Array, options: Options, config: Config) -> jax.Array:
    """The stage to whose horizon the rollouts of ``stage`` [B] go, never past the last."""
    return jnp.minimum(stage + options.rollout_stages, config.num_stages)


def merge(blocks: jax.Array, lengths: jax.Array, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds equal candidates.

    Args:
      blocks: [B, M, L] int32, padded alike.
      lengths: [B, M] int32.
      finite: [B, M] bool, candidates that count at all.

    Returns:
      Whether each is the first of its equals and counts [B, M] bool; how many equals it has, itself
      included [B, M] int32.
    """
    equal = (blocks[:, :, None] == blocks[:, None]).all(axis=-1)
    equal &= (lengths[:, :, None] == lengths[:, None]) & finite[:, None] & finite[:, :, None]
    first = equal.argmax(axis=2) == jnp.arange(blocks.shape[1])[None]
    return first & finite, equal.sum(axis=2, dtype=jnp.int32)


def block_probabilities(log_base: jax.Array, log_rollout: jax.Array, jackknife: bool) -> jax.Array:
    """Probabilities with which the kept blocks are drawn.

    With S rollouts, zeta_i = mean over s of exp(log_rollout[i, s]) and P_i the normalised
    base_i * zeta_i, the jackknife takes off the bias of order 1/S that normalising causes
    (arXiv:2601.21590, Algorithm 2):

        S * P_i - (S - 1) / S * sum over s of P_i without rollout s,   clipped at 0, renormalised

    Args:
      log_base: [B, K] float32 nats, -inf for no block.
      log_rollout: [B, K, S] float32 nats, summed log-weights; -inf for a rollout that failed, which
        is left out of its mean.
      jackknife: whether to correct.

    Returns:
      [B, K] float32; the base weights alone where no rollout is left, uniform where no base weight
      is either.
    """
    chex.assert_rank((log_base, log_rollout), (2, 3))
    num_rollouts = log_rollout.shape[-1]
    log_weight = log_base[:, :, None] + log_rollout
    weight = _shifted_exp(log_weight.reshape(len(log_weight), -1)).reshape(log_weight.shape)
    present = log_rollout > -jnp.inf

    def normalised(counted, otherwise):
        mean = jnp.where(counted, weight, 0.0).sum(axis=-1)
        mean = mean / jnp.maximum(counted.sum(axis=-1), 1)
        total = mean.sum(axis=-1, keepdims=True)
        return jnp.where(total > 0, mean / jnp.where(total > 0, total, 1.0), otherwise)

    base = _shifted_exp(log_base)
    known = base.sum(axis=-1, keepdims=True)
    uniform = jnp.full_like(base, 1.0 / base.shape[-1])
    base = jnp.where(known > 0, base / jnp.maximum(known, 1.0), uniform)
    probabilities = normalised(present, base)
    if not jackknife:
        return probabilities

    def without(rollout):
        others = jnp.arange(num_rollouts) != rollout
        return normalised(present & others[None, None], probabilities)

    left_out = jax.vmap(without)(jnp.arange(num_rollouts)).sum(axis=0)
    return correct_bias(probabilities, left_out, num_rollouts)


def correct_bias(probabilities: jax.Array, left_out: jax.Array, num_rollouts: int) -> jax.Array:
    """The jackknife of ``block_probabilities``; ``left_out`` [B, K] is the sum over rollouts."""
    corrected = num_rollouts * probabilities - (num_rollouts - 1) / num_rollouts * left_out
    corrected = jnp.maximum(corrected, 0.0)
    return corrected / corrected.sum(axis=-1, keepdims=True)


def log_mean(log_rollout: jax.Array) -> jax.Array:
    """Log of the mean weight [B, K] of the rollouts [B, K, S] that did not fail."""
    count = (log_rollout > -jnp.inf).sum(axis=-1)
    return jax.nn.logsumexp(log_rollout, axis=-1) - jnp.log(jnp.maximum(count, 1))


def _log_base_weights(
    candidates: State, start: jax.Array, tuning: Tuning, config: Config, options: Options
) -> jax.Array:
    """Log base weights [B, M] of candidates [B, M] whose blocks begin at slots ``start`` [B].

    They are -inf for all but the first of equal candidates, and for failed ones.
    """
    trace = candidates.trace

    def block_of(tokens, slot):
        return jax.lax.dynamic_slice_in_dim(tokens, slot, config.stage_length, axis=1)

    first, multiplicity = merge(
        jax.vmap(block_of)(trace.tokens, start), trace.length, candidates.finite
    )
    if options.base_weight == "set":
        log_base = tuning.power[:, None] * _sum_from(trace.log_prob, start[:, None])
    else:
        log_base = jnp.log(jnp.maximum(multiplicity, 1)) + _sum_from(
            trace.log_weight, start[:, None]
        )
    return jnp.where(first, log_base, -jnp.inf)


def _roll_out(
    rng_key,
    model,
    params,
    kept: State,
    chain_ids: jax.Array,
    tuning: Tuning,
    config: Config,
    options: Options,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Continues every kept block, [B * K] with the identities of its results [B], several times.

    Returns:
      Summed log-weights [B, K, S] float32, -inf where the logits failed; the cache of the rollouts;
      decoded tokens [B] int32.
    """
    num_rows = options.num_kept * options.num_rollouts
    rows = _identify(repeat(kept, options.num_rollouts), chain_ids, options)
    start, keys_stage = rows.trace.length, rows.stage
    stage = rollout_stage(rows.stage, options, config)
    at_horizon = start >= rows.prompt_length + stage * config.stage_length
    rows = rows._replace(
        stage=stage, step=jnp.full_like(stage, _ROLLOUTS), frozen=rows.frozen | at_horizon
    )
    rows = _extend(rng_key, model, params, rows, keys_stage, repeat(tuning, num_rows), config)
    log_rollout = jnp.where(rows.finite, _sum_from(rows.trace.log_weight, start), -jnp.inf)
    grouped = log_rollout.reshape(-1, options.num_kept, options.num_rollouts)
    return grouped, rows.cache, rows.stats.decoded.reshape(-1, num_rows).sum(axis=1)


def _extend(
    rng_key, model, params, rows: State, keys_stage, row_tuning: Tuning, config: Config
) -> State:
    """Draws every row up to the horizon of its stage, with the random numbers of ``keys_stage``.

    Two stages may look ahead to the same horizon, and must not see the same future.
    """
    keys = transition.step_keys(rng_key, rows._replace(stage=keys_stage))
    plan, planned = transition.begin_extension(keys, rows, config)
    drawn, cache = suffix.draw_suffix(
        model,
        config,
        params,
        row_tuning,
        rows.trace,
        rows.prompt_length,
        plan,
        planned,
        rows.cache,
    )
    rows, _, _ = transition.settle(rows, plan, drawn, config)
    return rows._replace(cache=cache)


def _identify(rows: State, chain_ids: jax.Array, options: Options) -> State:
    """Gives rows [B * R] their own identities and fresh counters."""
    particle = jnp.arange(len(rows.chain_id) // len(chain_ids))
    row_id = chain_ids[:, None] * rows_per_chain(options) + particle[None]
    return rows._replace(
        chain_id=row_id.reshape(-1), stats=jax.tree.map(jnp.zeros_like, rows.stats)
    )


def _take(tree, rows: jax.Array):
    """Copies the given rows of every leaf."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), tree)


def _sum_from(values: jax.Array, start: jax.Array) -> jax.Array:
    """Sums ``values`` [..., T] over the slots from ``start`` [...] on."""
    slots = jnp.arange(values.shape[-1]).reshape(*(1,) * start.ndim, -1)
    return jnp.where(slots >= start[..., None], values, 0.0).sum(axis=-1)


def _shifted_exp(log_values: jax.Array) -> jax.Array:
    """Exponentials [B, N] relative to each row's largest; all 0 where every one is -inf."""
    largest = log_values.max(axis=-1, keepdims=True)
    return jnp.exp(log_values - jnp.where(largest > -jnp.inf, largest, 0.0))
