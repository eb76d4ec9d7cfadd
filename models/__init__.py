"""Flax networks and how to get them."""
