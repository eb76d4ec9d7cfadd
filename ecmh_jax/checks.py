"""Checks on the host, before anything is traced: each names the value and what was expected.

Past its end a cache write lands in the last slot, and an unknown token id reads the last row, both
without an error: lengths and ids have to be right before the first step.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ecmh_jax.base import Config, LanguageModel, Params, Tuning


def check_config(config: Config) -> None:
    """Raises ValueError unless the schedule and the switches make sense together."""
    for name, least in (
        ("prompt_length", 1),
        ("max_new_tokens", 1),
        ("num_stages", 1),
        ("steps_per_stage", 0),
    ):
        value = getattr(config, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")
    if not isinstance(config.eos_ids, tuple):
        raise ValueError(f"eos_ids is {config.eos_ids!r}; expected a tuple of token ids")
    if config.max_new_tokens % config.num_stages:
        raise ValueError(
            f"num_stages is {config.num_stages}; expected a divisor of max_new_tokens, "
            f"which is {config.max_new_tokens}"
        )
    if config.top_k is not None and config.top_k < 1:
        raise ValueError(
            f"top_k is {config.top_k}; expected at least 1, or None for the whole vocabulary"
        )


def check_vocabulary(model: LanguageModel, params: Params, config: Config, num_chains: int) -> int:
    """Returns V, read off the model without running it.

    Raises:
      ValueError: top_k, pad_id or an end-of-sequence id does not fit the vocabulary.
    """
    shape = jax.ShapeDtypeStruct((num_chains,), jnp.int32)

    def decode_once(params, tokens, positions):
        return model.decode(
            params, tokens, positions, model.init_cache(num_chains, config.num_slots)
        )[0]

    vocabulary_size = jax.eval_shape(decode_once, params, shape, shape).shape[-1]
    if config.top_k is not None and config.top_k > vocabulary_size:
        raise ValueError(
            f"top_k is {config.top_k}; expected at most the vocabulary's {vocabulary_size} tokens"
        )
    for name, token in (("pad_id", config.pad_id), *(("eos_ids", id_) for id_ in config.eos_ids)):
        if not 0 <= token < vocabulary_size:
            raise ValueError(
                f"{name} holds {token}; expected a token id in 0..{vocabulary_size - 1}"
            )
    return vocabulary_size


def check_prompt_shape(prompts, config: Config) -> int:
    """Returns B; raises ValueError unless the prompts are integers [B, config.prompt_length]."""
    prompts = np.asarray(prompts)
    if prompts.ndim != 2 or not len(prompts) or prompts.shape[1] != config.prompt_length:
        raise ValueError(
            f"prompts have shape {prompts.shape}; expected [chains, {config.prompt_length}], "
            "at least one chain, padded on the right to config.prompt_length"
        )
    if not np.issubdtype(prompts.dtype, np.integer):
        raise ValueError(f"prompts hold {prompts.dtype}; expected integer token ids")
    return len(prompts)


def check_integers(name: str, values, num_chains: int) -> None:
    """Raises ValueError unless ``values`` are one integer a chain."""
    values = np.asarray(values)
    if values.shape != (num_chains,) or not np.issubdtype(values.dtype, np.integer):
        raise ValueError(
            f"{name} are {values.dtype} of shape {values.shape}; expected integers of shape "
            f"({num_chains},), one a chain"
        )
    limits = np.iinfo(np.int32)
    if values.min() < limits.min or values.max() > limits.max:
        raise ValueError(f"{name} hold {values.min()}..{values.max()}; expected 32-bit integers")


def check_budget(sampler: str, budget, num_chains: int) -> None:
    """Raises ValueError unless the sampler takes budgets and each is at least 1."""
    if sampler != "best_of_n":
        raise ValueError(f"budget is given for sampler {sampler!r}; expected None: only best_of_n")
    check_integers("budget", budget, num_chains)
    if np.asarray(budget).min() < 1:
        raise ValueError(f"budget holds {np.asarray(budget).min()}; expected at least 1")


def check_prompts(prompts, prompt_lengths, config: Config, vocabulary_size: int) -> None:
    """Raises ValueError unless every prompt is live, fits its slots and uses known tokens."""
    num_chains = check_prompt_shape(prompts, config)
    check_integers("prompt_lengths", prompt_lengths, num_chains)
    prompts, prompt_lengths = np.asarray(prompts), np.asarray(prompt_lengths)
    for row, length in enumerate(prompt_lengths):
        if not 1 <= length <= config.prompt_length:
            raise ValueError(
                f"prompt {row} has {length} tokens; expected 1..{config.prompt_length}: "
                "a prompt may not be empty, nor longer than config.prompt_length"
            )
        live = prompts[row, :length]
        if live.min() < 0 or live.max() >= vocabulary_size:
            bad = live[(live < 0) | (live >= vocabulary_size)][0]
            raise ValueError(
                f"prompt {row} holds token id {bad}; expected 0..{vocabulary_size - 1}"
            )


def check_tuning(tuning: Tuning, num_chains: int) -> None:
    """Raises ValueError unless every field is a float32 array with one number a chain."""
    for name, value in tuning._asdict().items():
        value = np.asarray(value)
        if value.shape != (num_chains,) or value.dtype != np.float32:
            raise ValueError(
                f"tuning.{name} is {value.dtype}{list(value.shape)}; expected "
                f"float32[{num_chains}]: build it with make_tuning({num_chains})"
            )


def check_key(rng_key) -> None:
    """Raises ValueError unless the key is a scalar typed threefry key."""
    expected = "expected a scalar typed threefry key, as jax.random.key(seed) makes"
    if not (isinstance(rng_key, jax.Array) and jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)):
        raise ValueError(f"rng_key is {rng_key!r}; {expected}")
    if rng_key.shape != ():
        raise ValueError(f"rng_key has shape {rng_key.shape}; {expected}")
    if "threefry" not in str(jax.random.key_impl(rng_key)):
        raise ValueError(
            f"rng_key is a {jax.random.key_impl(rng_key)} key; {expected}: other kinds give a "
            "chain other bits in another batch"
        )
