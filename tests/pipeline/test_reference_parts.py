"""A reference pass in parts: together they are the whole, and what is missing is computed."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from conf.schema import Config
from data_shards.plan import Plan
from pipeline import reference as command
from pipeline.reference_parts import (
    Rows,
    find,
    listed,
    packing_digest,
    part_path,
    write_rows,
)
from tests.pipeline.small_run import SmallRun, losses, metrics, train_in_pool

DIGEST = "0123456789abcdef" * 4


def plan_of(steps: int, packs_per_step: int = 2, shift: int = 0) -> Plan:
    """Two samples a pack, numbered through."""
    packs = steps * packs_per_step
    rows = np.arange(packs * 2) + shift
    samples = np.stack([np.zeros_like(rows), rows], axis=1).astype(np.int32)
    offsets = np.arange(packs + 1, dtype=np.int64) * 2
    nothing = np.zeros(packs, np.int64)
    names = ("pairs",)
    return Plan("p", names, steps, packs_per_step, 512, 4, offsets, samples, nothing, nothing,
                {}, {}, {}, {})  # fmt: skip


def rows_of(plan: Plan, part: int, parts: int) -> Rows:
    """What that part of the pass would hold: a different number for each sample."""
    return {
        (int(which), int(row)): (-float(row), -float(row) - 0.5)
        for step in range(part, plan.steps, parts)
        for pack in plan.packs(step)
        for which, row in pack.tolist()
    }


def write(whole: Path, plan: Plan, part: int, parts: int, digest: str = DIGEST) -> Path:
    path = part_path(whole, part, parts)
    write_rows(path, rows_of(plan, part, parts), digest=digest, packing=packing_digest(plan))
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return tmp_path / "reference" / f"{DIGEST[:16]}.parquet"


def test_parts_of_any_number_add_up(whole: Path) -> None:
    plan = plan_of(7)
    assert find(whole, DIGEST, plan).missing == list(range(7))
    write(whole, plan, 1, 3)
    assert find(whole, DIGEST, plan).missing == [0, 2, 3, 5, 6]
    write(whole, plan, 0, 2)
    write(whole, plan, 2, 3)
    found = find(whole, DIGEST, plan)
    assert found.missing == [3] and not found.problems
    write(whole, plan, 3, 9)
    write(whole, plan, 8, 9)  # more parts than steps: an empty one
    found = find(whole, DIGEST, plan)
    assert found.missing == [] and not found.problems
    assert found.rows == rows_of(plan, 0, 1)
    assert len(listed(whole)) == 5


def test_foreign_and_damaged_parts_are_passed_over_by_name(whole: Path) -> None:
    plan = plan_of(6)
    other_weights = write(whole, plan, 0, 6, digest="f" * 64)
    other_packing = part_path(whole, 1, 6)
    write_rows(
        other_packing,
        rows_of(plan, 1, 6),
        digest=DIGEST,
        packing=packing_digest(plan_of(6, shift=1)),
    )
    cut = write(whole, plan, 2, 6)
    cut.write_bytes(cut.read_bytes()[:-20])
    short = part_path(whole, 3, 6)
    fewer = dict(list(rows_of(plan, 3, 6).items())[1:])
    write_rows(short, fewer, digest=DIGEST, packing=packing_digest(plan))
    renamed = part_path(whole, 4, 6)
    shutil.copy(write(whole, plan, 5, 6), renamed)
    strange = whole.with_name(f"{whole.stem}.part9-of-6.parquet")
    strange.write_bytes(b"")
    found = find(whole, DIGEST, plan)
    assert found.missing == [0, 1, 2, 3, 4]
    assert found.rows == rows_of(plan, 5, 6)
    assert len(found.problems) == 5
    for path in (other_weights, other_packing, cut, short, renamed):
        assert any(str(path) in problem for problem in found.problems), path


def run_part(config: Config, part: int, parts: int, expect: int = 0) -> str:
    words = ("pipeline.reference", "--part", str(part), "--parts", str(parts))
    return train_in_pool(config, expect=expect, program=words)


def reference(config: Config) -> Path:
    return Path(config.runs_dir) / config.run / config.stage.name / "reference"


@pytest.fixture
def again(small_run: SmallRun, trained: dict[str, str], request: pytest.FixtureRequest) -> Config:
    """Stage 3 once more, in a run of its own."""
    config = small_run.config("stage3", run=f"parts-{request.node.name[:40]}")
    config.init_from = str(small_run.root / "run" / "stage2")
    return config


def test_two_parts_are_the_whole_bit_for_bit(small_run: SmallRun, again: Config) -> None:
    assert "reference pairs in" in run_part(again, 0, 2)
    [first] = reference(again).iterdir()
    honest = first.read_bytes()
    first.write_bytes(honest[:-9])
    assert "it is computed again" in run_part(again, 0, 2)
    assert first.read_bytes() == honest
    run_part(again, 1, 2)
    assert len(list(reference(again).iterdir())) == 2
    output = train_in_pool(again)
    assert "reference log-probabilities" not in output
    [mine] = reference(again).iterdir()
    [alone] = reference(small_run.config("stage3")).iterdir()
    assert mine.name == alone.name
    assert mine.read_bytes() == alone.read_bytes()
    assert losses(again) == losses(small_run.config("stage3"))


def test_stage_computes_what_the_parts_lack(small_run: SmallRun, again: Config) -> None:
    """One part is missing, one is damaged, one is of other weights."""
    [alone] = reference(small_run.config("stage3")).iterdir()
    run_part(again, 0, 3)
    [good] = reference(again).iterdir()
    damaged = part_path(reference(again) / alone.name, 1, 3)
    damaged.write_bytes(good.read_bytes()[:100])
    foreign = part_path(reference(again) / alone.name, 2, 4)
    table = pq.read_table(good)
    metadata = {**table.schema.metadata, b"digest": b"f" * 64}
    pq.write_table(table.replace_schema_metadata(metadata), foreign)
    output = train_in_pool(again)
    assert f"WARNING: passed over {damaged} cannot be read" in output
    assert f"WARNING: passed over {foreign} belongs to other weights" in output
    assert "reference log-probabilities" in output
    [mine] = reference(again).iterdir()
    assert mine.read_bytes() == alone.read_bytes()
    assert metrics(again)[0]["loss"] == metrics(small_run.config("stage3"))[0]["loss"]


def test_part_needs_the_stage_before(small_run: SmallRun, trained: dict[str, str]) -> None:
    config = small_run.config("stage3", run="parts-too-early")
    assert "has not finished; run it first" in run_part(config, 0, 2, expect=1).splitlines()[-1]


def test_what_has_no_reference_is_refused(
    small_run: SmallRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="needs no reference"):
        command.run(small_run.config("stage1", run="parts-of-stage1"), 0, 2)
    words = ["reference", "--config", "nothing.yaml", "--part", "2", "--parts", "2"]
    monkeypatch.setattr("sys.argv", words)
    assert command.main() == 1
    assert "--part 2 is not in 0..1" in capsys.readouterr().err
