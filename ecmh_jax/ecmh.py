"""Entropy-Cut Metropolis-Hastings (arXiv:2605.30327), the exact lockstep form.

A run is a schedule of stages. Stage k extends every chain to the horizon of k blocks with the
proposal law q and then takes Metropolis-Hastings steps on completions that end in end-of-sequence
within the horizon or fill it:

    for stage in 1..num_stages:
        extend the chains that have not ended to stage * stage_length tokens
        for step in 1..steps_per_stage:
            draw a cut t from c(t | x), where next-token entropy jumps up
            redraw the suffix from t with q, to end-of-sequence or the horizon -> x'
            accept with probability min(1, A)

Every chain of the batch takes the same step at the same time. This is the reference that faster
engines are compared with, token for token.
"""

import jax
import jax.numpy as jnp

from ecmh_jax import acceptance, cut, random_keys, suffix, token_law
from ecmh_jax.base import (
    Config,
    Info,
    LanguageModel,
    Params,
    Result,
    State,
    Stats,
    Trace,
    Tuning,
)


def init(
    model: LanguageModel,
    params: Params,
    prompts,
    prompt_lengths,
    prompt_ids,
    chain_ids,
    config: Config,
) -> State:
    """Prefills the prompts and returns chains with empty completions.

    Args:
      model: the language model.
      params: its weights.
      prompts: [B, P] int32, padded on the right.
      prompt_lengths: [B] int32, 1..P.
      prompt_ids: [B] int32 and
      chain_ids: [B] int32: identity of each chain, which determines its draws.
      config: the run.
    """
    batch_size, num_slots = prompts.shape[0], config.num_slots
    cache = model.init_cache(batch_size, num_slots)
    # The logits are dropped: every draw starts by decoding the token before it.
    _, cache = model.prefill(params, prompts, prompt_lengths, cache)
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


def build_extend(model: LanguageModel, config: Config):
    """Returns ``extend(rng_key, state, params, tuning) -> state``: enters the next stage.

    Chains that have ended are frozen first unless ``config.refine_finished``; the others draw from
    q up to the new horizon.
    """

    def extend(rng_key, state: State, params: Params, tuning: Tuning) -> State:
        ended = has_ended(state, config)
        frozen = state.frozen if config.refine_finished else state.frozen | ended
        state = state._replace(
            stage=state.stage + 1, step=jnp.zeros_like(state.step), frozen=frozen
        )
        zeros = jnp.zeros_like(tuning.power)
        drawn = suffix.draw_suffix(
            model,
            config,
            params,
            tuning,
            _step_keys(rng_key, state),
            state.trace,
            jnp.full_like(state.step, -1),
            state.prompt_length,
            _horizon(state, config),
            suffix.Suffix(
                trace=state.trace,
                cache=state.cache,
                done=frozen | ended,
                hopeless=jnp.zeros_like(ended),
                finite=jnp.ones_like(ended),
                decoded=jnp.zeros_like(state.step),
                ratio=acceptance.RunningRatio(zeros, zeros, zeros, zeros, zeros),
                log_ratio=zeros,
            ),
            log_uniform=jnp.full_like(zeros, -jnp.inf),
        )
        return state._replace(
            trace=drawn.trace,
            cache=drawn.cache,
            frozen=frozen | ~drawn.finite,
            finite=state.finite & drawn.finite,
            stats=state.stats._replace(decoded=state.stats.decoded + drawn.decoded),
        )

    return extend


def build_kernel(model: LanguageModel, config: Config):
    """Returns ``kernel(rng_key, state, params, tuning) -> (state, info)``: one step of every chain.

    A reference, simple before fast: it decodes into a copy of the cache and selects by rows.
    The kernel leaves p^power on the completions of the state's stage invariant: it is reversible,
    with A the ratio of ``acceptance``. ``rng_key`` is the run's scalar key, the same at every step:
    the state says which draws are due.
    """

    def kernel(rng_key, state: State, params: Params, tuning: Tuning) -> tuple[State, Info]:
        state = state._replace(step=state.step + 1)
        keys = _step_keys(rng_key, state)
        current = state.trace
        law, log_cut, cut_slot, can_cut = _draw_cut(keys, state, tuning, config)
        active = ~state.frozen & can_cut
        log_uniform = jnp.log1p(-random_keys.accept_uniform(keys))

        divergence, diverges = suffix.first_divergence(keys, current, cut_slot)
        ratio = jax.vmap(acceptance.begin)(
            current.log_weight, current.entropy, law, log_cut, cut_slot, divergence, current.length
        )
        # Without replay the kept tokens are decoded again; the coupled draws end where they did.
        redraws = active & diverges if config.replay else active
        start = divergence if config.replay else cut_slot
        proposal = suffix.draw_suffix(
            model,
            config,
            params,
            tuning,
            keys,
            current,
            divergence,
            state.prompt_length,
            _horizon(state, config),
            suffix.Suffix(
                trace=current._replace(length=jnp.where(redraws, start, current.length)),
                cache=state.cache,
                done=~redraws,
                hopeless=jnp.zeros_like(active),
                finite=jnp.ones_like(active),
                decoded=jnp.zeros_like(state.step),
                ratio=ratio,
                log_ratio=jnp.zeros_like(log_cut),
            ),
            log_uniform,
        )
        accepted = (
            active & proposal.finite & ~proposal.hopeless & (proposal.log_ratio >= log_uniform)
        )
        moved = accepted & diverges
        failed = ~proposal.finite
        replayed = divergence - cut_slot if config.replay else jnp.zeros_like(cut_slot)
        saved = _horizon(state, config) - proposal.trace.length
        ended = suffix.is_eos(suffix.last_token(proposal.trace), config.eos_ids)
        stopped_early = proposal.hopeless & ~ended & config.early_rejection
        stats = state.stats
        new_state = state._replace(
            trace=_keep_live(_select(moved, proposal.trace, current), config),
            cache=_select(moved, proposal.cache, state.cache),
            frozen=state.frozen | failed,
            finite=state.finite & ~failed,
            stats=Stats(
                attempted=stats.attempted + active,
                accepted=stats.accepted + accepted,
                null_moves=stats.null_moves + (active & ~diverges),
                decoded=stats.decoded + proposal.decoded,
                replayed=stats.replayed + jnp.where(active, replayed, 0),
                saved=stats.saved + jnp.where(stopped_early, saved, 0),
            ),
        )
        info = Info(
            attempted=active,
            accepted=accepted,
            cut=jnp.where(active, cut_slot - state.prompt_length + 1, 0),
            divergence=jnp.where(active & diverges, divergence - state.prompt_length + 1, 0),
            current_length=current.length - state.prompt_length,
            proposal_length=proposal.trace.length - state.prompt_length,
            log_ratio=proposal.log_ratio,
            decoded=proposal.decoded,
        )
        return new_state, info

    return kernel


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
) -> Result:
    """Runs the whole schedule as one scan over stages of scans over steps.

    Args:
      rng_key: scalar typed key, the run's seed.
      model: the language model.
      params: its weights.
      prompts: [B, P] int32, padded on the right.
      prompt_lengths: [B] int32, 1..P.
      prompt_ids: [B] int32 and
      chain_ids: [B] int32: identity of each chain.
      tuning: per-chain numbers.
      config: the run.

    Returns:
      The chains after the last step of the last stage.
    """
    extend, kernel = build_extend(model, config), build_kernel(model, config)

    def take_step(state, _):
        return kernel(rng_key, state, params, tuning)

    def enter_stage(state, _):
        state = extend(rng_key, state, params, tuning)
        if config.steps_per_stage == 0:  # a scan of no steps does not run under disable_jit
            _, info = jax.eval_shape(take_step, state, None)
            return state, jax.tree.map(
                lambda field: jnp.zeros((0, *field.shape), field.dtype), info
            )
        return jax.lax.scan(take_step, state, length=config.steps_per_stage)

    state = init(model, params, prompts, prompt_lengths, prompt_ids, chain_ids, config)
    state, info = jax.lax.scan(enter_stage, state, length=config.num_stages)
    return Result(trace=state.trace, stats=state.stats, finite=state.finite, info=info)


def has_ended(state: State, config: Config):
    """Whether each chain's completion ends in end-of-sequence, [B] bool."""
    completion = state.trace.length > state.prompt_length
    return completion & suffix.is_eos(suffix.last_token(state.trace), config.eos_ids)


def _step_keys(rng_key, state: State):
    chain_keys = random_keys.chain_keys(rng_key, state.prompt_id, state.chain_id)
    return random_keys.step_keys(chain_keys, state.stage, state.step)


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


def _select(rows, new, old):
    """Takes the rows [B] bool of ``new`` and the others of ``old``; the chain axis is first."""

    def leaf(new_leaf, old_leaf):
        return jnp.where(rows.reshape(-1, *(1,) * (old_leaf.ndim - 1)), new_leaf, old_leaf)

    return jax.tree.map(leaf, new, old)


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
