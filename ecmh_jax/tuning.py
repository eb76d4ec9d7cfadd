"""The one constructor of ``Tuning``: checks ranges and casts once, which prevents retraces."""

import jax.numpy as jnp
import numpy as np

from ecmh_jax.base import Tuning

_LEAST_TEMPERATURE = 1e-30  # below it, 1/tau is not a float32


def make_tuning(
    num_chains: int,
    power=4.0,
    proposal_temperature=None,
    cut_power=4.0,
    uniform_mix=0.0,
) -> Tuning:
    """Builds per-chain numbers from scalars or arrays of ``num_chains`` values.

    Args:
      num_chains: B, >= 1.
      power: alpha of the target p^alpha, > 0; the paper uses 4, and 5 for code.
      proposal_temperature: tau of the proposal, > 0; None for 1/power, the choice that makes the
        log-weight of a token independent of the token. Certain rejection applies to chains with
        1 <= 1/tau <= power and is off for the others.
      cut_power: beta of the cut law, >= 0; 0 cuts uniformly.
      uniform_mix: share of uniform cuts, 0..1.

    Returns:
      float32 arrays [B].

    Raises:
      ValueError: a value is out of range or has the wrong shape.
    """
    if num_chains < 1:
        raise ValueError(f"num_chains is {num_chains}; expected at least 1")

    def as_array(name, value, valid, expected):
        array = np.asarray(value, np.float32)
        if array.shape not in ((), (num_chains,)):
            raise ValueError(
                f"{name} has shape {array.shape}; expected a scalar or ({num_chains},), "
                "one number a chain"
            )
        if not np.all(np.isfinite(array) & valid(array)):
            raise ValueError(f"{name} is {value}; expected {expected}")
        return np.broadcast_to(array, (num_chains,))

    power = as_array("power", power, lambda value: value > 0, "a number > 0")
    if proposal_temperature is None:
        inverse_temperature = power
    else:
        as_array(
            "proposal_temperature",
            proposal_temperature,
            lambda value: value >= _LEAST_TEMPERATURE,
            f"a number > 0, at least {_LEAST_TEMPERATURE}",
        )
        # In float64: rounded twice, 1/tau would often miss power by a bit, and with it the range of
        # certain rejection.
        exact = 1.0 / np.asarray(proposal_temperature, np.float64)
        inverse_temperature = np.broadcast_to(exact.astype(np.float32), (num_chains,))
    return Tuning(
        power=jnp.asarray(power),
        inverse_temperature=jnp.asarray(inverse_temperature),
        cut_power=jnp.asarray(
            as_array("cut_power", cut_power, lambda value: value >= 0, "a number >= 0")
        ),
        uniform_mix=jnp.asarray(
            as_array(
                "uniform_mix",
                uniform_mix,
                lambda value: (value >= 0) & (value <= 1),
                "a number in 0..1",
            )
        ),
    )
