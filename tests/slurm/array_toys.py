"""What the tests of arrays share: items, waves, a folder and a configuration."""

from slurm.array_items import Item, Wave


def item(name: str, *words: str, **fields: object) -> Item:
    return Item(name, words or ("this",), **fields)  # type: ignore[arg-type]


def wave_of(*elements: tuple[Item, ...], number: int = 1, submission: int = 1) -> Wave:
    return Wave("commands", number, submission, ("task=commands",), 1, 1.0, elements)
