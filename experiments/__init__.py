"""Launchers: a short main over a tested function of one frozen config."""
