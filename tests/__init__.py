"""Tests of ecmh_jax, and the exact oracles that they compare it with."""
