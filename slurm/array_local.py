"""An array on this machine: its elements here, some at a time, each with its log.

Ctrl-C or SIGTERM lets the items in progress end; a second one ends them.
"""

import shlex
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from conf.schema import Config
from slurm import local
from slurm.array_element import STOPPED, Stop, run_element
from slurm.array_items import FAILED, Item, TaskFolder, Wave
from slurm.array_process import Ending, Processes

NAMED = 5  # failed items that the last line lists


def run(config: Config, folder: TaskFolder, wave: Wave, at_once: int, ranks: bool) -> None:
    """Run a wave to its end; with `ranks`, items one after the other on the layout's processes.

    Raises JobFailed when items failed, or a signal stopped it.
    """
    stop, processes = Stop(), Processes()
    directory = folder.wave(wave.number)

    def element(index: int) -> int:
        with open(directory / f"log_{index}.out", "ab", buffering=0) as log:

            def start(item: Item) -> Ending:
                log.write(f"[{item.name}] {shlex.join(item.words)}\n".encode())
                return processes.run(item, log)

            return run_element(folder, wave, index, stop, start)

    def on_ranks(index: int) -> int:
        def start(item: Item) -> Ending:
            return _run_ranks(config, item, directory / item.name, stop)

        return run_element(folder, wave, index, stop, start)

    before = stop.listen(again=processes.terminate)
    numbers = range(len(wave.elements))
    try:
        if ranks:  # in this thread: the ranks' launcher forwards signals itself
            codes = [on_ranks(index) for index in numbers]
        else:
            with ThreadPoolExecutor(at_once) as pool:
                codes = list(pool.map(element, numbers))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop.reason:
        raise local.JobFailed(f"{stop.reason}; the same command goes on", STOPPED)
    if any(codes):
        items = [item for element in wave.elements for item in element]
        failed = [item.name for item in items if not folder.is_done(item)]
        named = ", ".join(failed[:NAMED]) + (", ..." if len(failed) > NAMED else "")
        raise local.JobFailed(
            f"{len(failed)} items failed: {named}; see {folder.root / FAILED} and the logs in "
            f"{directory}; the same command tries them again"
        )
    print(f"{wave.task}: {sum(map(len, wave.elements))} items done", flush=True)


def _run_ranks(config: Config, item: Item, directory: Path, stop: Stop) -> Ending:
    directory.mkdir(exist_ok=True)
    try:
        program = [sys.executable, "-m", *item.words]
        local.run(config, directory / "config.yaml", directory, program)
    except local.JobFailed as error:
        if error.code in local.STOPPED_CODES:
            stop.ask("interrupted")
        return Ending(error.code, str(error))
    return Ending(0, local.last_line(directory / "log.out"))
