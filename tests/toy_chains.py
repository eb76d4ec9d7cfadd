"""Batches of the library's chains placed on known states of a toy model."""

import jax.numpy as jnp
import numpy as np

from ecmh_jax import transition
from ecmh_jax.base import Config, State, Trace, Tuning
from tests import enumeration
from tests.toy_models import ToyModel, toy_language_model

NUM_PROMPT_TOKENS = 2
PROMPT_SLOTS = 3  # one slot of padding, so that slots and positions in the padded prompt differ


def toy_config(model: ToyModel, **settings) -> Config:
    """A configuration whose last horizon is the model's."""
    settings = {"num_stages": 1, "steps_per_stage": 1, "top_k": None} | settings
    return Config(
        prompt_length=PROMPT_SLOTS,
        max_new_tokens=model.horizon,
        eos_ids=(model.eos_id,),
        **settings,
    )


def toy_prompts(num_chains: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts [B, P] that differ from row to row, and their lengths [B]."""
    prompts = np.arange(num_chains * PROMPT_SLOTS, dtype=np.int32) % 2
    lengths = np.full(num_chains, NUM_PROMPT_TOKENS, np.int32)
    return prompts.reshape(num_chains, PROMPT_SLOTS), lengths


def state_on(
    model: ToyModel,
    space: enumeration.StateSpace,
    rows: np.ndarray,
    config: Config,
    tuning: Tuning,
) -> State:
    """Chains in the last stage whose current traces are ``space.states[rows]``."""
    num_chains = len(rows)
    language_model, params = toy_language_model(model, NUM_PROMPT_TOKENS)
    prompts, lengths = toy_prompts(num_chains)
    identity = jnp.arange(num_chains)
    # Prefilled side by side: row by row, as a run does it, is slow for so many.
    _, cache = language_model.prefill(
        params, prompts, lengths, language_model.init_cache(num_chains, config.num_slots)
    )
    state = transition.empty_state(
        cache,
        jnp.asarray(prompts),
        jnp.asarray(lengths),
        jnp.zeros_like(identity),
        identity,
        config,
    )
    law = enumeration.laws(
        model,
        float(tuning.power[0]),
        1.0 / float(tuning.inverse_temperature[0]),
        config.top_k,
    )
    nodes, tokens, live = space.nodes[rows], space.tokens[rows], space.live[rows]
    first = NUM_PROMPT_TOKENS

    def place(array, values):
        values = np.where(live, values, 0)
        return array.at[:, first : first + values.shape[1]].set(values.astype(array.dtype))

    trace = state.trace
    return state._replace(
        trace=Trace(
            tokens=place(trace.tokens, tokens),
            length=jnp.asarray(lengths + space.lengths[rows], jnp.int32),
            log_prob=place(trace.log_prob, law.log_p[nodes, tokens]),
            log_q=place(trace.log_q, law.log_q[nodes, tokens]),
            log_weight=place(trace.log_weight, law.log_weight[nodes, tokens]),
            entropy=place(trace.entropy, law.entropy[nodes]),
        ),
        cache=place(state.cache, tokens),
        stage=jnp.full((num_chains,), config.num_stages, jnp.int32),
    )


def rows_of(trace: Trace, space: enumeration.StateSpace) -> np.ndarray:
    """The row of ``space.states`` that each chain's completion is, [B]; -1 if it is none."""
    tokens, lengths = np.asarray(trace.tokens), np.asarray(trace.length)
    index = {state: row for row, state in enumerate(space.states)}
    completions, inverse = np.unique(
        np.concatenate([lengths[:, None], tokens[:, NUM_PROMPT_TOKENS:]], axis=1),
        axis=0,
        return_inverse=True,
    )
    rows = [
        index.get(tuple(completion[1 : 1 + completion[0] - NUM_PROMPT_TOKENS].tolist()), -1)
        for completion in completions
    ]
    return np.asarray(rows)[inverse.reshape(-1)]
