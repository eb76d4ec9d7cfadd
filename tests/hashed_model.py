"""A small model whose laws are looked up by a hash of the prefix, and runs of it.

Unlike the tables of ``toy_models`` it reads its prompts, which may be ragged, and its completions
may be long. Its cache is its tokens, so a stale row shows as the logits of another prefix.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax import Config, LanguageModel, compiled, make_tuning, sample
from tests import enumeration
from tests.toy_models import random_toy_model

VOCABULARY_SIZE = 11  # V
PROMPT_SLOTS = 3  # P
EOS = 4
PAD = 7  # a token like any other, so that padding cannot pass for zeros
# The rows of a toy model serve as laws.
TABLE = random_toy_model(np.random.default_rng(2), VOCABULARY_SIZE, 3).logits
TABLE[:, EOS] = np.median(TABLE, axis=1) + 0.5
TABLE = TABLE.astype(np.float32)


def table_rows(tokens, positions):
    """Row of ``TABLE`` with the logits after slot ``positions`` [B] of ``tokens`` [B, T]."""
    slots = np.arange(tokens.shape[1])
    summands = (tokens + 1) * (slots * slots + 3)[None]
    return (summands * (slots[None] <= positions[:, None])).sum(axis=-1) % len(TABLE)


def init_cache(batch_size, num_slots):
    return jnp.zeros((batch_size, num_slots), jnp.int32)


def logits_after(params, positions, cache):
    fault = params["fault"][jnp.arange(cache.shape[0]), positions]
    return params["logits"][table_rows(cache, positions)] + fault[:, None]


def prefill(params, tokens, lengths, cache):
    cache = cache.at[:, : tokens.shape[1]].set(tokens)
    return logits_after(params, lengths - 1, cache), cache


def decode(params, tokens, positions, cache):
    cache = cache.at[jnp.arange(cache.shape[0]), positions].set(tokens)
    return logits_after(params, positions, cache), cache


MODEL = LanguageModel(init_cache, prefill, decode)
CONFIG = Config(
    prompt_length=PROMPT_SLOTS,
    max_new_tokens=6,  # T = 9
    num_stages=2,
    steps_per_stage=3,
    top_k=5,
    eos_ids=(EOS,),
    pad_id=PAD,
    refine_finished=True,
)
PROMPTS = np.array([[2, 9, 0], [5, 3, 8], [1, 6, EOS]], np.int32)  # the last one ends in EOS
LENGTHS = np.array([2, 1, 3], np.int32)
TUNING = make_tuning(3, [4.0, 2.0, 1.0], [0.25, 0.4, 0.8], 1.0, [0.0, 0.1, 1.0])


def make_params(fault=None, num_chains=3, num_slots=CONFIG.num_slots):
    """Weights; ``fault`` [B, T] is added to all logits that follow a chain's slot."""
    fault = np.zeros((num_chains, num_slots)) if fault is None else fault
    return {"logits": jnp.asarray(TABLE), "fault": jnp.asarray(fault, jnp.float32)}


def run(seed=0, **changes):
    """``sample`` with the settings above, except for ``changes``."""
    arguments = {
        "rng_key": jax.random.key(seed),
        "model": MODEL,
        "params": make_params(),
        "prompts": PROMPTS,
        "prompt_lengths": LENGTHS,
        "tuning": TUNING,
        "config": CONFIG,
    }
    return jax.tree.map(np.asarray, sample(**(arguments | changes)))


def run_lockstep(seed=0, tuning=TUNING, config=CONFIG, params=None):
    """The reference that ``run`` is compared with: every chain takes the same step together."""
    identity = np.arange(len(PROMPTS), dtype=np.int32)
    result = compiled.run(
        jax.random.key(seed),
        make_params() if params is None else params,
        PROMPTS,
        LENGTHS,
        np.zeros_like(identity),
        identity,
        tuning,
        model=MODEL,
        config=config,
    )
    return jax.tree.map(np.asarray, result)


def rows_of(result, rows):
    """The chains ``rows`` of a Result: info has the chain axis last, the rest first."""
    others = jax.tree.map(lambda leaf: leaf[rows], result._replace(info=None))
    return others._replace(info=jax.tree.map(lambda leaf: leaf[..., rows], result.info))


def assert_same(result, expected):
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def assert_valid(trace, tuning, config, prompts, lengths, finite=None):
    """Asserts that traces hold what their tokens say, by float64 tables of the model."""
    tokens = trace.tokens
    finite = np.ones(len(tokens), bool) if finite is None else finite
    for row, (first, end) in enumerate(zip(lengths, trace.length, strict=True)):
        np.testing.assert_array_equal(tokens[row, :first], prompts[row, :first])
        completion = tokens[row, first:end]
        assert len(completion) <= config.max_new_tokens
        ends = np.isin(completion, config.eos_ids)
        assert not ends[:-1].any()
        assert not finite[row] or len(completion) == config.max_new_tokens or ends[-1:].any()
        np.testing.assert_array_equal(tokens[row, end:], config.pad_id)
        nodes = [table_rows(tokens[row : row + 1], np.array([s - 1]))[0] for s in range(first, end)]
        p = enumeration.truncated_law(TABLE[nodes].astype(np.float64), config.top_k)
        temperature = 1.0 / float(tuning.inverse_temperature[row])
        q = enumeration.proposal_law(p, temperature) if nodes else p
        at_token = (np.arange(len(nodes)), completion)
        log_prob, log_q = np.log(p[at_token]), np.log(q[at_token])
        for values, expected in (
            (trace.log_prob, log_prob),
            (trace.log_q, log_q),
            (trace.log_weight, float(tuning.power[row]) * log_prob - log_q),
            (trace.entropy, enumeration.entropy(p)),
        ):
            np.testing.assert_allclose(values[row, first:end], expected, rtol=1e-5, atol=1e-5)
            assert not values[row, :first].any()
            assert not values[row, end:].any()


def start():
    """``init`` with the settings above."""
    identity = jnp.arange(3, dtype=jnp.int32)
    prompts, lengths = jnp.asarray(PROMPTS), jnp.asarray(LENGTHS)
    return compiled.init(
        MODEL, make_params(), prompts, lengths, jnp.zeros_like(identity), identity, CONFIG
    )


def host_loop(config, seed=0, tuning=TUNING, faults=None):
    """The schedule as a loop on the host: states and infos (None for an extension) by step.

    ``faults`` maps the index of a step to the weights used in that step alone. ``extend`` is always
    that of the default switches, which spares compilations: they are about proposals.
    """
    key = jax.random.key(seed)
    default = dataclasses.replace(CONFIG, refine_finished=config.refine_finished)
    refining = dataclasses.replace(config, refine_finished=True)  # the kernel does not ask
    state = start()
    states, infos = [], []
    for _ in range(config.num_stages):
        for step in range(config.steps_per_stage + 1):
            params = (faults or {}).get(len(states), make_params())
            if step == 0:
                info = None
                state = compiled.extend(key, state, params, tuning, model=MODEL, config=default)
            else:
                state, info = compiled.kernel(
                    key, state, params, tuning, model=MODEL, config=refining
                )
            # Copied, because the next call consumes the state.
            states.append(jax.tree.map(np.array, state))
            infos.append(info if info is None else jax.tree.map(np.array, info))
    return states, infos


def fault_at(row, slot, value):
    fault = np.zeros((3, CONFIG.num_slots))
    fault[row, slot] = value
    return make_params(fault)


# power, 1 / tau: at 1 / power, elsewhere in the range of certain rejection, outside of it.
SWITCH_TUNINGS = {
    "at_inverse_power": ([1.0, 2.0, 4.0], [1.0, 2.0, 4.0]),
    "in_range": ([2.0, 4.0, 4.0], [1.3, 1.0, 2.0]),
    "outside": ([1.0, 2.0, 4.0], [3.0, 0.6, 0.5]),
}
