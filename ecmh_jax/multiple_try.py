"""Multiple-try Metropolis-Hastings on suffixes (arXiv:2606.09926), exact, in lockstep.

The schedule is that of ``ecmh``. A step draws one cut t from c(t | x) and J suffixes x'_1..x'_J
from q at that cut, independently of one another. With the weights

    W_j = exp(sum_{s>=t} log_weight_s(x'_j)) * c(t | x'_j),    W_current likewise,

it picks the try j with probability W_j / W, where W = sum_i W_i, and accepts it with probability

    min(1, W / (W - W_j + W_current)).

Why this is exact although the cut's law depends on the state: among the traces that share x_<t let
m(x) = p(x)^power * c(t | x), which is q(suffix) * W(x) up to a constant of the prefix. A step that
draws t from c(t | x) and then moves reversibly with respect to m leaves p^power invariant. The
tries depend on x through nothing but its prefix, so those that were not picked serve as the
reverse step's tries. With S the sum of their weights, the flow from x to y through this cut is

    m(x) * q(y) * J * E[W(y) / (S + W(y)) * min(1, (S + W(y)) / (S + W(x)))]
        = q(x) W(x) * q(y) W(y) * J * E[1 / max(S + W(y), S + W(x))],

which is symmetric in x and y: detailed balance holds cut by cut, and thus for their sum. J = 1 is
the ordinary step, ``ecmh`` token for token.

Each try may share its first tokens with the current trace through uniforms of its own
(``suffix``); given x it is still distributed as q and independent of the other tries, so
``config.replay`` changes the work alone. A try that never leaves the current trace has the weight
W_current.

Certain rejection for a group: with u drawn first and an upper bound b_i >= W_i / W_current for
every try, no pick is accepted where u > B / (B - max_i b_i + 1), B = sum_i b_i, and max_i b_i < 1,
because W / (W - W_j + W_current) then grows with every weight. All tries stop together.

The paper also skips blocks of low entropy: a stage whose new tokens have a mean entropy below
``inexact_skip_below`` takes no steps. Whether a kernel is applied then depends on the state that it
would change, so that p^power is no longer invariant: what leaves the blocks of high entropy does
not come back. It is off by default and INEXACT.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ecmh_jax import acceptance, cut, ecmh, random_keys, suffix, token_law, transition
from ecmh_jax.base import Cache, Config, LanguageModel, Params, State, Trace, Tuning
from ecmh_jax.rounds import Rounds, repeat
from ecmh_jax.suffix import Plan, Suffix

_CHOICE = 0  # position of the one draw that a group makes as a whole in a step
_ROUNDING = 1e-3  # nats by which a bound must miss, so that no rounding decides a rejection


@dataclasses.dataclass(frozen=True)
class Options:
    """What is static about the sampler.

    Attributes:
      num_tries: J, suffixes drawn in every step, >= 1; 1 is ordinary Metropolis-Hastings.
      inexact_skip_below: nats, >= 0; a stage takes no steps on a chain whose new tokens have a
        lower mean entropy. 0 skips none; any other value samples another law than p^power.
    """

    num_tries: int = 4
    inexact_skip_below: float = 0.0


class Info(NamedTuple):
    """What one step of each result did. All [num_stages, steps_per_stage, B]; 0 if not attempted.

    Attributes:
      attempted: bool, False for a frozen chain.
      accepted: bool.
      cut: int32, the cut in 1..n: the completion's tokens before it were kept; 0 if none was drawn.
      chosen: int32, the picked try, 0..J-1.
      divergence: int32, first completion token, counted from 1, at which the picked try left the
        current trace; 0 if it never did.
      current_length: int32, tokens of the completion before the step.
      proposal_length: int32, tokens of the picked try as far as it was decoded.
      effective_tries: float32, W^2 / sum_j W_j^2, in 1..J; 0 where no try has any weight.
      log_acceptance: float32, log W - log(W - W_j + W_current), not cut off at 0. Certain rejection
        stops a step before its weights are known: the pick and this are then those so far.
      decoded: int32, tokens drawn from fresh logits in this step, over all tries.
      log_prob: float32 nats, log p of the chain's completion after the step, and
      mean_entropy: float32 nats, its mean entropy: the chain's own, attempted or not.
    """

    attempted: jax.Array
    accepted: jax.Array
    cut: jax.Array
    chosen: jax.Array
    divergence: jax.Array
    current_length: jax.Array
    proposal_length: jax.Array
    effective_tries: jax.Array
    log_acceptance: jax.Array
    decoded: jax.Array
    log_prob: jax.Array
    mean_entropy: jax.Array


def check_options(options: Options) -> None:
    """Raises ValueError unless the options make sense."""
    if not isinstance(options.num_tries, int) or options.num_tries < 1:
        raise ValueError(f"num_tries is {options.num_tries!r}; expected an integer of at least 1")
    if not 0.0 <= options.inexact_skip_below < float("inf"):
        raise ValueError(
            f"inexact_skip_below is {options.inexact_skip_below!r}; expected nats of at least 0"
        )


def rows_per_chain(options: Options) -> int:
    """Rows of a batch that one result needs: J."""
    return options.num_tries


def build_kernel(model: LanguageModel, config: Config, options: Options):
    """Returns ``kernel(rng_key, state, params, tuning) -> (state, info)``: one step of every chain.

    The state holds one trace a result, [B]; the B * J rows that decode exist within a step only,
    those of one result side by side. ``rng_key`` is the run's scalar key.
    """
    num_tries = options.num_tries

    def kernel(rng_key, state: State, params: Params, tuning: Tuning) -> tuple[State, Info]:
        state = state._replace(step=state.step + 1)
        # The group's cut and u are those of an ordinary step; each try diverges by its own keys.
        group_keys = transition.step_keys(rng_key, state)
        group, _ = transition.begin_step(group_keys, state, tuning, config)
        rows = repeat(state, num_tries)
        row_tuning = repeat(tuning, num_tries)
        keys = _try_keys(rng_key, state, num_tries)
        plan, tries = _begin_tries(keys, rows, repeat(group, num_tries), row_tuning, config)
        tries, cache = _draw_tries(
            model,
            config,
            params,
            row_tuning,
            rows.trace,
            rows.prompt_length,
            plan,
            tries,
            rows.cache,
            group.log_uniform,
        )
        return _settle(state, group_keys, plan, tries, cache, group.log_uniform, config)

    return kernel


def build(model: LanguageModel, config: Config, options: Options) -> Rounds:
    """Returns the sampler: the schedule of ``ecmh`` with multiple-try steps, a stage a round.

    Try j of a result draws as chain ``chain_id * num_tries + j``.

    Args:
      model: the language model.
      config: the run. ``replay`` and ``early_rejection`` change no token.
      options: the sampler.

    Returns:
      Its functions. ``stats`` counts as for ``ecmh``, its ``decoded``, ``replayed`` and ``saved``
      over all tries; ``null_moves`` are the steps in which the picked try was the current trace. A
      step in which every try met logits that are not finite freezes its chain; a single such try
      is never picked. ``info`` is this module's.
    """
    extend, kernel = ecmh.build_extend(model, config), build_kernel(model, config, options)
    if not options.inexact_skip_below:
        return ecmh.build_rounds(model, config, ecmh.build_stage(extend, kernel, config))
    take_steps = ecmh.build_stage(lambda rng_key, state, *_: state, kernel, config)

    def enter_stage(rng_key, state: State, params: Params, tuning: Tuning) -> tuple[State, Info]:
        first_slot = state.trace.length
        state = extend(rng_key, state, params, tuning)
        skips = _mean_entropy_from(state.trace, first_slot) < options.inexact_skip_below
        waiting = state._replace(frozen=state.frozen | skips)
        after, info = take_steps(rng_key, waiting, params, tuning)
        return after._replace(frozen=jnp.where(skips, state.frozen, after.frozen)), info

    return ecmh.build_rounds(model, config, enter_stage)


def _mean_entropy_from(trace: Trace, first_slot: jax.Array) -> jax.Array:
    """Mean entropy [B] of the tokens from ``first_slot`` [B] on; infinite where there are none."""
    slots = jnp.arange(trace.tokens.shape[1])[None]
    new = (slots >= first_slot[:, None]) & (slots < trace.length[:, None])
    count = new.sum(axis=1)
    total = jnp.where(new, trace.entropy, 0.0).sum(axis=1)
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.inf)


def log_acceptance(log_ratios: jax.Array, chosen: jax.Array) -> jax.Array:
    """Log of W / (W - W_chosen + W_current), [B]; not cut off at 0.

    Args:
      log_ratios: [B, J] log W_j - log W_current; -inf for a try without weight.
      chosen: [B] int32, the picked try.
    """
    others = jnp.where(
        jnp.arange(log_ratios.shape[1])[None] == chosen[:, None], -jnp.inf, log_ratios
    )
    # W_current, whose own log-ratio is 0, takes the place of the picked try.
    reverse = jnp.logaddexp(jax.nn.logsumexp(others, axis=1), 0.0)
    return jax.nn.logsumexp(log_ratios, axis=1) - reverse


def pick(log_ratios: jax.Array, uniform: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Picks a try with probability W_j / W.

    Args:
      log_ratios: [B, J] log W_j - log W_current; -inf for a try without weight.
      uniform: [B] float32 in [0, 1).

    Returns:
      The picked try [B] int32, 0 where no try has any weight; W^2 / sum_j W_j^2 [B] float32.
    """
    largest = log_ratios.max(axis=1, keepdims=True)
    weights = jnp.exp(log_ratios - jnp.where(largest > -jnp.inf, largest, 0.0))
    squares = jnp.square(weights).sum(axis=1)
    effective = jnp.square(weights.sum(axis=1)) / jnp.where(squares > 0, squares, 1.0)
    return token_law.invert_distribution(weights, uniform), effective


def _try_keys(rng_key: jax.Array, state: State, num_tries: int) -> jax.Array:
    """Step keys [B * J] of the tries, each a chain of its own as far as its draws go."""
    num_results = state.chain_id.shape[0]
    numbers = jnp.tile(jnp.arange(num_tries, dtype=state.chain_id.dtype), num_results)
    identity = repeat(state.chain_id * num_tries, num_tries) + numbers
    keys = random_keys.chain_keys(rng_key, repeat(state.prompt_id, num_tries), identity)
    return random_keys.step_keys(
        keys, repeat(state.stage, num_tries), repeat(state.step, num_tries)
    )


def _begin_tries(
    keys: jax.Array, rows: State, group: Plan, tuning: Tuning, config: Config
) -> tuple[Plan, Suffix]:
    """Plans every try [B * J] of the step whose cut the group [B], repeated, has drawn."""
    current, cut_slot, attempted = rows.trace, group.cut_slot, group.attempted
    divergence, diverges = suffix.first_divergence(keys, current, cut_slot)

    def one_row(entropy, log_weight, prompt_length, length, cut_power, mix, slot, leaves_at):
        law = cut.cut_law(entropy, prompt_length, length, cut_power, config.cut_first_token)
        log_cut = cut.log_cut_probability(law.log_weights[slot], law.log_total, law.num_cuts, mix)
        return acceptance.begin(log_weight, entropy, law, log_cut, slot, leaves_at, length)

    ratio = jax.vmap(one_row)(
        current.entropy,
        current.log_weight,
        rows.prompt_length,
        current.length,
        tuning.cut_power,
        tuning.uniform_mix,
        cut_slot,
        divergence,
    )
    plan = group._replace(
        keys=keys,
        moves=attempted & diverges,
        divergence=divergence,
        # A single try decides nothing: no row stops by itself.
        log_uniform=jnp.full_like(group.log_uniform, -jnp.inf),
    )
    if config.replay:
        return plan, suffix.begin(current, divergence, plan.moves, ratio)
    return plan, suffix.begin(current, cut_slot, attempted, ratio)


def _draw_tries(
    model: LanguageModel,
    config: Config,
    params: Params,
    tuning: Tuning,
    current: Trace,
    prompt_length: jax.Array,
    plan: Plan,
    tries: Suffix,
    cache: Cache,
    log_uniform: jax.Array,
) -> tuple[Suffix, Cache]:
    """Draws all tries to their ends, or to their group's certain rejection.

    As ``suffix.draw_suffix``, with the tries as rows [B * J]; ``log_uniform`` [B] is the group's.
    """
    bounded = token_law.weights_are_bounded(tuning.power, tuning.inverse_temperature)

    def body(carry):
        drawn, cache = suffix.draw_one(
            model, config, params, tuning, current, prompt_length, plan, *carry
        )
        undecided = plan.moves & (drawn.trace.length <= plan.divergence) & drawn.finite
        bounds = jnp.where(undecided | ~bounded, jnp.inf, _log_weights(drawn))
        bounds = bounds.reshape(log_uniform.shape[0], -1)
        best = bounds.max(axis=1)
        most = log_acceptance(bounds, bounds.argmax(axis=1))
        certain = (best < 0) & (most < log_uniform - _ROUNDING)
        hopeless = drawn.hopeless | (repeat(certain, bounds.shape[1]) & plan.attempted)
        done = drawn.done | hopeless if config.early_rejection else drawn.done
        return drawn._replace(hopeless=hopeless, done=done), cache

    return jax.lax.while_loop(lambda carry: ~carry[0].done.all(), body, (tries, cache))


def _log_weights(tries: Suffix) -> jax.Array:
    """Log W_j - log W_current of each try [B * J]; none for one whose logits were not finite."""
    return jnp.where(tries.finite, tries.log_ratio, -jnp.inf)


def _settle(
    state: State,
    group_keys: jax.Array,
    plan: Plan,
    tries: Suffix,
    cache: Cache,
    log_uniform: jax.Array,
    config: Config,
) -> tuple[State, Info]:
    """Picks a try for each result, accepts or rejects it, and takes its row's cache over."""
    num_results = state.step.shape[0]

    def grouped(values):
        return values.reshape(num_results, -1)

    log_ratios = grouped(_log_weights(tries))
    chosen, effective = pick(log_ratios, random_keys.group_uniform(group_keys, _CHOICE))
    row = jnp.arange(num_results) * log_ratios.shape[1] + chosen

    def take(tree):
        return jax.tree.map(lambda leaf: jnp.take(leaf, row, axis=0), tree)

    chosen_plan = take(plan)._replace(keys=group_keys, log_uniform=log_uniform)
    picked = take(tries)._replace(
        log_ratio=log_acceptance(log_ratios, chosen),
        finite=grouped(tries.finite).any(axis=1),
        decoded=grouped(tries.decoded).sum(axis=1),
    )
    before = state.stats
    settled, moved, info = transition.settle(state, chosen_plan, picked, config)
    replayed = jnp.where(plan.attempted & config.replay, plan.divergence - plan.cut_slot, 0)
    ended = suffix.is_eos(suffix.last_token(tries.trace), config.eos_ids)
    stopped_early = tries.hopeless & tries.finite & ~ended & plan.moves & config.early_rejection
    saved = jnp.where(stopped_early, plan.horizon - tries.trace.length, 0)
    settled = settled._replace(
        cache=transition.select(moved, take(cache), state.cache),
        stats=settled.stats._replace(
            replayed=before.replayed + grouped(replayed).sum(axis=1),
            saved=before.saved + grouped(saved).sum(axis=1),
        ),
    )
    return settled, Info(
        attempted=info.attempted,
        accepted=info.accepted,
        cut=info.cut,
        chosen=jnp.where(info.attempted, chosen, 0),
        divergence=info.divergence,
        current_length=info.current_length,
        proposal_length=info.proposal_length,
        effective_tries=jnp.where(info.attempted, effective, 0.0),
        log_acceptance=info.log_ratio,
        decoded=info.decoded,
        log_prob=info.log_prob,
        mean_entropy=info.mean_entropy,
    )
