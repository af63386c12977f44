"""Our shards in webdataset and energon, their shards in our loader."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds

from conf.schema.data import SourceConfig
from data_shards.build import build_dataset
from data_shards.loader import Loader
from data_shards.manifest import Manifest
from data_shards.plan import sequential_plan
from data_shards.reader import DescriptorCache, ShardReader
from tests.data_shards import toys
from tests.data_shards.conftest import World
from tests.data_shards.test_in_place import chats, write_archives

ROOT = Path(__file__).parents[2]
ENERGON = ROOT / ".venv-energon" / "bin"
needs_energon = pytest.mark.skipif(
    not (ENERGON / "energon").exists(), reason="no energon here; `make setup-energon` installs it"
)


def members(manifest: Manifest) -> list[tuple[str, dict[str, bytes]]]:
    """(key, extension -> bytes) of every sample as our loader reads it, in order."""
    reader, found = ShardReader(manifest, DescriptorCache()), []
    for row in range(len(manifest)):
        record, images = reader.read(row)
        parts = {"json": record}
        for number, data in enumerate(images):
            extension = "jpg" if data.startswith(b"\xff\xd8") else "png"
            parts[f"{number}.{extension}"] = data
        found.append((manifest.key(row), parts))
    return found


def shard_paths(manifest: Manifest) -> list[Path]:
    return [manifest.shards_directory / shard.name for shard in manifest.info.shards]


def prepare(folder: Path, split: str) -> str:
    """`energon prepare`, as a script would call it; returns what it says."""
    options = ["--non-interactive", "--split-ratio", split, "--sample-type", "CrudeWebdataset"]
    command = [str(ENERGON / "energon"), "prepare", *options, "--num-workers", "1", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["chats", "more", "pairs"])
def test_our_shards_open_in_webdataset(world: World, name: str) -> None:
    manifest = world.manifests[name]
    paths = [str(path) for path in shard_paths(manifest)]
    theirs = [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in wds.WebDataset(paths, shardshuffle=False)
    ]
    assert theirs == members(manifest)
    decoded: Any = wds.WebDataset(paths, shardshuffle=False).decode("pil")
    for sample in decoded:
        assert {"messages", "source", "licence", "origin"} <= set(sample["json"])
        images = [value for key, value in sample.items() if key.endswith((".jpg", ".png"))]
        assert all(image.mode == "RGB" and min(image.size) >= 4 for image in images)


@needs_energon
def test_our_shards_open_in_energon(world: World, tmp_path: Path) -> None:
    manifest = world.manifests["chats"]
    folder = tmp_path / "energon"
    shutil.copytree(manifest.shards_directory, folder / "shards")
    assert "Done" in prepare(folder, "0,1,0")
    info = json.loads((folder / ".nv-meta" / ".info.json").read_text())
    assert sum(info["shard_counts"].values()) == len(manifest)
    script = ROOT / "tools" / "benchmarks" / "data" / "energon_samples.py"
    command = [str(ENERGON / "python"), str(script), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    theirs = [json.loads(line) for line in done.stdout.splitlines()]
    ours = [
        {"key": key, "parts": {n: hashlib.sha256(d).hexdigest() for n, d in parts.items()}}
        for key, parts in members(manifest)
    ]
    assert theirs == ours


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with archives of webdataset, prepared by energon where that is here."""
    folder = tmp_path_factory.mktemp("foreign")
    write_archives(folder / "shards", [chats(9), chats(8, 40)], "{shard}/{key:04d}")
    if (ENERGON / "energon").exists():
        prepare(folder, "1,0,0")
    return folder


def test_shards_of_webdataset_are_train_ready_in_place(
    foreign: Path, tmp_path: Path, world: World
) -> None:
    batches = []
    for in_place in (True, False):
        source = SourceConfig(
            str(foreign / "shards" / "*.tar"), format="webdataset", in_place=in_place
        )
        root = tmp_path / str(in_place)
        data = toys.data_config(root, Path(world.data.tokenizer), theirs=source)
        data.mix = {"stage2": {"theirs": 1.0}}
        digest = world.tokenizer.digest()
        manifest = build_dataset("theirs", source, data, toys.GEOMETRY, digest)
        assert len(manifest) == 17
        assert bool(manifest.info.layout) == in_place
        manifests = {"theirs": manifest}
        plan = sequential_plan(manifests, data, toys.stage(global_batch_size=1))
        loader = Loader(plan, manifests, world.tokenizer, toys.GEOMETRY)
        batches.append([batch for step in range(plan.steps) for batch in loader.step(step)])
        assert loader.n_masked == 0
    first, second = batches
    assert len(first) == len(second) > 1 and any(batch.n_images for batch in first)
    assert all(one.equals(other) for one, other in zip(first, second, strict=True))


@needs_energon
def test_shards_prepared_by_energon_are_indexed_in_place(foreign: Path) -> None:
    # The test above read them; nothing of energon's was taken for an archive or changed.
    assert (foreign / ".nv-meta" / "dataset.yaml").exists()
    assert sorted(path.name for path in (foreign / "shards").iterdir()) == [
        "s-000.tar", "s-000.tar.idx", "s-001.tar", "s-001.tar.idx",
    ]  # fmt: skip
