"""Runs that record every step, and what tables of the model say about each record."""

import dataclasses
import functools
import operator

import jax
import numpy as np

from ecmh_jax import compiled, make_tuning
from ecmh_jax.chain_queue import Chains, run_queue
from ecmh_jax.sampling import assemble
from tests import enumeration, hashed_model, oracle
from tests.hashed_model import EOS, LENGTHS, MODEL, PROMPTS, TABLE, make_params

# 3 stages, 6 steps and N = 18 tokens; chains freeze when they end.
CONFIG = dataclasses.replace(
    hashed_model.CONFIG,
    max_new_tokens=18,
    num_stages=3,
    steps_per_stage=6,
    refine_finished=False,
    record_proposals=True,
)
NUM_CHAINS, NUM_SLOTS = 7, 5
PROMPT_OF_CHAIN = np.arange(NUM_CHAINS) % 3
POWER = np.array([4.0, 2.0, 4.0, 1.0, 2.0, 3.0, 2.0])
# The last two chains are outside of certain rejection's range: above it and below it.
TEMPERATURE = 1 / np.array([4.0, 2.0, 1.3, 1.0, 1.5, 3.3, 0.7])
CUT_POWER = np.array([4.0, 1.0, 0.0, 2.0, 1.0, 1.0, 4.0])
UNIFORM_MIX = np.array([0.1, 0.0, 0.0, 1.0, 0.2, 0.05, 0.0])
CHAINS = Chains(
    PROMPTS[PROMPT_OF_CHAIN],
    LENGTHS[PROMPT_OF_CHAIN],
    prompt_ids=PROMPT_OF_CHAIN.astype(np.int32),
    chain_ids=np.arange(NUM_CHAINS, dtype=np.int32),
    tuning=make_tuning(NUM_CHAINS, POWER, TEMPERATURE, CUT_POWER, UNIFORM_MIX),
)


def run_engine(seed=0, config=CONFIG, model=MODEL, params=None):
    """More chains than slots at first, free slots that work ahead at last."""
    params = params or make_params(num_chains=NUM_SLOTS, num_slots=config.num_slots)
    finished = {}
    updates = run_queue(jax.random.key(seed), model, params, CHAINS, config, NUM_SLOTS, 4)
    for update in updates:
        finished |= update.finished
    return jax.tree.map(np.asarray, assemble([finished[row] for row in range(NUM_CHAINS)]))


def run_lockstep(seed=0, config=CONFIG, params=None):
    result = compiled.run(
        jax.random.key(seed),
        params or make_params(num_chains=NUM_CHAINS, num_slots=config.num_slots),
        *CHAINS,
        model=MODEL,
        config=config,
    )
    return jax.tree.map(np.asarray, result)


def is_ended(tokens):
    return len(tokens) > 0 and tokens[-1] == EOS


class Completion:
    """What float64 tables of the model say of a completion [n] of a chain."""

    def __init__(self, chain, tokens):
        start = CHAINS.prompt_lengths[chain]
        text = np.concatenate([CHAINS.prompts[chain, :start], tokens])
        slots = start + np.arange(len(tokens))
        nodes = [hashed_model.table_rows(text[None], np.array([slot - 1]))[0] for slot in slots]
        law = enumeration.truncated_law(TABLE[nodes].astype(np.float64), CONFIG.top_k)
        proposal_law = enumeration.proposal_law(law, TEMPERATURE[chain])
        at_tokens = np.arange(len(tokens)), tokens
        assert (law[at_tokens] > 0).all()
        self.log_prob = np.log(law[at_tokens])
        self.log_weight = POWER[chain] * self.log_prob - np.log(proposal_law[at_tokens])
        self.entropy = enumeration.entropy(law)


def log_cut(chain, entropy, cut):
    """Log of the cut's probability, of recorded entropies: equal ones must not differ by a bit."""
    cuts = oracle.cut_probabilities(
        np.asarray(entropy, np.float64), CUT_POWER[chain], UNIFORM_MIX[chain]
    )
    return np.log(cuts[cut - 1])


def steps_of(result):
    """Stage and step from 0, chain, and the records of every attempted step."""
    for place in map(tuple, np.argwhere(result.info.attempted)):
        yield *place, jax.tree.map(operator.itemgetter(place), result.info)


def check_step(chain, info, horizon, config=CONFIG):
    """Asserts what one record says, by the tables."""
    move, close = info.proposal, functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5)
    current = move.current_tokens[: info.current_length]
    proposal = move.proposal_tokens[: info.proposal_length]
    assert not move.current_tokens[info.current_length :].any()
    assert not move.current_entropy[info.current_length :].any()
    assert not move.proposal_tokens[info.proposal_length :].any()
    assert not move.proposal_entropy[info.proposal_length :].any()
    old, new = Completion(chain, current), Completion(chain, proposal)
    close(move.current_entropy[: info.current_length], old.entropy)
    close(move.proposal_entropy[: info.proposal_length], new.entropy)

    shared = min(len(current), len(proposal))
    differ = np.flatnonzero(current[:shared] != proposal[:shared])
    first = differ[0] + 1 if differ.size else 0
    assert info.divergence == first
    assert 1 <= info.cut <= (first or len(current))
    divergence = first - 1 if first else shared
    close(move.weight_new, new.log_weight[divergence:].sum())
    close(move.weight_old, old.log_weight[divergence:].sum())
    new_cut = log_cut(chain, move.proposal_entropy[: info.proposal_length], info.cut)
    old_cut = log_cut(chain, move.current_entropy[: info.current_length], info.cut)
    close(move.cut_change, new_cut - old_cut)
    terms = move.weight_new - move.weight_old + move.cut_change
    np.testing.assert_allclose(info.log_ratio, terms, rtol=1e-5, atol=1e-5)

    assert move.log_uniform <= 0
    assert info.accepted == (info.log_ratio >= move.log_uniform)
    assert move.stopped == (not is_ended(proposal) and len(proposal) < horizon)
    assert not (move.stopped and (info.accepted or not config.early_rejection))
    after = new if info.accepted else old
    close(info.log_prob, after.log_prob.sum())
    close(info.mean_entropy, after.entropy.mean())


def check_continuity(result):
    """Asserts that each step starts where the one before it ended, and the trace is the last."""
    before = {}
    for stage, step, chain, info in steps_of(result):
        move = info.proposal
        current = move.current_tokens[: info.current_length].tolist()
        if step:
            assert before[chain] == (current, move.current_entropy.tolist())
        elif stage:
            assert before[chain][0] == current[: len(before[chain][0])]
        length = info.proposal_length if info.accepted else info.current_length
        tokens = move.proposal_tokens if info.accepted else move.current_tokens
        entropy = move.proposal_entropy if info.accepted else move.current_entropy
        before[chain] = tokens[:length].tolist(), entropy.tolist()
    for chain, (tokens, _) in before.items():
        start = CHAINS.prompt_lengths[chain]
        completion = result.trace.tokens[chain, start : result.trace.length[chain]]
        assert completion[: len(tokens)].tolist() == tokens


def check_chains(result):
    """Asserts the fields that a frozen chain has too, and that it has no others."""
    for chain, length in enumerate(result.trace.length):
        completion = result.trace.tokens[chain, CHAINS.prompt_lengths[chain] : length]
        expected = Completion(chain, completion)
        log_prob, entropy = expected.log_prob.sum(), expected.entropy.mean()
        attempted = result.info.attempted[..., chain]
        last = np.flatnonzero(attempted.ravel())[-1]
        np.testing.assert_allclose(
            result.info.log_prob[..., chain].ravel()[last:], log_prob, rtol=1e-5, atol=2e-5
        )
        np.testing.assert_allclose(
            result.info.mean_entropy[..., chain].ravel()[last:], entropy, rtol=1e-5, atol=2e-5
        )
    zeroed = result.info._replace(log_prob=np.zeros(()), mean_entropy=np.zeros(()))
    for leaf in jax.tree.leaves(zeroed):
        assert not leaf.ndim or not leaf[~result.info.attempted].any()


def check(result, config=CONFIG):
    for stage, _, chain, info in steps_of(result):
        check_step(chain, info, (stage + 1) * config.stage_length, config)
    check_continuity(result)
    check_chains(result)
