"""What an array will cost, before it is queued: from items that have ended, else at most."""

import statistics
import sys

from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm.array_items import DONE, TaskFolder, Wave
from slurm.job import Job


def gpu_hours(
    wave: Wave, elements: int, items: int, job: Job, folder: TaskFolder
) -> tuple[float | None, float]:
    """GPU-hours (without GPUs, hours of one process) expected and at most, of all waves.

    Expected from the median of the items that are done; None where there is none.
    """
    each = job.nodes * (job.gpus_per_node or job.ranks_per_node)
    seconds = [
        float(record["seconds"])
        for _, record in folder.records(DONE)
        if isinstance(record.get("seconds"), (int, float))
    ]
    expected = statistics.median(seconds) * items / 3600 * each if seconds else None
    return expected, elements * wave.hours * each


def lines(wave: Wave, job: Job, folder: TaskFolder, config: Config) -> list[str]:
    """The plan of a wave in words."""
    now, later = len(wave.elements), wave.waiting
    unit = "GPU-hours" if job.gpus_per_node else "process-hours"
    expected, most = _of_all(wave, job, folder)
    known = "" if expected is None else f"{expected:,.1f} expected, "
    text = [
        f"wave {wave.number}: {now} elements of {wave.per_element} items, {job.throttle} at once, "
        f"{job.nodes} nodes and {job.hours:g} h each; {unit}: {known}{most:,.1f} at most"
    ]
    site = config.cluster.site
    if job.gpus_per_node and site.cost_unit != "GPU-hours":
        text.append(f"at most {most * site.cost_per_gpu_hour:,.0f} {site.cost_unit}")
    if later:
        text.append(f"{later} more elements than the site lets one submit now come in later waves")
    return text


def confirm(wave: Wave, job: Job, folder: TaskFolder, config: Config, yes: bool) -> None:
    """Ask before an array above `cluster.confirm_gpu_hours`; ConfigError unless confirmed."""
    expected, most = _of_all(wave, job, folder)
    cost, limit = most if expected is None else expected, config.cluster.confirm_gpu_hours
    if yes or not job.gpus_per_node or cost <= limit:
        return
    what = f"this array takes {cost:,.0f} GPU-hours, more than cluster.confirm_gpu_hours={limit:g}"
    if not sys.stdin.isatty():
        raise ConfigError(f"{what}; confirm it with YES=1 (yes=true), or give fewer hours=")
    if input(f"{what}. Queue it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ConfigError("not confirmed; nothing was submitted")


def _of_all(wave: Wave, job: Job, folder: TaskFolder) -> tuple[float | None, float]:
    elements = len(wave.elements) + wave.waiting
    items = sum(map(len, wave.elements)) + wave.waiting * wave.per_element
    return gpu_hours(wave, elements, items, job, folder)
