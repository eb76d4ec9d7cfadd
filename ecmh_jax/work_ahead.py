"""Free slots work ahead for busy chains: steps that will be due if the one under way is rejected.

A chain's draws depend on who it is and on the step, never on when they are made. So while a chain
waits for a proposal, a free slot may already decode the chain's *next* proposal on the assumption
that this one is rejected, a second one the step after that, and so on (prefetching, Brockwell,
"Parallel Markov chain Monte Carlo simulation by pre-fetching", 2006). On a rejection the chain
takes over the first such *clone* with all that it has decoded; on an acceptance they are dropped.
The chain makes the very steps that it would have made alone, sooner.

Clones of a chain form a list: ``ahead`` leads from a row to the clone that assumes its rejection,
``root`` from a clone to its chain.
"""

import jax
import jax.numpy as jnp

from ecmh_jax import suffix, transition

_MOST_AHEAD = 8  # clones of one chain: with a rejection rate of 3/4, one in ten of the last is used


def is_chain(slots):
    """Whether a row holds a chain, or nothing, rather than a clone; [B] bool."""
    return slots.root == jnp.arange(slots.root.shape[0])


def spawn(slots, due, helpers):
    """Makes clones in free rows, one for each list that may grow, the shortest lists first.

    Args:
      slots: the slots, without their banks.
      due: [B] bool, chains that are about to be settled; they get no clone now.
      helpers: [B] bool, slots without a chain.

    Returns:
      The slots, with clones that have not begun yet, and the clones' rows [B] bool.
    """
    rows = jnp.arange(due.shape[0])
    chains = is_chain(slots)
    free = helpers & ~slots.busy & chains
    drawn, plan = slots.suffix, slots.plan
    # Whoever will be accepted has nothing behind it; an extension is never rejected.
    accepted = drawn.done & ~drawn.hopeless & (drawn.log_ratio >= plan.log_uniform)
    length = jnp.zeros_like(slots.root).at[slots.root].add(~chains)[slots.root]
    grows = (
        slots.busy
        & plan.attempted
        & (slots.ahead < 0)
        & ~due[slots.root]
        & ~accepted
        & drawn.finite
        & (length < _MOST_AHEAD)
    )
    parents = jnp.argsort(jnp.where(grows, length, rows.size))
    clones = jnp.argsort(~free)
    paired = rows < jnp.minimum(free.sum(), grows.sum())
    parent = jnp.zeros_like(rows).at[clones].set(parents)
    born = jnp.zeros_like(free).at[clones].set(paired)

    copies, plans, ratio = jax.tree.map(
        lambda leaf: leaf[parent], (slots.chains, plan, drawn.ratio)
    )
    copies = copies._replace(stats=jax.tree.map(jnp.zeros_like, copies.stats))
    nothing = jnp.zeros_like(born)
    plans = plans._replace(attempted=nothing, moves=nothing)
    idle = suffix.begin(copies.trace, copies.trace.length, nothing, ratio)
    no_records = jax.tree.map(jnp.zeros_like, slots.records)
    tunings = jax.tree.map(lambda leaf: leaf[parent], slots.tuning)
    slots = transition.select(
        born,
        slots._replace(chains=copies, tuning=tunings, plan=plans, suffix=idle, records=no_records),
        slots,
    )
    outside = rows.size
    ahead = jnp.where(born, -1, slots.ahead)
    return slots._replace(
        busy=slots.busy | born,
        root=jnp.where(born, slots.root[parent], slots.root),
        ahead=ahead.at[jnp.where(paired, parents, outside)].set(clones, mode="drop"),
    ), born


def adopt(slots, rejected):
    """Hands the rows ``rejected`` [B] bool over to their first clone, where they have one.

    Returns:
      The slots; the clone's row that each row took over [B] int32, -1 for none.
    """
    heirs = jnp.where(rejected, slots.ahead, -1)
    inherits = heirs >= 0
    index = jnp.maximum(heirs, 0)
    taken = jax.tree.map(lambda leaf: leaf[index], slots)
    stats = jax.tree.map(jnp.add, slots.chains.stats, taken.chains.stats)
    steps = inherits[:, None, None] & taken.records.attempted
    records = jax.tree.map(
        lambda new, old: jnp.where(steps, new, old), taken.records, slots.records
    )
    taken = taken._replace(
        chains=taken.chains._replace(stats=stats), records=slots.records, root=slots.root
    )
    slots = transition.select(inherits, taken, slots)._replace(records=records)
    return _free(slots, jnp.zeros_like(inherits).at[index].max(inherits)), heirs


def release(slots, rows):
    """Frees the clones of the chains ``rows`` [B] bool.

    Returns:
      The slots; the tokens that the clones had drawn, an int32.
    """
    clones = ~is_chain(slots) & rows[slots.root]
    discarded = jnp.sum(jnp.where(clones, slots.suffix.decoded, 0), dtype=jnp.int32)
    slots = _free(slots, clones)
    return slots._replace(ahead=jnp.where(rows, -1, slots.ahead)), discarded


def _free(slots, rows):
    own = jnp.arange(rows.shape[0])
    return slots._replace(
        busy=slots.busy & ~rows,
        root=jnp.where(rows, own, slots.root),
        ahead=jnp.where(rows, -1, slots.ahead),
    )
