"""Entropy-Cut Metropolis-Hastings: sampling language models from p^power, in JAX."""

from ecmh_jax.base import (
    Config,
    Info,
    LanguageModel,
    Result,
    State,
    Stats,
    Trace,
    Tuning,
)
from ecmh_jax.ecmh import build_extend, build_kernel, init
from ecmh_jax.sampling import SAMPLERS, sample
from ecmh_jax.tuning import make_tuning

__version__ = "0.1.0"

__all__ = [
    "SAMPLERS",
    "Config",
    "Info",
    "LanguageModel",
    "Result",
    "State",
    "Stats",
    "Trace",
    "Tuning",
    "build_extend",
    "build_kernel",
    "init",
    "make_tuning",
    "sample",
]
