"""Measurements: what is compared with what, and how a figure becomes a row of a table."""

import pipeline  # noqa: F401  # before Megatron, whose warnings it silences
