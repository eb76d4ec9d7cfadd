"""One move of a batch of chains: how it begins, and how it ends once its suffix is drawn.

A move is an extension to a new horizon or a Metropolis-Hastings step. What lies between ``begin_*``
and ``settle`` is decoding (``suffix``), and who decodes when is the business of the caller: in
lockstep (``ecmh``) or as free-running slots (``engine``). No function here touches a cache.
"""

import jax
import jax.numpy as jnp

from ecmh_jax import acceptance, cut, proposal_record, random_keys, suffix, token_law
from ecmh_jax.base import Cache, Config, Info, State, Stats, Trace, Tuning
from ecmh_jax.suffix import Plan, Suffix


def empty_state(
    cache: Cache,
    prompts: jax.Array,
    prompt_lengths: jax.Array,
    prompt_ids: jax.Array,
    chain_ids: jax.Array,
    config: Config,
) -> State:
    """Chains with empty completions, before their first stage.

    Args:
      cache: holds at least slots ``0..prompt_length-2`` of each prompt.
      prompts: [B, P] int32, padded on the right.
      prompt_lengths: [B] int32, 1..P.
      prompt_ids: [B] int32 and
      chain_ids: [B] int32: who each chain is.
      config: the run.
    """
    batch_size, num_slots = prompts.shape[0], config.num_slots
    tokens = jnp.pad(prompts, ((0, 0), (0, config.max_new_tokens)), constant_values=config.pad_id)
    live = jnp.arange(num_slots)[None] < prompt_lengths[:, None]
    statistic = jnp.zeros((batch_size, num_slots), jnp.float32)
    count = jnp.zeros((batch_size,), jnp.int32)
    return State(
        trace=Trace(
            tokens=jnp.where(live, tokens, config.pad_id),
            length=prompt_lengths,
            log_prob=statistic,
            log_q=statistic,
            log_weight=statistic,
            entropy=statistic,
        ),
        cache=cache,
        prompt_length=prompt_lengths,
        prompt_id=prompt_ids,
        chain_id=chain_ids,
        stage=count,
        step=count,
        frozen=jnp.zeros((batch_size,), bool),
        finite=jnp.ones((batch_size,), bool),
        stats=Stats(count, count, count, count, count, count),
    )


def has_ended(state: State, config: Config) -> jax.Array:
    """Whether each chain's completion ends in end-of-sequence, [B] bool."""
    completion = state.trace.length > state.prompt_length
    return completion & suffix.is_eos(suffix.last_token(state.trace), config.eos_ids)


def enter_stage(state: State, config: Config) -> State:
    """Moves every chain to its next stage; chains that have ended freeze, if the run says so."""
    frozen = state.frozen
    if not config.refine_finished:
        frozen = frozen | has_ended(state, config)
    return state._replace(stage=state.stage + 1, step=jnp.zeros_like(state.step), frozen=frozen)


def step_keys(rng_key: jax.Array, state: State) -> jax.Array:
    """Keys [B] of the chains' moves: of a run's scalar key, who the chains are, stage and step."""
    chain_keys = random_keys.chain_keys(rng_key, state.prompt_id, state.chain_id)
    return random_keys.step_keys(chain_keys, state.stage, state.step)


def begin_extension(keys: jax.Array, state: State, config: Config) -> tuple[Plan, Suffix]:
    """Plans the rest of each trace up to its horizon; a chain that has ended does nothing."""
    extends = ~state.frozen & ~has_ended(state, config)
    nothing = jnp.full_like(state.step, -1)
    zeros = jnp.zeros(state.step.shape, jnp.float32)
    plan = Plan(
        keys=keys,
        attempted=jnp.zeros_like(extends),
        moves=extends,
        cut_slot=nothing,
        divergence=nothing,
        horizon=_horizon(state, config),
        log_uniform=jnp.full_like(zeros, -jnp.inf),
    )
    ratio = acceptance.RunningRatio(zeros, zeros, zeros, zeros, zeros)
    return plan, suffix.begin(state.trace, state.trace.length, extends, ratio)


def begin_step(
    keys: jax.Array, state: State, tuning: Tuning, config: Config
) -> tuple[Plan, Suffix]:
    """Plans a Metropolis-Hastings step: u, the cut, and where the proposal leaves the trace.

    A chain that is frozen or has no cut does nothing. A null move, whose proposal is the current
    trace, has nothing to decode when ``config.replay`` is on.
    """
    current = state.trace
    law, log_cut, cut_slot, can_cut = _draw_cut(keys, state, tuning, config)
    attempted = ~state.frozen & can_cut
    divergence, diverges = suffix.first_divergence(keys, current, cut_slot)
    ratio = jax.vmap(acceptance.begin)(
        current.log_weight, current.entropy, law, log_cut, cut_slot, divergence, current.length
    )
    plan = Plan(
        keys=keys,
        attempted=attempted,
        moves=attempted & diverges,
        cut_slot=cut_slot,
        divergence=divergence,
        horizon=_horizon(state, config),
        log_uniform=jnp.log1p(-random_keys.accept_uniform(keys)),
    )
    if config.replay:
        return plan, suffix.begin(current, divergence, plan.moves, ratio)
    # The kept tokens are decoded again; the coupled draws end where they did.
    return plan, suffix.begin(current, cut_slot, attempted, ratio)


def settle(
    state: State, plan: Plan, drawn: Suffix, config: Config
) -> tuple[State, jax.Array, Info]:
    """Ends the move that was planned for each chain, now that its suffix is drawn.

    Args:
      state: the chains as they were when the move began; its cache is passed on.
      plan: the moves.
      drawn: their suffixes, all ``done``.
      config: the run.

    Returns:
      The chains after the move; whether each took the drawn trace over [B] bool, in which case the
      cache that was decoded into is now its own; the step's record.
    """
    attempted = plan.attempted
    accepted = attempted & drawn.finite & ~drawn.hopeless & (drawn.log_ratio >= plan.log_uniform)
    moved = plan.moves & (accepted | ~attempted)
    failed = ~drawn.finite
    replayed = jnp.where(attempted & config.replay, plan.divergence - plan.cut_slot, 0)
    ended = suffix.is_eos(suffix.last_token(drawn.trace), config.eos_ids)
    stopped_early = drawn.hopeless & ~ended & config.early_rejection
    saved = jnp.where(stopped_early, plan.horizon - drawn.trace.length, 0)
    stats = state.stats
    new_state = state._replace(
        trace=_keep_live(select(moved, drawn.trace, state.trace), config),
        frozen=state.frozen | failed,
        finite=state.finite & ~failed,
        stats=Stats(
            attempted=stats.attempted + attempted,
            accepted=stats.accepted + accepted,
            null_moves=stats.null_moves + (attempted & ~plan.moves),
            decoded=stats.decoded + drawn.decoded,
            replayed=stats.replayed + replayed,
            saved=stats.saved + saved,
        ),
    )
    log_prob, mean_entropy = measure_completions(new_state.trace, state.prompt_length)
    info = Info(
        attempted=attempted,
        accepted=accepted,
        cut=plan.cut_slot - state.prompt_length + 1,
        divergence=jnp.where(plan.moves, plan.divergence - state.prompt_length + 1, 0),
        current_length=state.trace.length - state.prompt_length,
        proposal_length=drawn.trace.length - state.prompt_length,
        log_ratio=drawn.log_ratio,
        decoded=drawn.decoded,
        log_prob=log_prob,
        mean_entropy=mean_entropy,
    )
    if config.record_proposals:
        proposal = proposal_record.describe(state, plan, drawn, stopped_early, config)
        info = info._replace(proposal=proposal)
    info = jax.tree.map(lambda field: proposal_record.keep(attempted, field), info)
    return new_state, moved, info._replace(log_prob=log_prob, mean_entropy=mean_entropy)


def measure_completions(trace: Trace, prompt_length: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns log p of each completion and the mean of its entropies, both [B] float32 nats.

    Args:
      trace: B traces.
      prompt_length: [B] int32.
    """
    num_tokens = jnp.maximum(trace.length - prompt_length, 1).astype(jnp.float32)
    return _sum_slots(trace.log_prob), _sum_slots(trace.entropy) / num_tokens


def fill_records(records: Info, state: State) -> Info:
    """Completes the records of chains that are not advanced any more.

    A chain that froze never came to the step that it is in, nor to those after it. Its completion
    stays what it is through all of them.

    Args:
      records: [B, num_stages, steps_per_stage], without proposals.
      state: the chains.
    """
    _, num_stages, num_steps = records.attempted.shape
    stages = jnp.arange(1, num_stages + 1)[None, :, None]
    steps = jnp.arange(1, num_steps + 1)[None, None]
    stage, step = state.stage[:, None, None], state.step[:, None, None]
    missing = (stages > stage) | ((stages == stage) & (steps >= step))
    log_prob, mean_entropy = measure_completions(state.trace, state.prompt_length)
    return records._replace(
        log_prob=jnp.where(missing, log_prob[:, None, None], records.log_prob),
        mean_entropy=jnp.where(missing, mean_entropy[:, None, None], records.mean_entropy),
    )


def select(rows, new, old):
    """Takes the rows [B] bool of ``new`` and the others of ``old``; the chain axis is first."""

    def leaf(new_leaf, old_leaf):
        return jnp.where(rows.reshape(-1, *(1,) * (old_leaf.ndim - 1)), new_leaf, old_leaf)

    return jax.tree.map(leaf, new, old)


def _horizon(state: State, config: Config):
    """Slots that a trace of the state's stage may fill at most, [B] int32."""
    return state.prompt_length + state.stage * config.stage_length


def _draw_cut(keys, state: State, tuning: Tuning, config: Config):
    """Draws a cut a chain: its law, log c(t|x) [B], the slot [B] and whether there is one [B]."""

    def one_chain(entropy, prompt_length, length, cut_power, uniform_mix):
        law = cut.cut_law(entropy, prompt_length, length, cut_power, config.cut_first_token)
        return law, cut.log_cut_probabilities(
            law, prompt_length, length, uniform_mix, config.cut_first_token
        )

    law, log_probabilities = jax.vmap(one_chain)(
        state.trace.entropy,
        state.prompt_length,
        state.trace.length,
        tuning.cut_power,
        tuning.uniform_mix,
    )
    slot = token_law.invert_distribution(jnp.exp(log_probabilities), random_keys.cut_uniform(keys))
    log_cut = jnp.take_along_axis(log_probabilities, slot[:, None], axis=1)[:, 0]
    return law, log_cut, slot, law.num_cuts > 0


def _sum_slots(values: jax.Array) -> jax.Array:
    """Sums [B, T] over slots in an order of its own: the same bits in every program and batch."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        rest = values[:, 2 * half :]
        values = jnp.concatenate([values[:, :half] + values[:, half : 2 * half], rest], axis=1)
    return values[:, 0]


def _keep_live(trace: Trace, config: Config) -> Trace:
    """Clears the slots beyond each trace's length, where a longer trace may have left its own."""
    live = jnp.arange(trace.tokens.shape[1])[None] < trace.length[:, None]

    def clear(statistic):
        return jnp.where(live, statistic, 0.0)

    return trace._replace(
        tokens=jnp.where(live, trace.tokens, config.pad_id),
        log_prob=clear(trace.log_prob),
        log_q=clear(trace.log_q),
        log_weight=clear(trace.log_weight),
        entropy=clear(trace.entropy),
    )
