"""Refuse jobs that the site would refuse, or never start, before any of them is submitted."""

from collections.abc import Mapping, Sequence

from conf.check_cluster import over_queue
from conf.schema import Config
from conf.schema.errors import refuse
from slurm.job import Job


def refuse_over_limits(
    jobs: Sequence[Job], config: Config | Mapping[str, Config], queued: int | None = None
) -> None:
    """Raise ConfigError listing every limit of the site that `jobs` are beyond.

    Args:
        jobs: what is about to be submitted.
        config: that of each stage by name, or one for all; after detection, where there is any.
        queued: jobs of this user that are queued already (elements count); None: not known.
    """
    reasons: list[str] = []
    counts: dict[str, int] = {}  # of jobs, by the queue whose limit counts them
    limits: dict[str, int] = {}
    for job in jobs:
        cluster = (config if isinstance(config, Config) else config[job.stage]).cluster
        qos = cluster.qos_of(job.nodes)
        smaller = "parallel.world_size" if job.kind == "segment" else "the number of nodes"
        reasons += over_queue(cluster, job.nodes, job.hours, qos, smaller)
        largest = cluster.site.max_array_size
        if job.elements is not None and largest is not None and job.elements > largest:
            reasons.append(
                f"{job.name} has {job.elements} elements, and {cluster.name} takes arrays of at "
                f"most {largest} (cluster.site.max_array_size); split it"
            )
        name, queue = cluster.queue_name, cluster.queue_of(job.nodes)
        if queue is not None and queue is not cluster.queue:
            name = cluster.site.single_qos
        if name is not None and queue is not None and queue.submitted is not None:
            counts[name] = counts.get(name, 0) + (job.elements or 1)
            limits[name] = queue.submitted
    for name, count in counts.items():
        if count + (queued or 0) > limits[name]:
            reasons.append(_too_many(name, limits[name], count, queued or 0))
    refuse(list(dict.fromkeys(reasons)))


def _too_many(name: str, limit: int, count: int, queued: int) -> str:
    there = f" and {queued} are queued" if queued else ""
    field = f"cluster.site.queues.{name}.submitted"
    if limit == 1:
        remedy = (
            "it cannot hold a chain: use another QoS, or one stage of one segment "
            "(cluster.spare_segments=0)"
        )
    else:
        remedy = "wait until some have ended, submit fewer stages, or use a larger cluster.hours"
    jobs = "1 job" if limit == 1 else f"{limit} jobs"
    return f"{name} takes {jobs} of a user ({field}), this plan has {count}{there}; {remedy}"
