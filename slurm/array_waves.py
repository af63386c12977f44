"""How much of an array is submitted at once, and as which jobs.

A site limits the elements of one array (MaxArraySize) and the jobs that a user may have queued
(MaxSubmit, where every element counts). What is beyond is a later wave, which a last small job of
this wave submits; that job counts too.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from conf.schema import Config
from slurm import bodies
from slurm.array_items import MOST_TRIES, Item, TaskFolder, Wave
from slurm.array_tasks import Task
from slurm.job import Job
from slurm.render import shape, single_command

ROUNDS = 4  # elements for each that runs at once, so that slow ones do not hold up the end
LARGEST = 1000  # elements of one array, where the site does not say; Slurm's default
NEXT = "next"
NEXT_WAVE_HOURS = 0.25
_PORT = (
    f"export MASTER_PORT=$(( {bodies.FIRST_PORT} + SLURM_JOB_ID % {bodies.PORT_BLOCKS} * "
    f"{bodies.PORTS_OF_A_JOB} ))\n"
)


@dataclass(frozen=True)
class Share:
    """The first `now` elements are submitted now; `chained`: a job submits the rest."""

    now: int
    chained: bool


def share(elements: int, room: int | None, largest: int | None) -> Share:
    """Split `elements` to the jobs that may still be queued and the elements of one array.

    A limit that is not known is None. With room for one job only, nobody is left to submit the
    rest, and `chained` is False. Zero now where there is no room at all.
    """
    free = math.inf if room is None else room
    most = LARGEST if largest is None else largest
    if elements <= min(free, most):
        return Share(elements, False)
    chained = int(min(free - 1, most))
    if chained >= 1:
        return Share(chained, True)
    return Share(max(0, int(min(free, 1))), False)


def items_per_element(
    items: int, elements: int | None, throttle: int, room: int | None, largest: int | None
) -> int:
    """Items of one element: as many as make `elements`, by default few rounds within the limits."""
    if elements is None:
        limits = [limit for limit in (room, largest or LARGEST) if limit is not None]
        elements = max(1, min(throttle * ROUNDS, *limits))
    return max(1, -(-items // elements))


def room(config: Config, nodes: int, queued: int) -> int | None:
    """Jobs that the site lets this user still submit; None where it states no limit."""
    queue = config.cluster.queue_of(nodes)
    return None if queue is None or queue.submitted is None else queue.submitted - queued


def tried_too_often(folder: TaskFolder, items: Iterable[Item], submission: int) -> list[str]:
    """Items that two waves of a submission have started in vain."""
    return [item.name for item in items if folder.tries(item, submission) >= MOST_TRIES]


def moved(folder: TaskFolder, wave: Wave) -> bool:
    """Whether an item of the wave was ended, or at least started."""
    for item in (item for element in wave.elements for item in element):
        record = folder.record("begun", item.name)
        started = record.get("submission") == wave.submission
        if folder.is_done(item) or (started and wave.number in record.get("waves", ())):
            return True
    return False


# --- jobs -------------------------------------------------------------------------------------


def array_job(
    config: Config,
    task: Task,
    wave: Wave,
    folder: TaskFolder,
    throttle: int,
    after: Sequence[str] = (),
) -> Job:
    """The array of one wave, after the arrays `after` (ids), so that the throttle holds for all."""
    directory = folder.wave(wave.number)
    nodes, ranks_per_node, gpus, cpus = _needs(config, task)
    body = single_command(config, ["slurm.array_element", str(directory)])
    if task.ranks:
        body = f"{bodies.master(config)}{_PORT}{body}"
    return Job(
        name=name(config, wave),
        kind="array",
        directory=directory,
        body=body,
        hours=wave.hours,
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        gpus_per_node=gpus,
        cpus_per_rank=cpus,
        exclusive=task.ranks and config.cluster.exclusive,
        number=wave.number,
        after_any=tuple(after),
        elements=len(wave.elements),
        throttle=throttle,
    )


def next_wave_job(config: Config, wave: Wave, array: Job) -> Job:
    """The job that submits the rest when the array has ended, however."""
    gpus, cpus = _small(config, config.cluster.site.single_gpus)
    return Job(
        name=f"{array.name}.{NEXT}",
        kind="next_wave",
        directory=array.directory.with_name(f"{array.directory.name}-{NEXT}"),
        body=single_command(config, ["slurm.arrays", "continue", str(array.directory)]),
        hours=min(NEXT_WAVE_HOURS, config.cluster.hours),
        gpus_per_node=gpus,
        cpus_per_rank=cpus or 1,
        number=wave.number,
        after_any=(array.name,),
    )


def port(position: int) -> str:
    """A shell line by which an item's ranks meet at a port of their own, another one after a
    requeue: what was left behind on the node may still hold the one before."""
    tries = f"{position} + 3 * ${{SLURM_RESTART_COUNT:-0}}"
    return f"export MASTER_PORT=$(( MASTER_PORT + ({tries}) % {bodies.PORTS_OF_A_JOB} ))\n"


def name(config: Config, wave: Wave) -> str:
    return f"{config.run}.{wave.task}.{wave.number:03d}"


def _needs(config: Config, task: Task) -> tuple[int, int, int, int | None]:
    """Nodes, ranks and GPUs of each, cores of each rank."""
    cluster = config.cluster
    if task.ranks:
        nodes, ranks_per_node, cpus = shape(config)
        whole = cluster.gpus_per_node if cluster.exclusive else ranks_per_node
        return nodes, ranks_per_node, min(whole, cluster.gpus_per_node), cpus
    gpus = max(cluster.site.single_gpus, min(task.gpus, cluster.gpus_per_node))
    gpus, cpus = _small(config, gpus)
    workers = max(config.data.build_workers, cluster.threads_per_rank)
    return 1, 1, gpus, max(cpus or 1, workers)


def _small(config: Config, gpus: int) -> tuple[int, int | None]:
    """GPUs of a job of one process and the cores that go with them."""
    cores = config.cluster.cpus_per_node
    if not gpus or cores is None:
        return gpus, None
    return gpus, max(1, cores * gpus // max(1, config.cluster.gpus_per_node))
