"""What the commands of this room share: help, one-line errors, exit codes."""

import os
import sys
from collections.abc import Callable, Sequence

from slurm.local import JobFailed

USAGE = 2  # exit code of a command that was given nothing to do


def run(
    body: Callable[[list[str]], int | None],
    arguments: Sequence[str] | None,
    usage: str | None,
    needs_words: bool = True,
    interrupted: str = "interrupted; the same command goes on",
) -> int:
    """Exit code of `body(words)`, which may return one; what a user can mend becomes one line.

    Args:
        arguments: words of the command line; those of this process where None.
        usage: printed for --help, and where `needs_words` and there are none.
        interrupted: what Ctrl-C says.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if (needs_words and not words) or words[:1] in (["-h"], ["--help"]):
        print(usage)
        return 0 if words else USAGE
    try:
        code = body(words) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"error: {interrupted}", file=sys.stderr)
        return 130
