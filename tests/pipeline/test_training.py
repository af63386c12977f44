"""The real training command: three stages, hand-off, layouts, refusals."""

import json
import math
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.small_run import CODE, SmallRun, losses, metrics, train_in_pool

# Layouts sum float32 numbers in other orders; after six AdamW steps the losses (about 5) still
# agree to the seventh digit (4e-7 seen).
LAYOUT_TOLERANCE = 1e-5


def test_three_stages(small_run: SmallRun, trained: dict[str, str]) -> None:
    for number, stage in enumerate(("stage1", "stage2", "stage3"), start=1):
        config = small_run.config(stage)
        directory = small_run.stage_dir(config)
        done = json.loads((directory / "DONE.json").read_text())
        assert (done["number"], done["step"]) == (number, 6)
        assert (directory / done["checkpoint"] / "MANIFEST.json").is_file()
        manifest = json.loads((directory / done["checkpoint"] / "MANIFEST.json").read_text())
        assert manifest["code_version"] == CODE
        assert losses(config)[-1] < losses(config)[0]
        assert list((directory / "tensorboard").iterdir())
        assert "ETA" in trained[stage]
    assert json.loads((small_run.root / "run/stage1/DONE.json").read_text())["frozen"] == [
        "language",
        "vision",
    ]


def test_first_preference_loss_is_ln_2(small_run: SmallRun, trained: dict[str, str]) -> None:
    first = metrics(small_run.config("stage3"))[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("layout", ["tp2_sp", "pp2", "dp2", "cp2"])
def test_layouts_train_alike(small_run: SmallRun, stage1_dir: Path, layout: str) -> None:
    config = small_run.config("stage2", f"parallel={layout}", f"init_from={stage1_dir}", run=layout)
    train_in_pool(config)
    assert losses(config) == pytest.approx(losses(small_run.config("stage2")), abs=LAYOUT_TOLERANCE)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "cp2"])
def test_preference_layouts(small_run: SmallRun, trained: dict[str, str], layout: str) -> None:
    """The reference pass too: its file is written by that layout's ranks."""
    stage2 = small_run.root / "run" / "stage2"
    name = f"dpo-{layout}"
    config = small_run.config("stage3", f"parallel={layout}", f"init_from={stage2}", run=name)
    train_in_pool(config)
    alone = metrics(small_run.config("stage3"))
    for mine, expected in zip(metrics(config), alone, strict=True):
        for key in ("loss", "margin", "accuracy", "grad_norm"):
            assert mine[key] == pytest.approx(expected[key], abs=1e-4), key


def test_done_stage_stays(small_run: SmallRun, trained: dict[str, str]) -> None:
    config = small_run.config("stage2")
    before = (small_run.stage_dir(config) / "metrics.jsonl").read_bytes()
    train_in_pool(config)
    assert (small_run.stage_dir(config) / "metrics.jsonl").read_bytes() == before


def test_reference_is_reused(small_run: SmallRun, trained: dict[str, str], tmp_path: Path) -> None:
    config = small_run.config("stage3", run="reuse")
    stage_dir = small_run.stage_dir(config)
    config.init_from = str(small_run.root / "run" / "stage2")
    shutil.copytree(small_run.root / "run" / "stage3" / "reference", stage_dir / "reference")
    output = train_in_pool(config)
    assert "reference log-probabilities" not in output
    assert losses(config) == losses(small_run.config("stage3"))


def test_changed_reference_is_refused(small_run: SmallRun, trained: dict[str, str]) -> None:
    config = small_run.config("stage3", run="forged")
    config.init_from = str(small_run.root / "run" / "stage2")
    source = next((small_run.root / "run" / "stage3" / "reference").glob("*.parquet"))
    table = pq.read_table(source)
    shifted = table.set_column(
        table.schema.get_field_index("chosen"),
        table.schema.field("chosen"),
        pa.array([value - 1.0 for value in table.column("chosen").to_pylist()], pa.float32()),
    )
    target = small_run.stage_dir(config) / "reference" / source.name
    target.parent.mkdir(parents=True)
    pq.write_table(shifted, target)
    output = train_in_pool(config, expect=1)
    assert "not ln 2" in output.splitlines()[-1]
    assert not (small_run.stage_dir(config) / "DONE.json").exists()


def test_wrong_predecessor(small_run: SmallRun, trained: dict[str, str]) -> None:
    """Stage 3 from stage 1; a missing predecessor; another model; each in one line."""
    wrong = small_run.config("stage3", f"init_from={small_run.root / 'run/stage1'}", run="w1")
    assert "stage 3 begins from number 2" in train_in_pool(wrong, expect=1).splitlines()[-1]
    missing = small_run.config("stage2", run="w2")
    assert "has not finished; run it first" in train_in_pool(missing, expect=1).splitlines()[-1]
    other = small_run.config(
        "stage1",
        f"init_from={small_run.root / 'run/import'}",
        "model.text.rope_theta=5e5",
        run="w3",
    )
    assert "model.text.rope_theta" in train_in_pool(other, expect=1).splitlines()[-1]


def test_wrong_tokenizer(small_run: SmallRun, trained: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(small_run.tokenizer, tmp_path / "tokenizer")
    template = tmp_path / "tokenizer" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    config = small_run.config("stage1", run="tok")
    config.data = type(config.data)(
        **{**vars(config.data), "tokenizer": str(tmp_path / "tokenizer")}
    )
    last = train_in_pool(config, expect=1).splitlines()[-1]
    assert last.startswith("error: ") and "tokenizer" in last
