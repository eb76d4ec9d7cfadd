"""Shared types and the one glossary of axes. Nothing here computes.

Axes, everywhere in the library:

* ``B`` chains: one row of a batch is one Markov chain.
* ``P`` slots of the padded prompt, ``config.prompt_length``.
* ``T`` slots of a trace, ``config.prompt_length + config.max_new_tokens``. Prompts are padded on
  the right, and the completion follows the *live* prompt without a gap: slot ``s`` of a row holds
  the token at position ``s`` of its text.
* ``V`` tokens of the vocabulary; ``K`` tokens kept by top-k truncation.

A completion has ``n = length - prompt_length`` tokens, an end-of-sequence token included.
A ``NamedTuple`` is traced, a frozen dataclass is static; nothing is sometimes one and sometimes
the other.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Params = Any  # pytree of model weights
Cache = Any  # pytree of arrays, each with the chain axis first: [B, ...]


class LanguageModel(NamedTuple):
    """A next-token law as three pure functions; the weights are an argument of each.

    Attributes:
      init_cache: ``(batch_size, num_slots) -> cache``. Every leaf has the chain axis first, and
        nothing else in the structure depends on ``batch_size``: rows move between caches.
      prefill: ``(params, tokens [B, P] int32, lengths [B] int32, cache) -> (logits, cache)``:
        writes the tokens into slots ``0..P-1`` and returns the logits ``[B, V]`` that follow each
        row's last live token. What it writes past ``lengths`` is overwritten before it is read.
      decode: ``(params, tokens [B] int32, positions [B] int32, cache) -> (logits, cache)``: writes
        one token a row into slot ``positions`` and returns the logits ``[B, V]`` of the token after
        it, given slots ``0..positions``. Decoding a token again in its own slot changes nothing.
    """

    init_cache: Callable[[int, int], Cache]
    prefill: Callable[[Params, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]
    decode: Callable[[Params, jax.Array, jax.Array, Cache], tuple[jax.Array, Cache]]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is static about a run: shapes, schedule and switches.

    Attributes:
      prompt_length: slots of the padded prompt, >= 1.
      max_new_tokens: longest completion in tokens, >= 1.
      num_stages: stages of the schedule, >= 1; must divide ``max_new_tokens``.
      steps_per_stage: Metropolis-Hastings steps in every stage, >= 0.
      top_k: tokens kept by truncation, 1..V, or None for the whole vocabulary. Truncation defines
        p itself: target, proposal and entropy all use the truncated, renormalised law.
      eos_ids: token ids that end a completion; may be empty.
      pad_id: token id written after a trace's end.
      refine_finished: keep refining chains after the stage in which they end, so that the final law
        is p^power on complete strings. False freezes them, as the paper does, which is cheaper.
      cut_first_token: whether the first completion token may be cut. False makes
        the chain reducible.
      replay: start a proposal's decoding at its first divergence from the current trace. Changes
        no token of any chain, only the work.
      early_rejection: stop a proposal once its rejection is certain. Changes no token of any chain.
      work_ahead: let slots without a chain draw proposals that will be due if the one under way is
        rejected. Changes no token of any chain; the engine alone asks.
      record_proposals: keep every step's current and proposed completion, with the terms of its
        ratio, in ``Info.proposal``. Changes no token of any chain. Takes 16 bytes a step and token
        of ``max_new_tokens`` in every slot.
    """

    prompt_length: int
    max_new_tokens: int
    num_stages: int = 16
    steps_per_stage: int = 10
    top_k: int | None = 50
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    refine_finished: bool = False
    cut_first_token: bool = True
    replay: bool = True
    early_rejection: bool = True
    work_ahead: bool = True
    record_proposals: bool = False

    @property
    def num_slots(self) -> int:
        """T, the slots of a trace and of the KV cache."""
        return self.prompt_length + self.max_new_tokens

    @property
    def stage_length(self) -> int:
        """Tokens by which each stage moves the horizon."""
        return self.max_new_tokens // self.num_stages


class Tuning(NamedTuple):
    """Numbers that may differ from chain to chain; arrays, so that a sweep is one program.

    Build it with ``make_tuning``, which checks ranges and casts once.

    Attributes:
      power: [B] float32, alpha of the target p^alpha, > 0.
      inverse_temperature: [B] float32, 1/tau of the proposal law q = p^(1/tau) / Z, > 0.
      cut_power: [B] float32, beta of the cut law, >= 0.
      uniform_mix: [B] float32, share of uniform cuts, 0..1; 1 is uniform cutting.
    """

    power: jax.Array
    inverse_temperature: jax.Array
    cut_power: jax.Array
    uniform_mix: jax.Array


class Trace(NamedTuple):
    """A batch of texts and the numbers stored for every token of their completions.

    The statistics are float32 nats and zero outside the completion.

    Attributes:
      tokens: [B, T] int32: prompt, completion, then ``pad_id``.
      length: [B] int32, live tokens: prompt + completion.
      log_prob: [B, T] log p(token | prefix).
      log_q: [B, T] log q(token | prefix), q the proposal law.
      log_weight: [B, T] power * log_prob - log_q.
      entropy: [B, T] entropy of the law the token was drawn from.
    """

    tokens: jax.Array
    length: jax.Array
    log_prob: jax.Array
    log_q: jax.Array
    log_weight: jax.Array
    entropy: jax.Array


class Stats(NamedTuple):
    """What every chain did and what it cost, since ``init``. All [B] int32.

    Attributes:
      attempted: Metropolis-Hastings steps taken.
      accepted: steps whose proposal was accepted; a proposal equal to the current trace counts.
      null_moves: steps whose proposal was the current trace itself, found without the model.
      decoded: tokens drawn from fresh logits, in extensions and in proposals: a chain's cost;
        with ``config.replay`` off, kept tokens are decoded again and count too.
      replayed: proposal tokens taken over from the current trace without the model.
      saved: slots below the horizon that proposals stopped by certain rejection never decoded: an
        upper bound on the tokens saved, since a proposal may end before its horizon.
    """

    attempted: jax.Array
    accepted: jax.Array
    null_moves: jax.Array
    decoded: jax.Array
    replayed: jax.Array
    saved: jax.Array


class State(NamedTuple):
    """Everything that the next step of a batch of chains needs.

    Attributes:
      trace: the chains' current traces.
      cache: the model's cache, holding slots ``0..length-2`` of each current trace; what lies
        beyond is never read.
      prompt_length: [B] int32, live prompt tokens.
      prompt_id: [B] int32 and
      chain_id: [B] int32: who the chain is; with the run's key they determine all its draws.
      stage: [B] int32, 0 before the first extension, then 1..num_stages.
      step: [B] int32, Metropolis-Hastings steps taken in this stage.
      frozen: [B] bool, a chain that is not advanced any more.
      finite: [B] bool, False once the model returned NaN or infinite logits for the chain.
      stats: the chains' counters.
    """

    trace: Trace
    cache: Cache
    prompt_length: jax.Array
    prompt_id: jax.Array
    chain_id: jax.Array
    stage: jax.Array
    step: jax.Array
    frozen: jax.Array
    finite: jax.Array
    stats: Stats


class Info(NamedTuple):
    """What one Metropolis-Hastings step did, for a reader. All [B].

    All but ``log_prob`` and ``mean_entropy`` are zero for a step that was not attempted. These two
    are the chain's own after every step, frozen or not, so that they are draws for ``convergence``.

    Attributes:
      attempted: bool, False for a frozen chain.
      accepted: bool.
      cut: int32, the cut in 1..n: the completion's tokens before it were kept; 0 if none was drawn.
      divergence: int32, first completion token, counted from 1, at which the proposal left the
        current trace; 0 if it never did.
      current_length: int32, tokens of the completion before the step.
      proposal_length: int32, tokens of the proposed completion as far as it was decoded.
      log_ratio: float32, log A, or the upper bound on it at which the proposal was stopped.
      decoded: int32, tokens drawn from fresh logits in this step.
      log_prob: float32 nats, log p of the chain's completion after the step.
      mean_entropy: float32 nats, mean over that completion's tokens of the entropy of the laws that
        they were drawn from; 0 for an empty completion.
      proposal: a ``proposal_record.Proposal`` with ``config.record_proposals``, else ().
    """

    attempted: jax.Array
    accepted: jax.Array
    cut: jax.Array
    divergence: jax.Array
    current_length: jax.Array
    proposal_length: jax.Array
    log_ratio: jax.Array
    decoded: jax.Array
    log_prob: jax.Array
    mean_entropy: jax.Array
    proposal: Any = ()


class Result(NamedTuple):
    """What ``sample`` returns.

    Attributes:
      trace: the final traces.
      stats: the chains' counters.
      finite: [B] bool, False for a chain frozen because its logits were not finite.
      info: the sampler's own records, a NamedTuple; for ``ecmh`` the ``Info`` of every step, with
        leading axes [num_stages, steps_per_stage].
    """

    trace: Trace
    stats: Stats
    finite: jax.Array
    info: Any
