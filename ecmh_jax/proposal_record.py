"""What a Metropolis-Hastings step proposed, recorded for a viewer (``config.record_proposals``).

Lockstep returns the record of a step with its ``Info``. The engine keeps a *store* of the steps of
all slots; without ``config.record_proposals`` there is none, and nothing here is traced.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ecmh_jax.base import Config, Info, State, Trace
from ecmh_jax.suffix import Plan, Suffix


class Proposal(NamedTuple):
    """The move of a step; N is ``config.max_new_tokens``, counted from the completion's start.

    All zero for a step that was not attempted. Unless the proposal's logits were not finite, which
    rejects it and freezes the chain, it was accepted if and only if ``log_ratio >= log_uniform``;
    and ``log_ratio = weight_new - weight_old + cut_change``, up to rounding.

    Attributes:
      current_tokens: [..., N] int32, the completion before the step; zero beyond
        ``Info.current_length``.
      current_entropy: [..., N] float32 nats, of the laws that its tokens were drawn from.
      proposal_tokens: [..., N] int32, the proposed completion from its first token on, as far as it
        was drawn; zero beyond ``Info.proposal_length``.
      proposal_entropy: [..., N] float32 nats, likewise.
      log_uniform: [...] float32, log u.
      weight_new: [...] float32, the sum of the proposal's log-weights from the divergence on;
        before it they are those of the current trace and cancel.
      weight_old: [...] float32, the same sum of the current trace.
      cut_change: [...] float32, log c(t|x') - log c(t|x): what the ratio has besides the weights.
        In the published kernels (``published``) their faults are in here too.
      stopped: [...] bool, rejection was certain before the proposal had come to its end.
    """

    current_tokens: jax.Array
    current_entropy: jax.Array
    proposal_tokens: jax.Array
    proposal_entropy: jax.Array
    log_uniform: jax.Array
    weight_new: jax.Array
    weight_old: jax.Array
    cut_change: jax.Array
    stopped: jax.Array


def describe(state: State, plan: Plan, drawn: Suffix, stopped: jax.Array, config: Config):
    """Returns the ``Proposal`` of each chain's step, [B]; it means nothing where none was tried.

    Args:
      state: the chains before the step.
      plan: their moves.
      drawn: the suffixes, all ``done``.
      stopped: [B] bool, those that ended by certain rejection.
      config: the run.
    """
    current, proposal = state.trace, drawn.trace
    # A plan that couples nothing has no divergence: all is new from the cut on.
    start = jnp.maximum(plan.divergence, plan.cut_slot)[:, None]
    slots = jnp.arange(current.tokens.shape[1])[None]
    left_behind = (slots >= start) & (slots < current.length[:, None])
    weight_new = drawn.ratio.log_weight_sum
    weight_old = jnp.sum(jnp.where(left_behind, current.log_weight, 0.0), axis=-1)
    current_tokens, current_entropy = _completion(current, state.prompt_length, config)
    proposal_tokens, proposal_entropy = _completion(proposal, state.prompt_length, config)
    return Proposal(
        current_tokens=current_tokens,
        current_entropy=current_entropy,
        proposal_tokens=proposal_tokens,
        proposal_entropy=proposal_entropy,
        log_uniform=plan.log_uniform,
        weight_new=weight_new,
        weight_old=weight_old,
        cut_change=drawn.log_ratio - (weight_new - weight_old),
        stopped=stopped & (proposal.length < plan.horizon),
    )


def empty_store(num_slots: int, config: Config):
    """Returns a ``Proposal`` of [B, num_stages, steps_per_stage, ...] zeros, or () for no store."""
    if not config.record_proposals:
        return ()
    record = (num_slots, config.num_stages, config.steps_per_stage)
    tokens = (*record, config.max_new_tokens)
    return Proposal(
        current_tokens=jnp.zeros(tokens, jnp.int32),
        current_entropy=jnp.zeros(tokens, jnp.float32),
        proposal_tokens=jnp.zeros(tokens, jnp.int32),
        proposal_entropy=jnp.zeros(tokens, jnp.float32),
        log_uniform=jnp.zeros(record, jnp.float32),
        weight_new=jnp.zeros(record, jnp.float32),
        weight_old=jnp.zeros(record, jnp.float32),
        cut_change=jnp.zeros(record, jnp.float32),
        stopped=jnp.zeros(record, bool),
    )


def write(store, proposal, rows: jax.Array, owner: jax.Array, chains: State):
    """Writes the steps that the rows [B] bool have just taken into the store, at their owners'.

    A clone (``work_ahead``) writes into its chain's row at once. If its chain goes another way, it
    takes those steps itself later and overwrites them, or does not and ``read`` leaves them out.

    Args:
      store: from ``empty_store``.
      proposal: of each row's step; () where there is no store.
      rows: [B] bool.
      owner: [B] int32, the row of each row's chain.
      chains: the chains, still in the steps that they took.
    """
    if not store:
        return store
    nowhere = rows.shape[0]
    index = jnp.where(rows, owner, nowhere), chains.stage - 1, chains.step - 1
    return jax.tree.map(
        lambda record, field: record.at[index].set(field, mode="drop"), store, proposal
    )


def read(store, row: jax.Array, info: Info):
    """Returns the proposals of the chain in slot ``row``: those of the steps that it attempted.

    Args:
      store: from ``empty_store``.
      row: int32.
      info: the chain's records, [num_stages, steps_per_stage].
    """
    return jax.tree.map(lambda record: keep(info.attempted, record[row]), store)


def keep(attempted: jax.Array, field: jax.Array) -> jax.Array:
    """Zeroes a field [..., or ..., N] where a step [...] was not attempted."""
    rows = attempted.reshape(*attempted.shape, *(1,) * (field.ndim - attempted.ndim))
    return jnp.where(rows, field, jnp.zeros_like(field))


def _completion(trace: Trace, prompt_length: jax.Array, config: Config):
    """The completions' tokens and entropies, both [B, N], zero beyond their ends."""
    places = jnp.arange(config.max_new_tokens)[None]
    slots = prompt_length[:, None] + places
    # A suffix still holds the trace that it leaves beyond its own length.
    live = slots < trace.length[:, None]
    return tuple(
        jnp.where(live, jnp.take_along_axis(values, slots, axis=1), jnp.zeros((), values.dtype))
        for values in (trace.tokens, trace.entropy)
    )
