"""The plan on disk: whole or absent, used again, never another one's."""

import dataclasses
import os
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from conf.schema.data import DataConfig
from data_shards import plan_file
from data_shards.manifest import Manifest, ManifestError, read_manifest
from data_shards.plan import PlanError, build_plan, plan_inputs, sequential_plan
from data_shards.plan_file import ensure_plan, plan_folder, read_plan
from data_shards.plan_writer import COLUMNS
from tests.data_shards import toys
from tests.data_shards.made_manifest import made_manifest

DATA = DataConfig(root="-", tokenizer="-", mix={"stage2": {"a": 0.7, "b": 0.3}})
Manifests = dict[str, Manifest]


@pytest.fixture
def manifests(tmp_path: Path) -> Manifests:
    tokens = [40 + 7 * n % 150 for n in range(60)]
    return {
        "a": made_manifest(tmp_path / "data" / "a", tokens, [1] * 60),
        "b": made_manifest(tmp_path / "data" / "b", tokens[::-1], [2] * 60),
    }


def refuse(*_: object) -> None:
    raise AssertionError("planned again")


@pytest.mark.parametrize("kind", ["training", "sequential"])
def test_the_file_is_the_plan_and_is_used_again(
    manifests: Manifests, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, stage = tmp_path / "stage2" / "plan", toys.stage(steps=9, document_multiple=8)
    plan = ensure_plan(kind, root, manifests, DATA, stage)
    in_memory = (build_plan if kind == "training" else sequential_plan)(manifests, DATA, stage)
    for name in (field.name for field in dataclasses.fields(plan)):
        first, second = getattr(plan, name), getattr(in_memory, name)
        if name in COLUMNS:
            assert np.array_equal(first, second) and first.dtype == second.dtype
            assert not first.flags.writeable
        else:
            assert first == second, name
    assert [path.name for path in root.iterdir()] == [
        plan_folder(root, plan_inputs(kind, manifests, DATA, stage)).name
    ]
    monkeypatch.setitem(plan_file.KINDS, kind, refuse)
    again = ensure_plan(kind, root, manifests, DATA, stage)
    assert again.digest == plan.digest and np.array_equal(again.samples, plan.samples)
    with pytest.raises(AssertionError, match="planned again"):
        ensure_plan(kind, root, manifests, DATA, toys.stage(steps=9, global_batch_size=2))


def test_every_damage_is_found_and_mended(manifests: Manifests, tmp_path: Path) -> None:
    root, stage = tmp_path / "plan", toys.stage()
    plan = ensure_plan("training", root, manifests, DATA, stage)
    (folder,) = root.iterdir()
    generator = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        for damage in ("flip", "cut", "gone"):
            whole = path.read_bytes()
            position = int(generator.integers(len(whole)))
            if damage == "flip":
                changed = bytearray(whole)
                changed[position] ^= 1 << int(generator.integers(8))
                path.write_bytes(bytes(changed))
            elif damage == "cut":
                path.write_bytes(whole[:position])
            else:
                path.unlink()
            with pytest.raises(PlanError, match=str(folder)):
                read_plan(folder, verify=True)
            said: list[str] = []
            mended = ensure_plan("training", root, manifests, DATA, stage, said.append)
            assert mended.digest == plan.digest and path.read_bytes() == whole
            assert "it is computed again" in said[0]
            assert said[1:] == [
                line for line in said if line.startswith("training plan of 5 steps")
            ]
            assert [each.name for each in root.iterdir()] == [folder.name]


def test_a_column_of_another_plan(manifests: Manifests, tmp_path: Path) -> None:
    root = tmp_path / "plan"
    ensure_plan("training", root, manifests, DATA, toys.stage())
    (first,) = root.iterdir()
    ensure_plan("training", root, manifests, DATA, toys.stage(seed=3))
    (second,) = set(root.iterdir()) - {first}
    os.replace(second / "tiles.npy", first / "tiles.npy")
    with pytest.raises(PlanError, match="tiles.npy does not match its digest"):
        read_plan(first, verify=True)


def test_a_manifest_is_checked_in_full_before_planning(
    manifests: Manifests, tmp_path: Path
) -> None:
    path = manifests["b"].path
    tokens = np.lib.format.open_memmap(path.parent / "index" / "tokens.npy", mode="r+")
    tokens[5] += 1
    tokens.flush()
    damaged = {**manifests, "b": read_manifest(path)}
    with pytest.raises(ManifestError, match="tokens.npy does not match its digest"):
        ensure_plan("training", tmp_path / "plan", damaged, DATA, toys.stage())
    assert not list(tmp_path.glob("plan/*"))


def test_what_cannot_be_planned_leaves_nothing(manifests: Manifests, tmp_path: Path) -> None:
    root = tmp_path / "plan"
    with pytest.raises(PlanError, match="do not fit"):
        ensure_plan("training", root, manifests, DATA, toys.stage(sequence_length=64))
    assert not list(root.iterdir())
    with pytest.raises(PlanError, match="no manifest for b"):
        ensure_plan("training", root, {"a": manifests["a"]}, DATA, toys.stage())


def _plan(root: Path, names: dict[str, Path], seconds: float) -> None:
    time.sleep(max(0.0, seconds - time.time()))  # all at once
    manifests = {name: read_manifest(path) for name, path in names.items()}
    ensure_plan("training", root, manifests, DATA, toys.stage(steps=40))


def test_several_planners_at_once_and_killed_ones(manifests: Manifests, tmp_path: Path) -> None:
    """As elements of an array do; one is killed at once, what it left is no plan."""
    root = tmp_path / "plan"
    names = {name: manifest.path for name, manifest in manifests.items()}
    context = get_context("fork")
    at = time.time() + 0.2
    planners = [context.Process(target=_plan, args=(root, names, at)) for _ in range(4)]
    for planner in planners:
        planner.start()
    time.sleep(max(0.0, at - time.time()) + 0.02)
    planners[0].kill()
    for planner in planners:
        planner.join()
    assert [planner.exitcode for planner in planners[1:]] == [0, 0, 0]
    plan = ensure_plan("training", root, manifests, DATA, toys.stage(steps=40))
    assert plan.digest == build_plan(manifests, DATA, toys.stage(steps=40)).digest
    assert len([path for path in root.iterdir() if not path.name.startswith(".")]) == 1


def test_what_killed_planners_left_goes_after_a_day(manifests: Manifests, tmp_path: Path) -> None:
    root = tmp_path / "plan"
    for name, age in ((".old.tmp", 2 * 86_400), (".young.tmp", 60)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    ensure_plan("training", root, manifests, DATA, toys.stage())
    assert sorted(path.name for path in root.glob(".*")) == [".young.tmp"]
