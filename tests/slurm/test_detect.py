"""Detection from recorded answers of sinfo and scontrol, and from a real Slurm."""

import math
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema.cluster import ClusterConfig, QueueConfig
from conf.schema.errors import ConfigError
from slurm import commands
from slurm.commands import SlurmError
from slurm.detect import detect, gpus_of, hours_of
from tests.slurm.throwaway import ThrowAwaySlurm

# partition, with * where it is the default, up, limit, nodes, sockets, cores, threads, MB, GRES,
# features, state. Recorded from a throw-away Slurm 22.05; then other sites' shapes.
TWO_KINDS = """\
cpu|cpu*|up|3-00:00:00|4|1|8|1|12000|(null)|(null)|idle
acc|acc|up|3-00:00:00|2|1|80|1|12000|gpu:4|(null)|idle
mix|mix|up|infinite|2|1|80|1|12000|gpu:4|(null)|idle
mix|mix|up|infinite|1|1|8|1|12000|(null)|(null)|idle"""
GPU_SITE = """\
normal|normal|up|2-00:00:00|10|2|64|1|512000|gpu:a100:4(S:0-1)|(null)|mixed
normal|normal|up|2-00:00:00|3|2|64|1|512000|gpu:a100:4(S:0-1)|(null)|allocated
normal|normal|up|2-00:00:00|2|2|32|2|256000|gpu:a100:4(S:0-1),nvme:1|(null)|idle
normal|normal|up|2-00:00:00|1|2|8|1|64000|gpu:a100:4(S:0-1)|(null)|down*
dev|dev|up|30:00|1|2|64|1|512000|gpu:a100:2(S:0),gpu:v100:2(S:1)|(null)|idle"""
UNTOLD = "all|all*|up|infinite|3|1|16|1|1|(null)|(null)|idle"

PARTITIONS = """\
PartitionName=acc Default=YES Hidden=NO MaxNodes=64 MaxTime=3-00:00:00 MinNodes=2 State=UP \
TotalCPUs=640 TotalNodes=8 TRES=cpu=640,mem=4T,node=8,billing=640,gres/gpu=32
PartitionName=gpp Default=NO Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 State=UP \
TotalCPUs=448 TotalNodes=4 TRES=cpu=448,mem=512000M,node=4,billing=448
PartitionName=odd Default=NO Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 State=UP \
TotalCPUs=449 TotalNodes=4 TRES=cpu=449,mem=512000M,node=4,gres/gpu=4
PartitionName=half Default=NO Hidden=NO MaxNodes=UNLIMITED MaxTime=UNLIMITED MinNodes=0 State=UP \
TotalCPUs=448 TotalNodes=4 TRES=cpu=448,mem=512000M,node=4,gres/gpu=6"""
CONFIG = "MaxArraySize            = 1001\nSelectType              = select/cons_tres"


class Answers:
    """Stands in for Slurm's programs; None is a refusal."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        sinfo: str | None = None,
        partition: str | None = None,
        config: str | None = None,
        qos: str | None = None,
    ) -> None:
        self.texts = {"sinfo": sinfo, "partition": partition, "config": config, "sacctmgr": qos}
        monkeypatch.setattr(commands, "run", self.run)

    def run(self, words: list[str], timeout: float = 0) -> str:
        key = words[-1] if words[0] == "scontrol" else words[0]
        text = self.texts[key]
        if text is None:
            raise SlurmError(f"{words[0]}: Access/permission denied", "denied")
        if key != "sinfo":
            return text
        return "".join(f"\x1e{line}\n".replace("|", "\x1f") for line in text.splitlines())


def profile(*overrides: str) -> ClusterConfig:
    return compose(["cluster=slurm", *overrides]).cluster


def test_the_default_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, TWO_KINDS, config=CONFIG)
    asked = profile()
    found = detect(asked)
    assert (found.partition, found.gpus_per_node, found.cpus_per_node) == ("cpu", 0, 8)
    assert found.memory_gb == 11 and found.ranks_on_a_node == 1
    assert found.site.queues == {"cpu": QueueConfig(hours=72, nodes=4)}
    assert found.site.max_array_size == 1001
    assert asked.partition is None and not asked.site.queues  # a copy


def test_only_nodes_with_gpus_count_where_there_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, TWO_KINDS)
    found = detect(profile("cluster.partition=mix"))
    assert (found.gpus_per_node, found.cpus_per_node, found.ranks_on_a_node) == (4, 80, 4)
    assert found.queue == QueueConfig(hours=math.inf, nodes=2)
    assert found.site.max_array_size is None


def test_the_smallest_node_of_a_partition(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, GPU_SITE)
    found = detect(profile("cluster.partition=normal"))
    # The node that is down is smaller still, but takes no job; it counts as a node.
    assert (found.gpus_per_node, found.gpu, found.cpus_per_node) == (4, "a100", 64)
    assert found.memory_gb == 250 and found.queue == QueueConfig(hours=48, nodes=16)
    two_types = detect(profile("cluster.partition=dev"))
    assert (two_types.gpus_per_node, two_types.gpu) == (4, None)
    assert two_types.queue == QueueConfig(hours=0.5, nodes=1)


def test_no_default_partition_is_named_with_those_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Answers(monkeypatch, GPU_SITE)
    with pytest.raises(ConfigError, match=r"cluster\.partition, one of: normal, dev$"):
        detect(profile())
    with pytest.raises(ConfigError, match=r"no partition gpu, or hides it; it has: normal, dev$"):
        detect(profile("cluster.partition=gpu"))


def test_memory_that_nobody_told_slurm_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, UNTOLD)
    assert detect(profile()).memory_gb is None


def test_what_is_given_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, TWO_KINDS, partition=PARTITIONS, config=CONFIG)
    given = [
        "cluster.partition=acc",
        "cluster.gpus_per_node=2",
        "cluster.cpus_per_node=10",
        "cluster.memory_gb=5",
        "cluster.site.max_array_size=7",
        "++cluster.site.queues={acc: {hours: 1, nodes: 1}}",
    ]
    found = detect(profile(*given))
    assert found == profile(*given)


def test_nothing_is_asked_without_detection(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch)
    assert detect(profile("cluster.detect=false")) == profile("cluster.detect=false")


def test_partitions_tell_more_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, TWO_KINDS, partition=PARTITIONS)
    # 2 nodes exist, 64 would be allowed.
    assert detect(profile("cluster.partition=acc")).queue == QueueConfig(72, nodes=2, min_nodes=2)


def test_where_sinfo_is_denied_scontrol_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch, None, PARTITIONS, CONFIG)
    found = detect(profile())
    assert (found.partition, found.gpus_per_node, found.cpus_per_node) == ("acc", 4, 80)
    assert found.memory_gb == 512 and found.site.max_array_size == 1001
    assert found.queue == QueueConfig(hours=72, nodes=8, min_nodes=2)
    cpus = detect(profile("cluster.partition=gpp"))
    assert (cpus.gpus_per_node, cpus.cpus_per_node, cpus.memory_gb) == (0, 112, 125)


@pytest.mark.parametrize("name", ["odd", "half"])
def test_averages_of_different_nodes_are_not_believed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answers(monkeypatch, None, PARTITIONS)
    message = rf"nodes of partition {name} differ.*cluster\.gpus_per_node"
    with pytest.raises(ConfigError, match=message):
        detect(profile(f"cluster.partition={name}"))


def test_gpus_that_nobody_counts_are_not_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    uncounted = (
        PARTITIONS.replace(",gres/gpu=32", "").replace(",gres/gpu=4", "").replace(",gres/gpu=6", "")
    )
    Answers(monkeypatch, None, uncounted)
    with pytest.raises(ConfigError, match=r"does not say whether.*acc have GPUs.*gpus_per_node=N"):
        detect(profile())
    assert detect(profile("cluster.gpus_per_node=4")).gpus_per_node == 4


def test_a_site_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    Answers(monkeypatch)
    with pytest.raises(ConfigError) as error:
        detect(profile())
    for value in ("cluster.partition", "cluster.gpus_per_node", "cluster.memory_gb"):
        assert value in str(error.value)
    assert "\n" not in str(error.value)


def test_no_slurm_at_all_is_said_as_such(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"sinfo is not on PATH.*CLUSTER=local"):
        detect(profile())


# MaxWall, MaxSubmitJobsPU, MaxJobsPU, MaxTRESPerJob, MaxTRESPerUser, MinTRESPerJob: as sacctmgr
# 22.05 prints them.
@pytest.mark.parametrize(
    ("printed", "limits"),
    [
        ("02:00:00|4||||\n", QueueConfig(2, nodes=2, submitted=4)),
        ("|100|5|node=1||\n", QueueConfig(72, nodes=1, submitted=100, running=5)),
        ("7-00:00:00||||gres/gpu=7|node=2\n", QueueConfig(72, nodes=1, min_nodes=2)),
        ("|||cpu=800,node=5|gres/gpu=2|\n", QueueConfig(72, nodes=1)),
        ("||||mem=4G|\n", QueueConfig(72, nodes=2)),
        ("", None),  # no such QoS
        (None, None),  # no accounting
    ],
)
def test_limits_of_a_qos_and_of_its_partition_both_hold(
    printed: str | None, limits: QueueConfig | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    Answers(monkeypatch, TWO_KINDS, qos=printed)
    found = detect(profile("cluster.partition=acc", "cluster.qos=debug"))
    assert found.site.queues.get("debug") == limits
    assert found.queue == (limits or QueueConfig(72, nodes=2))


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:4", (4, None)),
        ("gpu:h100:4", (4, "h100")),
        ("gpu:a100:4(S:0-1)", (4, "a100")),
        ("craynetwork:4,gpu:gh200:4(IDX:0,1,2,3),nvme:1", (4, "gh200")),
        ("gpu:a100:2(S:0),gpu:v100:2(S:1)", (4, None)),
        ("shard:16,gpu:2", (2, None)),
        ("(null)", (0, None)),
        ("", (0, None)),
        ("tmpfs:64G", (0, None)),
    ],
)
def test_generic_resources(gres: str, gpus: tuple[int, str | None]) -> None:
    assert gpus_of(gres) == gpus


@pytest.mark.parametrize(
    ("limit", "hours"),
    [
        ("3-00:00:00", 72),
        ("1-12", 36),
        ("12:00:00", 12),
        ("1:30:00", 1.5),
        ("30:00", 0.5),
        ("90", 1.5),
        ("infinite", math.inf),
        ("UNLIMITED", math.inf),
        ("n/a", math.inf),
    ],
)
def test_time_limits(limit: str, hours: float) -> None:
    assert hours_of(limit) == hours


@pytest.mark.parametrize("limit", ["soon", "1:2:3:4", "-1", "1-", "1.5"])
def test_what_is_no_time_limit(limit: str) -> None:
    with pytest.raises(ConfigError, match="which is not a time"):
        hours_of(limit)


@pytest.mark.slurm
def test_a_real_slurm(slurm: ThrowAwaySlurm) -> None:
    cpus = detect(profile())
    assert (cpus.partition, cpus.gpus_per_node, cpus.cpus_per_node) == ("cpu", 0, 8)
    assert cpus.queue == QueueConfig(hours=72, nodes=4) and cpus.site.max_array_size == 1001
    gpus = detect(profile("cluster.partition=acc"))
    assert (gpus.gpus_per_node, gpus.cpus_per_node, gpus.memory_gb) == (4, 80, 11)
    slurm.update_node("acc1", "down")
    assert detect(profile("cluster.partition=acc")).queue == QueueConfig(hours=72, nodes=2)


@pytest.mark.slurm
def test_a_real_slurm_with_accounting(slurm_accounting: ThrowAwaySlurm) -> None:
    found = detect(profile("cluster.partition=acc", "cluster.qos=acc_debug"))
    assert found.queue is not None
    assert (found.queue.hours, found.queue.submitted) == (2, 4)
    bulk = detect(profile("cluster.qos=bulk"))
    assert bulk.queue == QueueConfig(hours=72, nodes=4, submitted=100)
