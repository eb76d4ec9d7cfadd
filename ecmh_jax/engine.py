"""Free-running chains: every slot decodes at its own position, step and stage.

The engine takes the moves of ``transition`` and the decode step of ``suffix`` and puts no barrier
between chains. A *tick* is a scan over decode steps of all slots; after each of them the slots
whose suffix is done are *settled*: accepted or rejected, and sent into their next move at once,
null moves included, so that the next decode step draws a token for them again.

A rejected proposal needs the keys and values of the trace that it overwrote. There are two banks:
proposals are decoded into one and the other holds the current traces. Settling copies the row of a
settled slot, and no other, from one bank into the other.

The traces are those of the lockstep form (``ecmh``), token for token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ecmh_jax import proposal_record, suffix, transition, work_ahead
from ecmh_jax.base import Cache, Config, Info, LanguageModel, Params, State, Stats, Trace, Tuning
from ecmh_jax.suffix import Plan, Suffix


class Slots(NamedTuple):
    """A fixed number of slots, each with a chain or free; B counts slots here.

    Attributes:
      chains: the slots' chains as they were when their moves began; ``chains.cache`` is the bank of
        current traces.
      tuning: their numbers.
      plan: their moves.
      suffix: the moves' suffixes.
      cache: the bank that suffixes are decoded into.
      busy: [B] bool, whether the slot's chain or clone has work left.
      records: [B, num_stages, steps_per_stage] the steps taken so far, without their proposals.
      proposals: the store of their proposals (``proposal_record``); () where the run keeps none.
      root: [B] int32, for a clone (``work_ahead``) the row of its chain, else the row itself.
      ahead: [B] int32, the row of the clone that assumes this row's rejection, -1 for none.
    """

    chains: State
    tuning: Tuning
    plan: Plan
    suffix: Suffix
    cache: Cache
    busy: jax.Array
    records: Info
    proposals: Any
    root: jax.Array
    ahead: jax.Array


class Arrivals(NamedTuple):
    """Chains of one prompt that enter slots.

    Attributes:
      rows: [B] bool, the slots they enter.
      cache: the prompt's cache, from ``ecmh.prefill``.
      prompt: [P] int32, padded on the right.
      prompt_length: int32.
      prompt_id: [B] int32, by slot, and
      chain_id: [B] int32: who each chain is.
      tuning: their numbers, by slot.
    """

    rows: jax.Array
    cache: Cache
    prompt: jax.Array
    prompt_length: jax.Array
    prompt_id: jax.Array
    chain_id: jax.Array
    tuning: Tuning


class Status(NamedTuple):
    """What the host reads after a tick.

    Attributes:
      busy: [B] bool, whether the slot's chain has work left.
      stage: [B] int32.
      stats: counters of the chains in the slots, each [B].
      drawn: int32, tokens drawn in this tick by all slots.
      discarded: int32, tokens thrown away in this tick, because they were drawn ahead in vain. Over
        a run, drawn - discarded is what the chains' counters call decoded.
    """

    busy: jax.Array
    stage: jax.Array
    stats: Stats
    drawn: jax.Array
    discarded: jax.Array


class Finished(NamedTuple):
    """A chain at the end of its schedule; the fields of ``Result`` without the chain axis."""

    trace: Trace
    stats: Stats
    finite: jax.Array
    info: Info


def init_slots(model: LanguageModel, num_slots: int, config: Config) -> Slots:
    """Returns free slots.

    Args:
      model: the language model.
      num_slots: B.
      config: the run.
    """
    count = jnp.zeros((num_slots,), jnp.int32)
    ones = jnp.ones((num_slots,), jnp.float32)
    tuning = Tuning(ones, ones, ones, ones)
    # A free slot decodes token 0 in slot 0, over and over.
    chains = transition.empty_state(
        model.init_cache(num_slots, config.num_slots),
        jnp.zeros((num_slots, config.prompt_length), jnp.int32),
        jnp.ones_like(count),
        count,
        count,
        config,
    )._replace(frozen=jnp.ones((num_slots,), bool))
    # The kind that ``checks.check_key`` asks of a run, whatever JAX's default is.
    keys = transition.step_keys(jax.random.key(0, impl="threefry2x32"), chains)
    plan, planned = transition.begin_extension(keys, chains, config)
    record = (num_slots, config.num_stages, config.steps_per_stage)
    whole, real, flag = (jnp.zeros(record, dtype) for dtype in (jnp.int32, jnp.float32, bool))
    return Slots(
        chains=chains,
        tuning=tuning,
        plan=plan,
        suffix=planned,
        cache=model.init_cache(num_slots, config.num_slots),
        busy=jnp.zeros((num_slots,), bool),
        records=Info(flag, flag, whole, whole, whole, whole, real, whole, real, real),
        proposals=proposal_record.empty_store(num_slots, config),
        root=jnp.arange(num_slots),
        ahead=jnp.full((num_slots,), -1),
    )


def build_admit(config: Config):
    """Returns ``admit(slots, arrivals) -> slots``: puts chains into slots, before their stage 1."""

    def admit(slots: Slots, arrivals: Arrivals) -> Slots:
        rows = arrivals.rows
        num_slots = rows.shape[0]
        fresh = transition.empty_state(
            (),
            jnp.broadcast_to(arrivals.prompt, (num_slots, config.prompt_length)),
            jnp.full((num_slots,), arrivals.prompt_length),
            arrivals.prompt_id,
            arrivals.chain_id,
            config,
        )
        # As if the last step of stage 0 were done: the next settling enters stage 1.
        fresh = fresh._replace(step=jnp.full_like(fresh.step, config.steps_per_stage))
        chains = transition.select(rows, fresh, slots.chains._replace(cache=()))
        idle = suffix.begin(
            chains.trace, chains.trace.length, jnp.zeros_like(rows), slots.suffix.ratio
        )
        nothing = slots.plan._replace(attempted=jnp.zeros_like(rows), moves=jnp.zeros_like(rows))

        return slots._replace(
            chains=chains._replace(cache=_fill_rows(rows, arrivals.cache, slots.chains.cache)),
            tuning=transition.select(rows, arrivals.tuning, slots.tuning),
            plan=transition.select(rows, nothing, slots.plan),
            suffix=transition.select(rows, idle, slots.suffix),
            cache=_fill_rows(rows, arrivals.cache, slots.cache),
            busy=slots.busy | rows,
            records=transition.select(
                rows, jax.tree.map(jnp.zeros_like, slots.records), slots.records
            ),
        )

    return admit


def build_tick(model: LanguageModel, config: Config, num_steps: int):
    """Returns ``tick(rng_key, slots, params, helpers) -> (slots, status)``.

    Args:
      model: the language model.
      config: the run.
      num_steps: decode steps of a tick, >= 1. Changes no token of any chain.
    """

    def take_step(rng_key, params, helpers, slots: Slots):
        drawn = jnp.sum(~slots.suffix.done, dtype=jnp.int32)
        drawn_suffix, cache = suffix.draw_one(
            model,
            config,
            params,
            slots.tuning,
            slots.chains.trace,
            slots.chains.prompt_length,
            slots.plan,
            slots.suffix,
            slots.cache,
        )
        slots = slots._replace(suffix=drawn_suffix, cache=cache)
        slots, discarded = settle(rng_key, slots, helpers, config)
        return slots, (drawn, discarded)

    def tick(rng_key, slots: Slots, params: Params, helpers) -> tuple[Slots, Status]:
        slots, (drawn, discarded) = jax.lax.scan(
            lambda slots, _: take_step(rng_key, params, helpers, slots),
            slots,
            length=num_steps,
        )
        chains = slots.chains
        return slots, Status(slots.busy, chains.stage, chains.stats, drawn.sum(), discarded.sum())

    return tick


def collect(slots: Slots, row: jax.Array) -> Finished:
    """Reads the chain of slot ``row``, an int32; it stays there until the slot is used again."""
    chains = slots.chains
    records = transition.fill_records(slots.records, chains)
    finished = jax.tree.map(
        lambda leaf: leaf[row], Finished(chains.trace, chains.stats, chains.finite, records)
    )
    proposal = proposal_record.read(slots.proposals, row, finished.info)
    return finished._replace(info=finished.info._replace(proposal=proposal))


class _Copies(NamedTuple):
    """Which rows of the banks change hands in a settling. All [B].

    Attributes:
      adopted: int32, the row of the proposal bank that this row takes over, -1 for none.
      moved: bool, the row's suffix became its current trace.
      restored: bool, the row starts again from the current trace of its chain.
    """

    adopted: jax.Array
    moved: jax.Array
    restored: jax.Array


def settle(rng_key, slots: Slots, helpers, config: Config) -> tuple[Slots, jax.Array]:
    """Ends the moves of all slots whose suffix is done and begins their next ones.

    Args:
      rng_key: scalar typed key, the run's seed.
      slots: the slots.
      helpers: [B] bool, slots without a chain, which may work ahead for others.
      config: the run.

    Returns:
      The slots; the tokens that were drawn ahead in vain, an int32.
    """
    if not (config.work_ahead and config.steps_per_stage):
        helpers = jnp.zeros_like(helpers)
    due = slots.busy & slots.suffix.done & work_ahead.is_chain(slots)
    # The banks stay outside of the branch, which would copy them.
    current_bank, proposal_bank = slots.chains.cache, slots.cache
    without_banks = slots._replace(chains=slots.chains._replace(cache=()), cache=())
    nowhere = jnp.zeros_like(due)
    turned, copies, discarded = jax.lax.cond(
        due.any() | (helpers & ~slots.busy).any(),
        lambda slots: _turn_over(rng_key, slots, due, helpers, config),
        lambda slots: (
            slots,
            _Copies(jnp.full_like(slots.root, -1), nowhere, nowhere),
            jnp.zeros((), jnp.int32),
        ),
        without_banks,
    )
    # One loop for each bank: a loop that wrote both would copy them every turn.
    proposal_bank = _refill_rows(copies, turned.root, current_bank, proposal_bank)
    current_bank = _write_rows(
        copies.moved, current_bank, lambda row, _: _row_of(proposal_bank, row)
    )
    turned = turned._replace(chains=turned.chains._replace(cache=current_bank), cache=proposal_bank)
    return turned, discarded


def _turn_over(rng_key, slots: Slots, due, helpers, config: Config):
    """Settles the slots ``due`` [B] until each has a token to draw or its chain is finished.

    Returns:
      The slots, what the banks have to do, and the tokens that were drawn ahead in vain.
    """

    def turn(carry):
        slots, due, copies, discarded = carry
        settled, took, info = transition.settle(slots.chains, slots.plan, slots.suffix, config)
        records, proposals = slots.records, slots.proposals
        if config.steps_per_stage:
            records = _write_records(records, slots.chains, due, info)
            proposals = proposal_record.write(
                proposals, info.proposal, due & info.attempted, slots.root, slots.chains
            )
        chains = transition.select(due, settled, slots.chains)
        lost = due & ~took & (slots.suffix.decoded > 0)
        # Only rows of chains have a place in the store, so that ``work_ahead`` moves none of it.
        slots = slots._replace(chains=chains, records=records, proposals=())
        slots, lately = work_ahead.release(slots, due & (took | chains.frozen))
        slots, heirs = work_ahead.adopt(slots, lost)
        inherits = heirs >= 0
        copies = _Copies(
            adopted=jnp.where(inherits, heirs, jnp.where(lost, -1, copies.adopted)),
            moved=copies.moved | (due & took),
            restored=(copies.restored | lost) & ~inherits,
        )

        begins = due & ~inherits
        chains = slots.chains
        enters = chains.step >= config.steps_per_stage
        stepped = chains._replace(step=chains.step + 1)
        advanced = transition.select(enters, transition.enter_stage(chains, config), stepped)
        chains = transition.select(begins, advanced, chains)
        finished = chains.frozen | (chains.stage > config.num_stages)
        busy = slots.busy & ~(begins & finished)

        keys = transition.step_keys(rng_key, chains)
        begun = transition.begin_extension(keys, chains, config)
        if config.steps_per_stage:
            step = transition.begin_step(keys, chains, slots.tuning, config)
            begun = transition.select(enters, begun, step)
        plan, planned = transition.select(begins, begun, (slots.plan, slots.suffix))
        planned = planned._replace(done=planned.done | ~busy)
        slots = slots._replace(
            chains=chains, plan=plan, suffix=planned, busy=busy, proposals=proposals
        )
        return slots, due & busy & planned.done, copies, discarded + lately

    nowhere = jnp.zeros_like(due)
    proposals = slots.proposals
    slots, born = work_ahead.spawn(slots._replace(proposals=()), due, helpers)
    slots = slots._replace(proposals=proposals)
    copies = _Copies(jnp.full_like(slots.root, -1), nowhere, restored=born)
    nothing = jnp.zeros((), jnp.int32)
    slots, _, copies, discarded = jax.lax.while_loop(
        lambda carry: carry[1].any(), turn, (slots, due | born, copies, nothing)
    )
    return slots, copies, discarded


def _write_records(records: Info, chains: State, due, info: Info) -> Info:
    """Writes the steps that the slots ``due`` [B] have come to, attempted or not."""
    rows = due & (chains.stage > 0) & (chains.step > 0)
    info = info._replace(proposal=())
    index = jnp.arange(rows.shape[0]), chains.stage - 1, chains.step - 1
    return jax.tree.map(
        lambda record, field: record.at[index].set(jnp.where(rows, field, record[index])),
        records,
        info,
    )


def _fill_rows(rows, source: Cache, target: Cache) -> Cache:
    """Copies a single row into the rows [B] bool of a bank."""
    return _write_rows(rows, target, lambda row, _: source)


def _refill_rows(copies: _Copies, root, current_bank: Cache, proposal_bank: Cache) -> Cache:
    """Gives the rows of ``copies`` what they go on from: a clone's row or their current trace's.

    No row is read here after it was written: the rows of clones that are taken over are free from
    now on, and are used again in a later settling at the earliest.
    """
    adopts = copies.adopted >= 0

    def read(row, proposal_bank):
        # Read off the loop's own carry: the bank as it was would have to be kept, that is, copied.
        clones = _row_of(proposal_bank, jnp.maximum(copies.adopted[row], 0))
        return jax.tree.map(
            lambda clone, current: jnp.where(adopts[row], clone, current),
            clones,
            _row_of(current_bank, root[row]),
        )

    return _write_rows(adopts | copies.restored, proposal_bank, read)


def _row_of(bank: Cache, row) -> Cache:
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, row, 1), bank)


def _write_rows(rows, target: Cache, read) -> Cache:
    """Writes ``read(row, target)`` into each of the rows [B] bool, in place, one a turn."""

    def write_one(carry):
        remaining, target = carry
        row = jnp.argmax(remaining)
        target = jax.tree.map(
            lambda to, leaf: jax.lax.dynamic_update_slice_in_dim(to, leaf, row, 0),
            target,
            read(row, target),
        )
        return remaining.at[row].set(False), target

    return jax.lax.while_loop(lambda carry: carry[0].any(), write_one, (rows, target))[1]
