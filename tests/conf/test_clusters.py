"""The profiles of sites: complete, consistent, without secrets, with layouts that can run."""

import re
from pathlib import Path

import pytest

from conf.check import check
from conf.check_cluster import unnamed
from conf.compose import DIRECTORY, compose, options
from conf.schema import Config
from conf.schema.errors import ConfigError

SITES = ("mn5", "deucalion", "leonardo", "jupiter")
A100 = ("deucalion", "leonardo")
STAGES = ("stage1", "stage2", "stage3")


def site(name: str, *overrides: str) -> Config:
    named = {"mn5": ["cluster.qos=acc_ehpc"]}.get(name, [])
    return compose([f"cluster={name}", "cluster.account=project", *named, *overrides])


def refused(config: Config) -> str:
    with pytest.raises(ConfigError) as error:
        check(config)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_profile_is_known_here() -> None:
    assert options("cluster") == sorted([*SITES, "local", "slurm"])


@pytest.mark.parametrize("name", SITES)
@pytest.mark.parametrize("model", ["amalia_vl_9b", "amalia_vl_9b_patch14", "tiny"])
def test_each_stage_can_run_as_the_profile_lays_it_out(name: str, model: str) -> None:
    for stage in STAGES:
        data = "demo" if model == "tiny" else "amalia"
        config = site(name, f"model={model}", f"data={data}", f"stage={stage}")
        check(config)
        assert config.precision.params == "bf16"
        assert config.parallel.world_size > 1
        # Tensor parallelism over the network would be slow.
        assert config.parallel.tensor <= config.cluster.gpus_per_node


@pytest.mark.parametrize("name", SITES)
def test_a_whole_node_is_shared_out_evenly(name: str) -> None:
    cluster = site(name).cluster
    assert cluster.executor == "slurm" and not cluster.detect
    assert cluster.gpus_per_node == cluster.ranks_on_a_node == 4
    assert cluster.cpus_per_node is not None and cluster.cpus_per_node % 4 == 0
    assert cluster.threads_per_rank <= cluster.cpus_per_node // 4
    assert "--gpu-bind=none" in cluster.site.srun and "--cpu-bind=none" in cluster.site.srun
    if cluster.partition is not None:
        assert cluster.partition in cluster.site.queues
        assert cluster.hours <= cluster.site.queues[cluster.partition].hours


@pytest.mark.parametrize("name", SITES)
def test_no_site_runs_without_an_account(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_ACCOUNT", raising=False)
    monkeypatch.delenv("SLURM_QOS", raising=False)
    config = compose([f"cluster={name}"])
    message = refused(config)
    assert "SLURM_ACCOUNT" in message and "cluster.account=" in message
    assert ("SLURM_QOS" in message) == (name == "mn5")
    check(config, dry=True)
    assert len(list(unnamed(config))) == (2 if name == "mn5" else 1)


def test_account_and_qos_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ACCOUNT", "ehpc42")
    monkeypatch.setenv("SLURM_QOS", "")
    cluster = compose(["cluster=mn5"]).cluster
    assert (cluster.account, cluster.qos) == ("ehpc42", None)  # exported but empty is not given
    assert compose(["cluster=mn5", "cluster.account=other"]).cluster.account == "other"


@pytest.mark.parametrize("name", [*SITES, "slurm"])
def test_no_account_is_in_the_repository(name: str) -> None:
    text = (DIRECTORY / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "account: ${oc.env:SLURM_ACCOUNT,null}" in text
    assert "qos: ${oc.env:SLURM_QOS,null}" in text
    for users in (r"\bbsc\d{3,}", r"\behpc\d+", r"\bf20\d{6}", r"@[a-z-]+\.(pt|es|it|de)\b"):
        assert not re.search(users, text, re.IGNORECASE), users


@pytest.mark.parametrize("name", SITES)
def test_what_a_site_says_has_a_source(name: str) -> None:
    """Every source that a comment cites is named at the top, and every one named is cited."""
    text = (DIRECTORY / "cluster" / f"{name}.yaml").read_text(encoding="utf-8")
    head, _, body = text.partition("\nname: ")
    named = set(re.findall(r"^#   (\[[A-Za-z-]+\])", head, re.MULTILINE))
    cited = set(re.findall(r"\[[A-Z][A-Za-z-]+\]|\[users\]", body))
    assert named and cited <= named, cited - named
    assert "Not run there by us" in head


@pytest.mark.parametrize("name", A100)
def test_no_fp8_on_an_a100(name: str) -> None:
    config = site(name, "model=amalia_vl_9b", "data=amalia", "precision=fp8")
    assert "cluster.fp8=false; use precision=bf16" in refused(config)
    assert config.cluster.speed < 1


def test_deucalion_never_holds_the_published_layout() -> None:
    config = site("deucalion", "model=amalia_vl_9b", "data=amalia", "parallel=h100_64")
    assert "normal-a100-80.nodes" in refused(config)


# Site, overrides, what the message must say.
CASES = [
    ("mn5", "cluster.hours=73", "cluster.site.queues.acc_ehpc.hours"),
    ("mn5", "cluster.qos=acc_debug", "give cluster.hours=2"),
    ("mn5", "cluster.qos=acc_debug", "cluster.qos=acc_ehpc"),
    ("mn5", "cluster.qos=acc_interactive cluster.hours=2 parallel.world_size=8", "1 of acc_inter"),
    ("mn5", "+cluster.site.sbatch.mem=100G", "refuses jobs that ask for memory"),
    ("mn5", "cluster.site.sbatch.wait-all-nodes=1 cluster.hours=0.3", "cluster.stop_minutes=10.0"),
    ("mn5", "parallel.world_size=6 stage.global_batch_size=24", "use 4 or 8"),
    ("mn5", "cluster.ranks_per_node=8", "two processes cannot share one; use at most 4"),
    ("mn5", "cluster.threads_per_rank=50", "use at most 20"),
    ("mn5", "cluster.gpus_per_node=-1", "must not be negative"),
    ("mn5", "cluster.account='a b'", "cluster.account='a b' is not a name"),
    ("mn5", "cluster.partition='-x'", "cluster.partition='-x' is not a name"),
    ("mn5", "cluster.exclude=['as01;x']", "cluster.exclude holds 'as01;x'"),
    ("mn5", "cluster.speed=0", "cluster.speed=0.0"),
    ("leonardo", "cluster.qos=boost_qos_bprod", "which begins at 65"),
    ("leonardo", "cluster.qos=boost_qos_dbg", "boost_qos_dbg.hours"),
    ("jupiter", "cluster.hours=13", "cluster.site.queues.booster.hours"),
    ("jupiter", "cluster.hours=inf", "needs a walltime"),
    ("deucalion", "cluster.partition=dev-a100-80 cluster.hours=4", "1 of dev-a100-80"),
]


@pytest.mark.parametrize(("name", "overrides", "message"), CASES)
def test_refused(name: str, overrides: str, message: str) -> None:
    words = re.findall(r"(?:[^\s']|'[^']*')+", overrides)
    large = ["parallel.world_size=8", "stage.global_batch_size=32"]
    config = site(name, *large, *words)
    assert message in refused(config)


def test_what_is_allowed_is_not_refused() -> None:
    check(site("mn5", "cluster.exclude=['as04r2b01','as02r3b[04-05]']"))
    check(site("deucalion", "+cluster.site.sbatch.mem=400G"))
    check(site("deucalion", "cluster.hours=48", "parallel.world_size=1", "cluster.exclusive=false"))


def test_all_of_a_sites_reasons_come_at_once() -> None:
    message = refused(site("deucalion", "cluster.hours=72", "parallel.world_size=40"))
    assert "normal-a100-80.nodes" in message and "normal-a100-80.hours" in message


def test_any_slurm_is_not_judged_before_it_is_asked() -> None:
    check(compose(["cluster=slurm", "cluster.hours=1000"]))


def test_a_laptop_has_no_walltime() -> None:
    cluster = compose().cluster
    assert (cluster.hours, cluster.restarts, cluster.spare_segments) == (float("inf"), 0, 0)


def test_hours_follow_the_speed_of_the_gpus() -> None:
    assert site("mn5").cluster.stage_hours(6144, 64) == 96
    assert site("deucalion").cluster.stage_hours(512, 16) == pytest.approx(100)


def test_every_profile_is_described() -> None:
    page = (Path(DIRECTORY).parent / "docs" / "clusters.md").read_text(encoding="utf-8")
    for name in options("cluster"):
        assert f"`{name}`" in page
