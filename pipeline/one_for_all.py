"""Work that one rank does while the others wait, however long it takes.

A collective that waits for an hour of planning would run into its time limit, and one that waits
for a rank that failed would wait for all of it. So rank 0 works in a thread, and all ranks
exchange a word every few seconds: still at it, done, or what went wrong.
"""

import threading
from collections.abc import Callable

import torch.distributed as dist

SECONDS = 5.0  # between two words


def one_for_all(work: Callable[[], str], seconds: float = SECONDS) -> str:
    """Rank 0 does `work`; all ranks return what it returned.

    Raises:
        ValueError, OSError: on rank 0 what `work` raised, on the others a ValueError with the same
            message.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return work()
    results: list[str] = []
    errors: list[BaseException] = []

    def attempt() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again below
            errors.append(error)

    leads = dist.get_rank() == 0
    thread = threading.Thread(target=attempt, name="one_for_all", daemon=True)
    if leads:
        thread.start()
    wait = min(0.05, seconds)
    while True:
        word: list[tuple[str, str] | None] = [None]
        if leads:
            thread.join(wait)
            if errors:
                word[0] = ("error", str(errors[0]) or type(errors[0]).__name__)
            elif results:
                word[0] = ("done", results[0])
        dist.broadcast_object_list(word, src=0)
        if word[0] is not None:
            break
        wait = min(2 * wait, seconds)
    if errors:
        raise errors[0]
    outcome, text = word[0]
    if outcome == "error":
        raise ValueError(f"rank 0: {text}")
    return text
