"""A data set described for people: what is in it, what was left out, and how to make it again."""

from data_shards.card.page import write_card

__all__ = ["write_card"]
