"""What saves no memory, or could not run, is refused with the reason and a remedy."""

import pytest

from conf.check import check
from conf.compose import compose
from conf.hardware import Hardware
from tests.conf.test_check import H100, REAL, refused

STAGE2 = [*REAL, "stage=stage2", "parallel=h100_64"]
STATES = "parallel.optimizer_states=bf16"
OFFLOAD = "parallel.optimizer_offload=0.5"
BARE = Hardware(cuda=True, capability=(9, 0), transformer_engine=False)


def test_recomputing_what_saves_nothing_on_a_gpu() -> None:
    words = ["parallel.recompute=selective"]
    scores = [*words, "parallel.recompute_modules=[core_attn]"]
    assert "fused attention" in refused(*STAGE2, *scores)
    assert "fused attention" in refused(*STAGE2, *scores, hardware=H100)
    check(compose(scores))  # no GPU: the scores are kept
    check(compose([*STAGE2, *words]))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("parallel.recompute=selective parallel.recompute_modules=[moe]", "none of core_attn"),
        ("parallel.recompute=selective parallel.recompute_modules=[layernorm]", "is none of"),
        ("parallel.recompute=selective parallel.recompute_modules=[]", "recomputes nothing"),
        ("parallel.recompute=none parallel.recompute_layers=2", "counts whole layers"),
        ("parallel.recompute=full parallel.recompute_layers=5", "not in [1, 4]"),
        ("parallel.recompute=full parallel.recompute_layers=0", "not in [1, 4]"),
        (
            "parallel=pp2 parallel.virtual_pipeline=2 parallel.recompute=full "
            "parallel.recompute_layers=2",
            "not in [1, 1]",
        ),
        (STATES, "on GPUs only"),
        (OFFLOAD, "there is no GPU"),
    ],
)
def test_on_a_laptop(overrides: str, message: str) -> None:
    assert message in refused(*overrides.split())


@pytest.mark.parametrize("setting", [STATES, OFFLOAD])
def test_an_optimizer_that_saves_memory(setting: str) -> None:
    real = [*STAGE2, setting]
    check(compose(real))
    check(compose(real), H100)
    assert "[gpu] extra" in refused(*real, hardware=BARE)
    assert "GPU" in refused(*real, hardware=Hardware(cuda=False))
    whole = "parallel.distributed_optimizer=false parallel.overlap_param_gather=false"
    assert "needs parallel.distributed_optimizer=true" in refused(*real, *whole.split())
    assert "use precision=bf16" in refused(*real, "precision=fp32")


def test_not_both_of_them() -> None:
    assert "take one of them" in refused(*STAGE2, STATES, OFFLOAD)
    fp8 = ["precision=fp8", "precision.fp8_params=true", "cluster.fp8=true"]
    assert "precision.fp8_params=true; set parallel.opt" in refused(*STAGE2, *fp8, OFFLOAD)
    check(compose([*STAGE2, *fp8, STATES]))
