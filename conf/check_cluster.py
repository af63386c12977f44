"""Why a site would refuse, or never start, the jobs of a configuration.

What the submitted jobs are (how many, arrays) is judged by `slurm/limits.py`; here is what the
configuration alone tells.
"""

import math
import re
from collections.abc import Iterator

from conf.schema import Config
from conf.schema.cluster import ClusterConfig, QueueConfig
from conf.schema.errors import ConfigError

# What names of accounts, QoS, partitions and nodes are made of; anything else could become another
# option or line of a batch script.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+:,-]*")
NODES = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.,\[\]-]*")
OTHERS = 3  # most queues that a message recommends
MEMORY_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")


def cluster_reasons(config: Config) -> Iterator[str]:
    """What is wrong and what to change, one reason at a time; `unnamed` tells the rest."""
    cluster = config.cluster
    yield from _ranks(config)
    if cluster.executor != "slurm":
        return
    yield from _names(cluster)
    if not math.isfinite(cluster.hours):
        yield f"cluster.hours={cluster.hours}: a batch job needs a walltime in hours"
    for option in MEMORY_OPTIONS:
        if option in cluster.site.sbatch and not cluster.site.memory_flag:
            yield (
                f"cluster.site.sbatch.{option} is given, but {cluster.name} refuses jobs that ask "
                "for memory; remove it"
            )
    if cluster.queue is not None:
        nodes = cluster.nodes(config.parallel.world_size)
        # Verifiers are one node each and need no look here.
        yield from over_queue(cluster, nodes, cluster.hours, cluster.qos, "parallel.world_size")


def unnamed(config: Config) -> Iterator[str]:
    """The account and the QoS, where the site demands them and nobody has given them.

    Apart, as they are never in the repository: scripts can be looked at without them.
    """
    cluster = config.cluster
    site = cluster.site
    if cluster.executor != "slurm":
        return
    if site.account_required and not cluster.account:
        yield (
            f"{cluster.name} takes no job without an account: `export SLURM_ACCOUNT=PROJECT`, or "
            "give cluster.account=PROJECT"
        )
    if site.qos_required and not cluster.qos:
        known = f" (such as {', '.join(site.queues)})" if site.queues else ""
        yield (
            f"{cluster.name} takes no job without a QoS: `export SLURM_QOS=QOS`, or give "
            f"cluster.qos=QOS{known}"
        )


def refuse_nameless(config: Config, dry: bool = False) -> None:
    """ConfigError where account, QoS or another name is missing or none; for jobs without ranks.

    With `dry` the account and the QoS may be missing.
    """
    reasons = [] if dry else list(unnamed(config))
    if config.cluster.executor == "slurm":
        reasons += _names(config.cluster)
    if reasons:
        raise ConfigError("; ".join(reasons))


def over_queue(
    cluster: ClusterConfig, nodes: int, hours: float, qos: str | None, remedy: str
) -> Iterator[str]:
    """Why a job of `nodes` nodes and `hours` hours is beyond the limits of its queue.

    `remedy` names the setting that makes the job smaller.
    """
    name = cluster.listed(qos)
    if name is None:
        return
    queue = cluster.site.queues[name]
    field = f"cluster.site.queues.{name}"
    others = _instead(cluster, name, nodes, hours)
    if queue.nodes is not None and nodes > queue.nodes:
        yield (
            f"{nodes} nodes are more than the {queue.nodes} of {name} ({field}.nodes); "
            f"lower {remedy}{others}"
        )
    if nodes < queue.min_nodes:
        yield (
            f"{_nodes(nodes)} too few for {name}, which begins at {queue.min_nodes} "
            f"({field}.min_nodes); raise {remedy}{others}"
        )
    if hours > queue.hours:
        yield (
            f"{hours:g} hours are more than the {queue.hours:g} of {name} ({field}.hours); give "
            f"cluster.hours={queue.hours:g}, which makes more, shorter segments{others}"
        )


def _instead(cluster: ClusterConfig, name: str, nodes: int, hours: float) -> str:
    """Other queues of the same kind that would take the job, as the end of a sentence."""

    def takes(queue: QueueConfig) -> bool:
        few_enough = queue.nodes is None or nodes <= queue.nodes
        # A queue of a single job cannot hold a chain.
        return few_enough and nodes >= queue.min_nodes and hours <= queue.hours

    fitting = [other for other, queue in cluster.site.queues.items() if takes(queue)]
    fitting = [other for other in fitting if other not in (name, cluster.partition)][:OTHERS]
    kind = "cluster.partition" if name == cluster.partition else "cluster.qos"
    return f", or use {kind}={' or '.join(fitting)}" if fitting else ""


def _nodes(nodes: int) -> str:
    return "1 node is" if nodes == 1 else f"{nodes} nodes are"


def _names(cluster: ClusterConfig) -> Iterator[str]:
    for key in ("account", "qos", "partition", "reservation"):
        value = getattr(cluster, key)
        if value and not NAME.fullmatch(value):
            yield f"cluster.{key}={value!r} is not a name that Slurm knows; correct it"
    for node in cluster.exclude:
        if not NODES.fullmatch(node):
            yield f"cluster.exclude holds {node!r}, which is not a node's name; correct it"


def _ranks(config: Config) -> Iterator[str]:
    """Ranks are spread evenly, each with a GPU of its own where there are GPUs, and with cores."""
    cluster, world_size = config.cluster, config.parallel.world_size
    gpus, per_node = cluster.gpus_per_node, cluster.ranks_on_a_node
    if gpus < 0 or per_node < 1:
        yield (
            f"cluster.gpus_per_node={gpus}, cluster.ranks_per_node={cluster.ranks_per_node}: they "
            "must not be negative"
        )
        return
    if cluster.executor == "local":
        if gpus and world_size > gpus:
            yield (
                f"parallel.world_size={world_size} is more than the {gpus} GPUs of this machine "
                "(cluster.gpus_per_node), and two processes cannot share one; use fewer"
            )
        return
    if gpus and per_node > gpus:
        yield (
            f"cluster.ranks_per_node={per_node} is more than the {gpus} GPUs of a node "
            f"(cluster.gpus_per_node), and two processes cannot share one; use at most {gpus}"
        )
    if world_size > per_node and world_size % per_node:
        down = world_size - world_size % per_node
        yield (
            f"parallel.world_size={world_size} does not fill nodes of {per_node} ranks; use {down} "
            f"or {down + per_node}, or set cluster.ranks_per_node"
        )
    cores = cluster.cpus_per_node
    used = cluster.threads_per_rank * min(world_size, per_node)
    if cores is not None and used > cores:
        yield (
            f"cluster.threads_per_rank={cluster.threads_per_rank} for "
            f"{min(world_size, per_node)} ranks is more than the {cores} cores of a node "
            f"(cluster.cpus_per_node); use at most {cores // min(world_size, per_node)}"
        )
