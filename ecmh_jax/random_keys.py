"""Random numbers that depend on who a chain is and what it is doing, and on nothing else.

A chain's key is ``fold_in(fold_in(seed, prompt_id), chain_id)``; every draw then folds in
(stage, step, purpose, position). Neither a chain's slot, nor its neighbours, nor the order in which
an engine happens to work can change a draw. Keys are typed threefry keys: under ``vmap`` they give
the same bits as alone, which ``rbg`` keys do not.
"""

import jax
import jax.numpy as jnp

_CUT, _ACCEPT, _STAY, _TOKEN, _GROUP = range(5)  # purposes
_NO_POSITION = 0  # of the draws that belong to a step as a whole


def chain_keys(rng_key: jax.Array, prompt_id: jax.Array, chain_id: jax.Array) -> jax.Array:
    """Returns the chains' keys [B] of a run's scalar key and their identities [B] int32."""

    def one_chain(prompt, chain):
        return jax.random.fold_in(jax.random.fold_in(rng_key, prompt), chain)

    return jax.vmap(one_chain)(prompt_id, chain_id)


def step_keys(keys: jax.Array, stage: jax.Array, step: jax.Array) -> jax.Array:
    """Folds stage and step [B] int32 into chain keys [B]; step 0 is the stage's extension."""

    def one_chain(key, stage, step):
        return jax.random.fold_in(jax.random.fold_in(key, stage), step)

    return jax.vmap(one_chain)(keys, stage, step)


def _uniforms(key: jax.Array, purpose: int, position: int | jax.Array) -> jax.Array:
    """[2] float32 in [0, 1), from the two words of one threefry hash.

    The folded key itself is the random number: nothing else is ever drawn from it. Position comes
    last, so that a number for each slot costs one hash a slot.
    """
    words = jax.random.key_data(jax.random.fold_in(jax.random.fold_in(key, purpose), position))
    return (words >> 8).astype(jnp.float32) * 2.0**-24


def cut_uniform(keys: jax.Array) -> jax.Array:
    """[B] float32 in [0, 1): chooses the cut."""
    return jax.vmap(lambda key: _uniforms(key, _CUT, _NO_POSITION)[0])(keys)


def accept_uniform(keys: jax.Array) -> jax.Array:
    """[B] float32 in [0, 1): decides acceptance; drawn before the proposal."""
    return jax.vmap(lambda key: _uniforms(key, _ACCEPT, _NO_POSITION)[0])(keys)


def stay_uniform(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, N] float32 in [0, 1): whether a coupled draw keeps its token; ``positions`` [B, N]."""

    def one_chain(key, chain_positions):
        return jax.vmap(lambda position: _uniforms(key, _STAY, position)[0])(chain_positions)

    return jax.vmap(one_chain)(keys, positions)


def token_uniforms(keys: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, 2] float32 in [0, 1): draws the token at ``positions`` [B]."""
    return jax.vmap(lambda key, position: _uniforms(key, _TOKEN, position))(keys, positions)


def group_uniform(keys: jax.Array, position: int | jax.Array) -> jax.Array:
    """[B] float32 in [0, 1): a group's own draw, told apart by ``position``, int or [B]."""
    positions = jnp.broadcast_to(position, keys.shape)
    return jax.vmap(lambda key, at: _uniforms(key, _GROUP, at)[0])(keys, positions)
