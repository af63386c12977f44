"""What a site takes is judged before anything is submitted, with the limit named."""

from dataclasses import replace
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm.job import Job
from slurm.limits import refuse_over_limits


def job(number: int = 1, **changes: object) -> Job:
    default = Job(
        name=f"r.stage1.{number:03d}",
        kind="segment",
        directory=Path("/nowhere"),
        body="true",
        hours=1,
        stage="stage1",
    )
    return replace(default, **changes)  # type: ignore[arg-type]


def mn5(qos: str, *overrides: str) -> Config:
    return compose(["cluster=mn5", "cluster.account=a", f"cluster.qos={qos}", *overrides])


def refused(jobs: list[Job], config: Config, queued: int | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        refuse_over_limits(jobs, config, queued)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_as_many_jobs_as_a_user_may_have() -> None:
    config = mn5("acc_ehpc")
    refuse_over_limits([job(n) for n in range(366)], config, None)
    refuse_over_limits([job(n) for n in range(300)], config, 66)
    message = refused([job(n) for n in range(300)], config, 67)
    assert "takes 366 jobs of a user" in message and "acc_ehpc.submitted" in message
    assert "300 and 67 are queued" in message


def test_every_element_of_an_array_counts() -> None:
    array = job(kind="array", elements=300, throttle=8)
    refuse_over_limits([array], mn5("acc_ehpc"), 66)
    assert "this plan has 301" in refused([array, job(2)], mn5("acc_ehpc"), 66)


def test_a_debug_queue_of_one_job_takes_no_chain() -> None:
    config = mn5("acc_debug", "cluster.hours=2")
    refuse_over_limits([job()], config, 0)
    message = refused([job(), job(2)], config)
    assert "acc_debug takes 1 job of a user" in message and "another QoS" in message
    assert "cluster.spare_segments=0" in message
    assert "takes 1 job" in refused([job()], config, 1)


def test_arrays_are_no_longer_than_the_sites() -> None:
    config = compose(["cluster=deucalion", "cluster.account=g"])
    refuse_over_limits([job(kind="array", elements=10000)], config)
    message = refused([job(kind="array", elements=10001)], config)
    assert "cluster.site.max_array_size" in message and "10000" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"nodes": 5}, "normal-a100-80.nodes"), ({"hours": 49}, "normal-a100-80.hours")],
)
def test_each_job_fits_its_queue(changes: dict[str, int], named: str) -> None:
    config = compose(["cluster=deucalion", "cluster.account=g"])
    assert f"cluster.site.queues.{named}" in refused([job(**changes)], config)


def test_an_array_is_judged_by_its_own_hours() -> None:
    config = compose(["cluster=slurm", "++cluster.site.queues={few: {hours: 1, nodes: 1}}"])
    config.cluster.partition = "few"
    assert config.cluster.hours > 1
    refuse_over_limits([job(kind="array", elements=4)], config)
    message = refused([job(hours=2, nodes=2)], config)
    assert message.startswith("2 things to change") and "lower parallel.world_size" in message


def test_small_jobs_go_to_a_queue_that_takes_them() -> None:
    large = ["cluster=leonardo", "cluster.account=a", "cluster.qos=boost_qos_bprod"]
    config = compose([*large, "parallel.world_size=260", "stage.global_batch_size=1040"])
    refuse_over_limits([job(nodes=65), job(2, kind="verify", hours=0.25)], config)
    config.cluster.site.single_qos = None
    assert "boost_qos_bprod.min_nodes" in refused([job(2, kind="verify")], config)


def test_stages_may_have_queues_of_their_own() -> None:
    configs = {"stage1": mn5("acc_debug", "cluster.hours=2"), "stage2": mn5("acc_ehpc")}
    jobs = [job(), *(job(n, stage="stage2") for n in range(5))]
    refuse_over_limits(jobs, configs)
    with pytest.raises(ConfigError, match="acc_debug takes 1 job"):
        refuse_over_limits([*jobs, job(9)], configs)
