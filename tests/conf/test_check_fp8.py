"""FP8 is refused, with the reason and a remedy, wherever it could not be what it says."""

import pytest

from conf.check import check
from conf.compose import compose
from conf.hardware import Hardware
from tests.conf.test_check import H100, REAL, refused

FP8 = ["precision=fp8", "data=demo"]
ROWS = ["stage.document_multiple=1", "stage.micro_batch_size=1"]


def test_it_needs_hardware() -> None:
    assert "cluster.fp8=true" in refused(*FP8)
    assert "needs a GPU" in refused(*FP8, hardware=Hardware(cuda=False))
    a100 = Hardware(cuda=True, capability=(8, 0), transformer_engine=True)
    assert "this GPU has 8.0" in refused(*FP8, hardware=a100)
    bare = Hardware(cuda=True, capability=(9, 0), transformer_engine=False)
    assert "[gpu] extra" in refused(*FP8, hardware=bare)
    check(compose(FP8), H100)
    check(compose([*FP8, "cluster.fp8=true"]))


def test_blockwise_needs_hopper() -> None:
    ada = Hardware(cuda=True, capability=(8, 9), transformer_engine=True)
    check(compose(FP8), ada)
    real = [*REAL, "precision=fp8_blockwise", "stage=stage2", "parallel=h100_64"]
    assert "9.0 or newer, and this GPU has 8.9" in refused(*real, hardware=ada)
    check(compose(real), H100)


@pytest.mark.parametrize("name", ["fp8", "fp8_tensorwise", "fp8_blockwise", "fp8_delayed"])
def test_the_presets_can_run(name: str) -> None:
    for stage, parallel in (("stage1", "h100_8"), ("stage2", "h100_64")):
        check(compose([*REAL, f"stage={stage}", f"parallel={parallel}", f"precision={name}"]), H100)


def test_fp8_is_the_tensorwise_preset() -> None:
    assert compose(["precision=fp8"]).precision == compose(["precision=fp8_tensorwise"]).precision


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("precision.params=fp32", "needs precision.params=bf16"),
        ("precision.fp8_recipe=magic", "precision.fp8_recipe='magic'"),
        # columns
        ("precision.fp8_recipe=blockwise", "model.text.intermediate_size=320"),
        ("model.text.intermediate_size=328", "model.text.intermediate_size=328"),
        # rows: 515 = 32 * 16 + 3
        (" ".join([*ROWS, "stage.sequence_length=515"]), "use stage.sequence_length=528"),
        # layers in BF16; tiny has four layers
        ("precision.fp8_first_layers_bf16=-1", "must not be negative"),
        ("precision.fp8_first_layers_bf16=2 precision.fp8_last_layers_bf16=2", "none of 4 layers"),
        (
            "parallel=pp2 precision.fp8_first_layers_bf16=3",
            "precision.fp8_first_layers_bf16=3 is more than",
        ),
        (
            "precision.fp8_recipe=delayed precision.fp8_last_layers_bf16=1",
            "delayed cannot keep single layers in BF16",
        ),
        # FP8 weights; stage 1 trains the connector alone
        ("precision.fp8_params=true", "parallel.distributed_optimizer=true"),
        ("precision.fp8_params=true", "a frozen language model"),
    ],
)
def test_refused(overrides: str, message: str) -> None:
    assert message in refused(*FP8, *overrides.split(), hardware=H100)


@pytest.mark.parametrize(
    "switch",
    ["fp8_first_layers_bf16=1", "fp8_last_layers_bf16=1", "fp8_params=true"],
)
def test_switches_of_fp8_without_fp8_are_refused(switch: str) -> None:
    assert "without precision.fp8_recipe" in refused("precision=bf16", f"precision.{switch}")


def test_advice_on_the_row_works() -> None:
    layout = [
        *REAL,
        "stage=stage2",
        "precision=fp8_blockwise",
        "parallel=h100_64",
        "parallel.context=2",
    ]
    message = refused(*layout, "stage.sequence_length=16000", hardware=H100)
    # 4 tensor * 2 context ranks, each with whole blocks of 128 tokens
    assert "not a multiple of 1024" in message and "use stage.sequence_length=16384" in message
    check(compose([*layout, "stage.sequence_length=16384"]), H100)


def test_fp8_weights_pass_where_the_language_model_trains() -> None:
    layout = [*REAL, "stage=stage2", "parallel=h100_64", "precision=fp8"]
    check(compose([*layout, "precision.fp8_params=true"]), H100)
