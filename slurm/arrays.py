"""Work that can be done in any order, as an array of batch jobs; without Slurm, here.

    python -m slurm.arrays task=validate run=demo data=demo cluster=slurm [throttle=8] [KEY=VALUE]
    python -m slurm.arrays continue WAVE_DIRECTORY      # what the last job of a wave runs

task= is shards, validate, reference, evaluate or commands. What is done is not done again: the
same command submits what is missing, and only that.

    throttle=8     elements that run at once (on cluster=local items; 1 by default)
    elements=N     jobs of the array; by default few rounds of `throttle`, within the site's limits
    hours=H        walltime of an element
    dry=true       write the script and print the plan, ask Slurm nothing
    test_only=true write it and ask `sbatch --test-only`
    yes=true       do not ask, however many GPU-hours
    only=[a,b]     sources (shards, validate);  shards_per_item=8 (validate);  parts=8 (reference;
                   of shards: of each source, by its size)
    exports=[DIR,...] questions=[FILE,...] (evaluate);  file=FILE (commands)
"""

import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from conf.compose import compose, dump, load
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm import (
    array_cost,
    array_local,
    array_queue,
    array_waves,
    command_line,
    commands,
    queue_state,
    sbatch,
)
from slurm.array_items import FAILED, Item, TaskFolder, Wave, group, read_wave
from slurm.array_request import Request, parse, refuse_bad
from slurm.array_tasks import TASKS, Task, items_of
from slurm.chain import absolute
from slurm.errors import SlurmError
from slurm.exclude import read as excluded_nodes
from slurm.files import write_text
from slurm.job import Job
from slurm.limits import refuse_over_limits
from slurm.render import rank_command
from slurm.request import detect
from slurm.run_directory import RunDirectory, RunInUse

THROTTLE = 8
CONFIG = "config.yaml"
NAMED = 10  # items that a message lists
UNKNOWN_LIMIT = (
    "if this site limits the jobs that one may have queued, say how many, so that the array comes "
    "in waves: '+cluster.site.queues={QOS: {hours: HOURS, submitted: N}}'"
)
WAIT_SECONDS, TRIES = 30.0, 20  # a next wave waits for room in the queue


def submit(arguments: Sequence[str]) -> None:
    """Do what the command line asks. Raises ConfigError, OSError, or JobFailed."""
    request = parse(arguments)
    config = compose(request.overrides)
    task = TASKS[request.task]
    refuse_bad(config, task, request.dry)
    run = RunDirectory.of(config)
    _refuse_stopped(run, request.task)
    if config.cluster.executor == "local":
        with run.locked():
            _run_here(request, config, run)
        return
    if config.cluster.detect:
        try:
            config = replace(config, cluster=detect(config.cluster))
        except ConfigError as error:
            if not request.dry:
                raise
            print(f"note: {error}; the script is made from the settings alone", file=sys.stderr)
    with run.locked():
        _submit_wave(
            request, config, run, array_queue.Rows() if request.dry else array_queue.ask(run)
        )


def go_on(directory: Path) -> None:
    """Submit the rest after the wave in `directory`, from the snapshot, in a job of its own.

    Raises ConfigError where nothing of the wave was started, or items have failed too often.
    """
    wave = read_wave(directory)
    config, request = load(directory / CONFIG), parse(wave.arguments)
    run, folder = RunDirectory.of(config), TaskFolder(directory.parent)
    remedy = f"give the same command on a login node: {request.command}"
    if not array_waves.moved(folder, wave):
        reason = f"no item of wave {wave.number} was even started (logs: {directory})"
        folder.note(reason, request.command)
        raise ConfigError(f"{reason}; when the cause is mended, {remedy}")
    try:
        _refuse_stopped(run, request.task)
        for attempt in range(TRIES):
            try:
                with run.locked():
                    _submit_wave(request, config, run, array_queue.ask(run), wave)
                return
            except ConfigError as error:
                if attempt == TRIES - 1 or not _will_pass(error):
                    raise
                print(f"{error} (tried again in {WAIT_SECONDS:.0f} s)", flush=True)
                time.sleep(WAIT_SECONDS)
    except ConfigError as error:
        folder.note(str(error), request.command)
        if isinstance(error, LeftOut):
            raise
        raise ConfigError(f"{error}. The rest was not submitted from here; {remedy}") from error


def _refuse_stopped(run: RunDirectory, task: str) -> None:
    """ConfigError when somebody has stopped the run or this task with a STOP file."""
    stop = TaskFolder.of(run.root, task).stop_file()
    if stop is not None:
        raise ConfigError(f"{stop} is there: somebody has stopped this; remove the file to go on")


def _will_pass(error: ConfigError) -> bool:
    """Whether waiting may help: a full queue, somebody else's submission, a busy controller."""
    busy = isinstance(error, SlurmError) and error.cause == "unreachable"
    return busy or isinstance(error, NoRoom | RunInUse)


class NoRoom(ConfigError):
    """The site lets this user submit nothing more now."""


class LeftOut(ConfigError):
    """Everything else is done, and these items have failed too often."""


def _submit_wave(
    request: Request,
    config: Config,
    run: RunDirectory,
    rows: array_queue.Rows,
    before: Wave | None = None,
) -> None:
    """Submit a wave of what is neither done nor queued; `before` is that which this one follows."""
    task, root = TASKS[request.task], absolute(run)
    folder = TaskFolder.of(root, request.task)
    own_id = os.environ.get("SLURM_JOB_ID", "") if before else ""
    queued = array_queue.queued(folder, config, rows.of_run, own_id)
    release = array_queue.cut_short(run, rows, queued)
    items = items_of(request.task, config, request.asked, root)
    array_queue.refuse_other_settings(queued, items, folder.root)
    missing = folder.missing(items)
    left = [item for item in missing if item.name not in queued.items]
    out = array_waves.tried_too_often(folder, left, before.submission) if before else []
    left = [item for item in left if item.name not in out]
    state = f"{request.task}: {len(items)} items, {len(items) - len(missing)} done"
    state += f", {len(queued.items)} queued" if queued.items else ""
    if out:
        state += f", {len(out)} left out after two failures: {_some(out)}"
    if not left or queued.next_job:
        print(state)
        for job_id in release:
            commands.release(job_id)
            print(f"job {job_id} was held since its submission was cut short; it is released")
        (run.root / queue_state.SUBMITTING).unlink(missing_ok=True)
        if queued.next_job:
            print(f"job {queued.next_job} submits the rest when the queued elements have ended")
        elif out:
            raise LeftOut(
                f"{len(out)} items failed twice: {_some(out)}; see {folder.root / FAILED}"
            )
        elif not missing:
            print(f"nothing to do; the markers are in {folder.root / 'done'}")
        return
    number = max(array_queue.free_number(folder), queued.newest + 1)
    wave, jobs = _plan(request, config, folder, left, number, rows.of_user, queued.arrays, before)
    wave = replace(wave, left_out=tuple(out))
    print(f"{state}, {len(left)} to do")
    for line in array_cost.lines(wave, jobs[0], folder, config):
        print(line)
    refuse_over_limits(jobs, config, rows.of_user)
    if before is None and not (request.dry or request.test_only):
        array_cost.confirm(wave, jobs[0], folder, config, request.yes)
    if before is None:
        array_queue.take_snapshot(run, rows.of_run, request.dry)
    _write(config, task, wave, jobs[0].directory)
    if request.dry or request.test_only:
        _show(request, config, run, jobs)
        return
    try:
        submitted = sbatch.submit(jobs, config, run, excluded_nodes(run.root), release)
    except ConfigError as error:
        if array_waves.room(config, jobs[0].nodes, 0) is None and len(wave.elements) > 1:
            raise ConfigError(f"{error}; {UNKNOWN_LIMIT}") from error
        raise
    folder.note("")
    for record in submitted:
        print(f"queued: {record.job_id} {record.name}")
    if wave.waiting and len(jobs) == 1:
        print(
            "nothing is left in the queue for a job that submits the rest: give the same command "
            "again when these have ended"
        )


def _plan(
    request: Request,
    config: Config,
    folder: TaskFolder,
    left: Sequence[Item],
    number: int,
    queued: int,
    after: Sequence[str],
    before: Wave | None,
) -> tuple[Wave, list[Job]]:
    """The next wave and its jobs, within what the site lets one submit."""
    task, site = TASKS[request.task], config.cluster.site
    throttle = request.throttle or THROTTLE
    nodes = config.cluster.nodes(config.parallel.world_size) if task.ranks else 1
    room = array_waves.room(config, nodes, queued)
    if before is not None:
        size = before.per_element
    else:
        size = array_waves.items_per_element(
            len(left), request.elements, throttle, room, site.max_array_size
        )
    elements = group(left, size)
    share = array_waves.share(len(elements), room, site.max_array_size)
    if not share.now:
        raise NoRoom(
            f"{queued} jobs of yours are queued, and {config.cluster.name} takes no more; wait "
            "until some have ended"
        )
    hours = min(request.hours or task.hours, config.cluster.hours)
    wave = Wave(
        task=request.task,
        number=number,
        submission=before.submission if before else number,
        arguments=request.arguments,
        per_element=size,
        hours=hours,
        elements=tuple(elements[: share.now]),
        waiting=len(elements) - share.now,
    )
    array = array_waves.array_job(config, task, wave, folder, throttle, after)
    return wave, [array, *([array_waves.next_wave_job(config, wave, array)] * share.chained)]


def _write(config: Config, task: Task, wave: Wave, directory: Path) -> None:
    """items.json and config.yaml, before the job that reads them can start."""
    if task.ranks:
        elements = tuple(
            tuple(
                replace(item, shell=array_waves.port(n) + rank_command(config, item.words))
                for n, item in enumerate(element)
            )
            for element in wave.elements
        )
        wave = replace(wave, elements=elements)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / CONFIG, dump(config))
    wave.write(directory)


def _show(request: Request, config: Config, run: RunDirectory, jobs: Sequence[Job]) -> None:
    for job in jobs:
        sbatch.write_script(job, config, run, "", excluded_nodes(run.root))
        answer = f": {commands.test_only(job.script)}" if request.test_only else ""
        print(f"  {job.name}: {job.script}{answer}")
    print(f"nothing is queued ({'dry' if request.dry else 'test_only'}=true)")


def _run_here(request: Request, config: Config, run: RunDirectory) -> None:
    """cluster=local: the items in order, `throttle` at a time."""
    task, folder = TASKS[request.task], TaskFolder.of(absolute(run), request.task)
    items = items_of(request.task, config, request.asked, absolute(run))
    left = folder.missing(items)
    print(f"{request.task}: {len(items)} items, {len(items) - len(left)} done, {len(left)} to do")
    if request.dry:
        for item in left:
            print(f"  {item.name}: python -m {shlex.join(item.words)}")
        print("nothing is started (dry=true)")
        return
    if not left:
        return
    throttle = request.throttle or 1
    size = array_waves.items_per_element(len(left), request.elements or throttle, 1, None, None)
    number = folder.next_number()
    wave = Wave(
        task=request.task,
        number=number,
        submission=number,
        arguments=request.arguments,
        per_element=size,
        hours=float("inf"),
        elements=tuple(group(left, size)),
    )
    directory = folder.wave(number)
    directory.mkdir(parents=True, exist_ok=True)
    write_text(directory / CONFIG, dump(config))
    wave.write(directory)
    array_local.run(config, folder, wave, throttle, ranks=task.ranks)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    return command_line.run(_command, arguments, __doc__)


def _command(given: list[str]) -> None:
    if given[0] == "continue" and len(given) == 2:
        go_on(Path(given[1]))
    else:
        submit(given)


if __name__ == "__main__":
    sys.exit(main())
