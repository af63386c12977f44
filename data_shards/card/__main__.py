"""Cards of data sets that are built: `python -m data_shards.card data=demo [only=a,b] [KEY=VALUE]`.

`make shards` writes each data set's card; this writes them again, and ROOT/card.html over all.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from data_shards.card.overview import write_overview
from data_shards.card.page import HTML, write_card
from data_shards.manifest import FILE_NAME


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    from conf.compose import compose  # Hydra is for commands only

    only, overrides = "", []
    for word in arguments:
        key, _, value = word.partition("=")
        if key == "only":
            only = value.strip("[]")
        else:
            overrides.append(word)
    try:
        data = compose(overrides).data
        chosen = [name.strip() for name in only.split(",") if name.strip()] or list(data.sources)
        root = Path(data.root)
        built = [name for name in chosen if (root / name / FILE_NAME).exists()]
        if not built:
            raise ValueError(
                f"{root} has none of {', '.join(chosen)}; build them first (make shards)"
            )
        for name in built:
            write_card(root / name, name)
            print(root / name / HTML, flush=True)
        print(write_overview(root, data.sources))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
