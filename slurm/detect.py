"""Ask the Slurm at hand what a cluster profile leaves open: nodes' shape and partitions' limits.

`sinfo` tells both; where a site denies it, `scontrol show partition` tells averages.  The limits of
the QoS, if one is given, come from `sacctmgr`, where there is accounting.  What the profile or the
command line states is never overwritten.
"""

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from conf.schema.cluster import ClusterConfig, QueueConfig
from conf.schema.errors import ConfigError
from slurm import commands
from slurm.commands import NodeRow, SlurmError

BY_HAND = (
    "cluster.partition=NAME cluster.gpus_per_node=N cluster.cpus_per_node=N cluster.memory_gb=N, "
    "and cluster.detect=false"
)
# States in which a node takes no jobs for long; its shape may be wrong.
_GONE = re.compile(r"down|drain|fail|inval|unknown|future|planned_down|power(ed|ing)_down", re.I)
# gpu:4, gpu:h100:4, gpu:a100:2(S:0-1), gpu:h100:4(IDX:0-3)
_GPU = re.compile(r"(?:^|,)gpu(?::(?P<type>[^:,()]+))?:(?P<count>\d+)(?![^,(])")
_PARENTHESES = re.compile(r"\([^)]*\)")
_UNLIMITED = ("infinite", "unlimited", "n/a", "")
# What scontrol and sinfo say of a machine on which no Slurm answers at all.
_NO_SLURM = ("missing", "unreachable", "munge", "configuration")


@dataclass(frozen=True)
class Nodes:
    """The smallest node of a partition; 0 or None where Slurm does not tell."""

    count: int
    cores: int
    memory_mb: int
    gpus: int
    gpu: str | None = None


def detect(cluster: ClusterConfig) -> ClusterConfig:
    """A copy of `cluster` with the partition, its nodes' shape and the limits filled in.

    Left as it is where `cluster.detect` is false.  Raises ConfigError where no Slurm answers, where
    the partition does not exist, or, naming the values to give, where the site tells nothing.
    """
    if not cluster.detect:
        return cluster
    found = copy.deepcopy(cluster)
    try:
        rows = commands.sinfo_rows()
    except SlurmError as error:
        rows, denied = [], error
        try:
            partitions = commands.show_partition()
        except SlurmError as second:
            if error.cause in _NO_SLURM:
                raise error from None
            raise ConfigError(
                f"{cluster.name}: this site tells nothing about its nodes ({denied}; {second}); "
                f"give {BY_HAND}"
            ) from second
    else:
        partitions = _partitions_if_told()
    name, hours, nodes = (
        _from_sinfo(rows, cluster.partition) if rows else _from_scontrol(partitions, cluster)
    )
    found.partition = name
    _fill_shape(found, nodes)
    if not found.site.queues:
        limits = next((p for p in partitions if p.get("PartitionName") == name), {})
        most = _number(limits.get("MaxNodes", ""))
        found.site.queues[name] = QueueConfig(
            hours=hours,
            nodes=min(nodes.count, most) if most else nodes.count,
            min_nodes=max(1, _number(limits.get("MinNodes", "")) or 1),
        )
        if cluster.qos is not None:
            _add_qos(found, cluster.qos, found.site.queues[name])
    if found.site.max_array_size is None:
        found.site.max_array_size = _max_array_size()
    return found


def _fill_shape(cluster: ClusterConfig, nodes: Nodes) -> None:
    if not cluster.gpus_per_node:
        cluster.gpus_per_node = nodes.gpus
        cluster.gpu = cluster.gpu or nodes.gpu
    cluster.cpus_per_node = cluster.cpus_per_node or nodes.cores or None
    # 1 MB is what Slurm says where nobody has told it.
    cluster.memory_gb = cluster.memory_gb or nodes.memory_mb // 1024 or None


_QOS = (
    "MaxWall",
    "MaxSubmitJobsPU",
    "MaxJobsPU",
    "MaxTRESPerJob",
    "MaxTRESPerUser",
    "MinTRESPerJob",
)


def _add_qos(cluster: ClusterConfig, qos: str, partition: QueueConfig) -> None:
    """List the QoS with its limits and those of the partition, as both hold."""
    words = ["sacctmgr", "-n", "-P", "show", "qos", "where", f"name={qos}"]
    try:
        lines = commands.run([*words, f"format={','.join(_QOS)}"], timeout=10).splitlines()
    except SlurmError:
        return  # no accounting, no QoS
    fields = lines[0].split("|") if lines else []
    if len(fields) != len(_QOS):
        return  # no such QoS: sbatch will say so
    wall, submitted, running, of_job, of_user, least = fields
    most = [_nodes_within(limit, cluster) for limit in (of_job, of_user)]
    cluster.site.queues[qos] = QueueConfig(
        hours=min(partition.hours, hours_of(wall)),
        nodes=min(n for n in (partition.nodes, *most) if n is not None),
        min_nodes=max(partition.min_nodes, _tres(least).get("node", 1)),
        submitted=_number(submitted),
        running=_number(running),
    )


def _nodes_within(limit: str, cluster: ClusterConfig) -> int | None:
    """Nodes (one at least) that "node=8,gres/gpu=16" allows; None where it is no limit."""
    of_a_node = {
        "node": 1,
        "gres/gpu": cluster.gpus_per_node,
        "cpu": cluster.cpus_per_node or 0,
    }
    tres = _tres(limit)
    allowed = [max(1, tres[key] // n) for key, n in of_a_node.items() if n and key in tres]
    return min(allowed, default=None)


def _tres(text: str) -> dict[str, int]:
    """Whole numbers of Slurm's "cpu=8,mem=2G,node=1"."""
    pairs = (pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    return {key: int(value) for key, value in pairs if value.isdigit()}


def _partitions_if_told() -> list[dict[str, str]]:
    try:
        return commands.show_partition()
    except SlurmError:
        return []  # sinfo's answer is enough


def _max_array_size() -> int | None:
    try:
        return _number(commands.show_config().get("MaxArraySize", ""))
    except SlurmError:
        return None


def _from_sinfo(rows: Sequence[NodeRow], wanted: str | None) -> tuple[str, float, Nodes]:
    """Name, longest hours and smallest node of the wanted (else the default) partition."""
    default = next((row.partition for row in rows if row.is_default), None)
    name = _choose(wanted, default, [row.partition for row in rows])
    mine = [(row, *gpus_of(row.gres)) for row in rows if row.partition in name.split(",")]
    whole = [one for one in mine if not _GONE.search(one[0].state)] or mine
    # Where some nodes have GPUs, those without are not meant.
    meant = [one for one in whole if one[1]] or whole
    has_gpus = meant[0][1] > 0
    nodes = Nodes(
        count=sum(row.nodes for row, gpus, _ in mine if gpus or not has_gpus),
        cores=min(row.sockets * row.cores for row, _, _ in meant),
        memory_mb=min(row.memory_mb for row, _, _ in meant),
        gpus=min(gpus for _, gpus, _ in meant),
        gpu=_same([gpu for _, _, gpu in meant]),
    )
    return name, min(hours_of(row.time_limit) for row, _, _ in mine), nodes


def _from_scontrol(
    partitions: Sequence[Mapping[str, str]], cluster: ClusterConfig
) -> tuple[str, float, Nodes]:
    """The same from `scontrol show partition`, which counts the nodes' CPUs and GPUs together."""
    by_name = {p["PartitionName"]: p for p in partitions if "PartitionName" in p}
    default = next((n for n, p in by_name.items() if p.get("Default") == "YES"), None)
    name = _choose(cluster.partition, default, list(by_name))
    words = by_name.get(name)
    if words is None:
        raise ConfigError(
            f"cluster.partition={name}: one partition at a time where sinfo is denied"
        )
    tres = _tres(words.get("TRES", ""))
    count = _number(words.get("TotalNodes", "")) or 0
    cores = _number(words.get("TotalCPUs", "")) or 0
    gpus = tres.get("gres/gpu", 0)
    memory = _megabytes(words.get("TRES", ""))
    if not count or cores % count or gpus % count:
        raise ConfigError(
            f"the nodes of partition {name} differ, and this site does not let you see them (sinfo "
            f"is denied); give {BY_HAND}"
        )
    # Slurm counts GPUs here only if AccountingStorageTRES says so.
    if not cluster.gpus_per_node and not any("gres/gpu" in p.get("TRES", "") for p in partitions):
        raise ConfigError(
            f"this site does not say whether the nodes of {name} have GPUs (sinfo is denied); give "
            f"{BY_HAND}"
        )
    hours = hours_of(words.get("MaxTime", ""))
    return name, hours, Nodes(count, cores // count, memory // count, gpus // count)


def _choose(wanted: str | None, default: str | None, names: Sequence[str]) -> str:
    listed = ", ".join(dict.fromkeys(names)) or "none"
    if wanted is None:
        if default is None:
            raise ConfigError(
                f"this Slurm has no default partition; give cluster.partition, one of: {listed}"
            )
        return default
    for name in wanted.split(","):
        if name not in names:
            raise ConfigError(
                f"cluster.partition={wanted}: this Slurm has no partition {name}, or hides it; it "
                f"has: {listed}"
            )
    return wanted


def gpus_of(gres: str) -> tuple[int, str | None]:
    """GPUs in a node's generic resources, and their type where there is one and only one.

    >>> gpus_of("gpu:a100:4(S:0-1),nvme:1")
    (4, 'a100')
    """
    found = list(_GPU.finditer(_PARENTHESES.sub("", gres)))
    types = [match["type"] for match in found]
    return sum(int(match["count"]) for match in found), _same(types)


def hours_of(limit: str) -> float:
    """Hours of a Slurm time limit (D-HH:MM:SS, HH:MM:SS, MM:SS, MM); infinite where there is none.

    Raises ConfigError on anything else.
    """
    if limit.strip().lower() in _UNLIMITED:
        return math.inf
    days, dash, rest = limit.strip().rpartition("-")
    parts = rest.split(":")
    if not all(part.isdigit() for part in [*parts, *([days] if dash else [])]) or len(parts) > 3:
        raise ConfigError(f"a partition's time limit reads {limit!r}, which is not a time")
    numbers = [int(part) for part in parts]
    if dash:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return int(days) * 24 + hours + minutes / 60 + seconds / 3600
    if len(numbers) == 1:  # MM
        return numbers[0] / 60
    hours, minutes, seconds = [0, *numbers][-3:]  # [HH:]MM:SS
    return hours + minutes / 60 + seconds / 3600


def _same(values: Sequence[str | None]) -> str | None:
    return values[0] if values and len(set(values)) == 1 else None


def _number(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _megabytes(tres: str) -> int:
    """Memory in Slurm's "cpu=8,mem=2.5G,node=1"; 0 where there is none."""
    match = re.search(r"\bmem=(\d+(?:\.\d+)?)([KMGT]?)", tres)
    if match is None:
        return 0
    return int(float(match[1]) * {"K": 1 / 1024, "M": 1, "": 1, "G": 1024, "T": 1024**2}[match[2]])
