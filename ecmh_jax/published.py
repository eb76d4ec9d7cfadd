"""The published Entropy-Cut and Uniform-Cut code's steps, as they are: INEXACT, for comparison.

Reproduces the kernels of felix-cfzhou/Reasoning-with-Sampling at db60a15 (``mcmc_cut`` and
``mcmc_orig``), which differ from the rule of the paper (arXiv:2605.30327, ``ecmh``). Their
stationary law is not p^power: use them to reproduce published runs and to measure what exactness is
worth, never to sample. A stage extends every unfinished chain by ``stage_length`` tokens; then each
step draws a cut t and a suffix x' by q and accepts with probability min(1, A), where

    log A = sum_{t<=s<t+l'} log_weight_s(x') - sum_{t<=s<t+l'} log_weight_s(x)
            + log c(t | x') - log c(t | x),        l' tokens in the proposed suffix,

and what is wrong with it, each with a switch of its own in ``Options``, is that

* a proposal is capped at the current trace's length instead of the horizon, so that chains cannot
  grow back, and unfinished traces short of the horizon, outside the target's support, arise;
* the current suffix is cut to the length of the proposed one, which leaves out the weights beyond;
* end-of-sequence is forbidden as a proposal's first token, while log q is stored as if it were not;
* uniform cuts lack the term log c(t | x') - log c(t | x) = log(n / n').

With all four switched off the step is that of ``ecmh`` in law. H_0 = 0 as there (the code's
``prepend=0``). The published code freezes chains after the stage in which they end:
``config.refine_finished=False``. It has neither replay nor early rejection: every token of a
proposal is decoded, and counted, whatever the configuration says.

Where the code's sampler truncates the law to ``top_k`` tokens after forbidding end-of-sequence, the
next likeliest token moves up; here the truncated law just loses end-of-sequence.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ecmh_jax import cut, ecmh, suffix, transition
from ecmh_jax.acceptance import RunningRatio
from ecmh_jax.base import Config, Info, LanguageModel, Params, State, Trace, Tuning
from ecmh_jax.rounds import Rounds
from ecmh_jax.suffix import Plan, Suffix

CUTS = ("entropy_cut", "uniform_cut")


@dataclasses.dataclass(frozen=True)
class Options:
    """Which of the published kernels, and which of their faults it has.

    Attributes:
      cut: ``"entropy_cut"`` (published ``mcmc_cut``) or ``"uniform_cut"`` (``mcmc_orig``), which
        takes the place of ``tuning.uniform_mix``.
      cap_at_current_length: a proposal gets no longer than the current trace.
      slice_current_suffix: the ratio forgets the current suffix beyond the proposal's length.
      forbid_end_at_cut: a proposal may not begin with end-of-sequence, the first of
        ``config.eos_ids``; its stored log q does not know.
      omit_uniform_cut_term: with uniform cuts the ratio has no cut term.
    """

    cut: str = "entropy_cut"
    cap_at_current_length: bool = True
    slice_current_suffix: bool = True
    forbid_end_at_cut: bool = True
    omit_uniform_cut_term: bool = True


PUBLISHED_ENTROPY_CUT = Options("entropy_cut")  # inexact
PUBLISHED_UNIFORM_CUT = Options("uniform_cut")  # inexact


def check_options(options: Options) -> None:
    """Raises ValueError unless the cut is known."""
    if options.cut not in CUTS:
        raise ValueError(f"cut is {options.cut!r}; expected one of {', '.join(CUTS)}")


def rows_per_chain(options: Options) -> int:
    """Rows of a batch that one result needs: 1, whatever the options."""
    del options
    return 1


def build_extend(model: LanguageModel, config: Config):
    """Returns ``extend(rng_key, state, params, tuning) -> state``: enters the next stage.

    As ``ecmh.build_extend``, except that a trace which stopped short of the last horizon grows by
    ``stage_length`` tokens too, and stays short of the new one.
    """

    def extend(rng_key, state: State, params: Params, tuning: Tuning) -> State:
        state = transition.enter_stage(state, config)
        keys = transition.step_keys(rng_key, state)
        plan, planned = transition.begin_extension(keys, state, config)
        plan = plan._replace(horizon=state.trace.length + config.stage_length)
        drawn, cache = suffix.draw_suffix(
            model,
            config,
            params,
            tuning,
            state.trace,
            state.prompt_length,
            plan,
            planned,
            state.cache,
        )
        state, _, _ = transition.settle(state, plan, drawn, config)
        return state._replace(cache=cache)

    return extend


def build_kernel(model: LanguageModel, config: Config, options: Options):
    """Returns ``kernel(rng_key, state, params, tuning) -> (state, info)``: one INEXACT step.

    As ``ecmh.build_kernel``; it leaves no known law invariant unless all faults are off.
    """
    config = dataclasses.replace(config, replay=False, early_rejection=False)

    def kernel(rng_key, state: State, params: Params, tuning: Tuning) -> tuple[State, Info]:
        state = state._replace(step=state.step + 1)
        keys = transition.step_keys(rng_key, state)
        if options.cut == "uniform_cut":
            tuning = tuning._replace(uniform_mix=jnp.ones_like(tuning.uniform_mix))
        step, _ = transition.begin_step(keys, state, tuning, config)
        context, plan, planned = _begin_proposal(state, step, config, options)
        drawn, cache = suffix.draw_suffix(
            model,
            config,
            params,
            tuning,
            context,
            state.prompt_length,
            plan,
            planned,
            state.cache,
        )
        drawn = drawn._replace(
            log_ratio=_published_log_ratio(state, drawn.trace, plan, tuning, config, options)
        )
        settled, moved, info = transition.settle(
            state, plan._replace(log_uniform=step.log_uniform), drawn, config
        )
        # Nothing is coupled: whatever is new begins at the cut.
        info = info._replace(divergence=info.cut)
        return settled._replace(cache=transition.select(moved, cache, state.cache)), info

    return kernel


def build(model: LanguageModel, config: Config, options: Options) -> Rounds:
    """Returns the published sampler, a stage a round; its law is NOT p^power, however many steps.

    Args:
      model: the language model.
      config: the run; ``replay`` and ``early_rejection`` have no effect.
      options: the kernel and its faults.

    Returns:
      Its functions. A trace without end-of-sequence may be shorter than ``max_new_tokens``.
      ``info`` is ``base.Info``; its ``divergence`` is the cut.
    """
    extend, kernel = build_extend(model, config), build_kernel(model, config, options)
    return ecmh.build_rounds(model, config, ecmh.build_stage(extend, kernel, config))


def _begin_proposal(
    state: State, step: Plan, config: Config, options: Options
) -> tuple[Trace, Plan, Suffix]:
    """Plans a whole new suffix from the cut; returns what it is drawn against too.

    A draw leaves out the token that its context holds at the slot of divergence, and stores the
    statistics of the whole law: so the forbidden end-of-sequence is put there.
    """
    context, cut_slot = state.trace, step.cut_slot
    horizon, divergence = step.horizon, jnp.full_like(cut_slot, -1)
    if options.cap_at_current_length:
        horizon = context.length
    if options.forbid_end_at_cut and config.eos_ids:
        rows = jnp.arange(cut_slot.shape[0])
        context = context._replace(tokens=context.tokens.at[rows, cut_slot].set(config.eos_ids[0]))
        divergence = cut_slot
    plan = step._replace(
        moves=step.attempted,
        divergence=divergence,
        horizon=horizon,
        log_uniform=jnp.full_like(step.log_uniform, -jnp.inf),  # nothing stops a proposal
    )
    zeros = jnp.zeros(cut_slot.shape, jnp.float32)
    unused = RunningRatio(zeros, zeros, zeros, zeros, zeros)
    planned = suffix.begin(context, cut_slot, step.attempted, unused)
    return context, plan, planned


def _published_log_ratio(
    state: State, proposal: Trace, plan: Plan, tuning: Tuning, config: Config, options: Options
) -> jax.Array:
    """Log A of each proposal [B] by the published formula."""
    current, cut_slot = state.trace, plan.cut_slot
    scored = current.length
    if options.slice_current_suffix:
        scored = jnp.minimum(scored, proposal.length)

    def weight(trace: Trace, length):
        slots = jnp.arange(trace.tokens.shape[1])[None]
        counted = (slots >= cut_slot[:, None]) & (slots < length[:, None])
        return jnp.where(counted, trace.log_weight, 0.0).sum(axis=-1)

    def log_cut(trace: Trace):
        def one_chain(entropy, prompt_length, length, slot, cut_power, uniform_mix):
            first = config.cut_first_token
            law = cut.cut_law(entropy, prompt_length, length, cut_power, first)
            return cut.log_cut_probability(
                law.log_weights[slot], law.log_total, law.num_cuts, uniform_mix
            )

        return jax.vmap(one_chain)(
            trace.entropy,
            state.prompt_length,
            trace.length,
            cut_slot,
            tuning.cut_power,
            tuning.uniform_mix,
        )

    log_ratio = weight(proposal, proposal.length) - weight(current, scored)
    if options.cut == "uniform_cut" and options.omit_uniform_cut_term:
        return log_ratio
    return log_ratio + log_cut(proposal) - log_cut(current)
