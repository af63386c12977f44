"""Each preset of conf/parallel runs where it is meant to, and fits with a reserve."""

import pytest

from conf.check import check
from conf.compose import options
from slurm.request import parse, prepare
from tools.plan.predict import predict

RESERVE = 0.1  # of what a GPU's memory can be used for
A100_40 = ["cluster.gpu_memory_gb=40", "cluster.partition=normal-a100-40"]
H200 = [
    "cluster.gpus_per_node=1",
    "cluster.fp8=true",
    "cluster.gpu=H200",
    "cluster.gpu_memory_gb=141",
    "cluster.gpu_tflops=989",
    "cluster.gpu_fp8_tflops=1979",
    "cluster.gpu_bandwidth=4800",
    "cluster.node_bandwidth=450",
    "cluster.network_bandwidth=50",
    "precision=bf16",
]
# Preset, cluster, stages, what else is said.
MEANT: list[tuple[str, str, str, list[str]]] = [
    ("h100_8", "mn5", "stage1", []),
    ("h100_8", "jupiter", "stage1", []),
    ("h100_64", "mn5", "stage2,stage3", []),
    ("h100_64", "mn5", "stage2,stage3", ["precision=fp8"]),
    ("h100_64_cp2", "mn5", "stage2,stage3", []),
    ("h100_64_96gb", "jupiter", "stage2,stage3", []),
    ("h100_128", "mn5", "stage2,stage3", []),
    ("h100_128", "mn5", "stage2,stage3", ["precision=fp8"]),
    ("a100_8", "leonardo", "stage1", []),
    ("a100_8", "deucalion", "stage1", []),
    ("a100_8_40gb", "deucalion", "stage1", A100_40),
    ("a100_16", "deucalion", "stage2,stage3", []),
    ("a100_16_40gb", "deucalion", "stage2,stage3", A100_40),
    ("a100_64", "leonardo", "stage2,stage3", []),
    ("h200_1", "local", "stage1,stage2,stage3", H200),
]


@pytest.mark.parametrize(("preset", "cluster", "stages", "more"), MEANT)
def test_it_fits_where_it_is_meant_to_run(
    preset: str, cluster: str, stages: str, more: list[str]
) -> None:
    words = [f"parallel={preset}", f"cluster={cluster}", f"stages=[{stages}]", *more]
    qos = ["cluster.qos=acc_ehpc"] if cluster == "mn5" else []
    real = ["run=r", "model=amalia_vl_9b", "data=amalia", "cluster.account=a", *qos]
    configs, _ = prepare(parse([*real, *words, "dry=true"]))
    assert sorted(configs) == stages.split(",")
    for config in configs.values():
        check(config)
        memory = predict(config).fit
        assert memory.share <= 1 - RESERVE, f"{memory.share:.1%}"
        assert config.parallel.loss_chunk > 0


def test_no_preset_for_gpus_is_left_out() -> None:
    for_gpus = {name for name in options("parallel") if name[:4] in ("h100", "h200", "a100")}
    assert for_gpus == {preset for preset, *_ in MEANT}
