"""What every command under tools/ shares: `key=value` arguments and one-line errors."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def split_arguments(
    arguments: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """`key=value` words -> (those whose key is in `names`, all others as Hydra overrides).

    Raises ValueError for a word without `=` or a name given twice.
    """
    ours: dict[str, str] = {}
    overrides: list[str] = []
    for word in arguments:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            raise ValueError(f"argument {word!r} is not of the form key=value")
        if key not in names:
            overrides.append(word)
        elif key in ours:
            raise ValueError(f"argument {key}= is given twice; keep one")
        else:
            ours[key] = value
    return ours, overrides


def required(arguments: dict[str, str], name: str, usage: str) -> Path:
    """The path given as `name=`; ValueError with the usage line when it is absent."""
    if not arguments.get(name):
        raise ValueError(f"{name}= is missing; usage: {usage}")
    return Path(arguments[name])


def run(main: Callable[[list[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Exit status of `main`; what a user can mend becomes one line on stderr, no traceback."""
    try:
        main(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted; what was finished is kept, run the same command again", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0
