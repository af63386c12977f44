"""The archives that all sides read: one tar for each size of picture, written by webdataset."""

import hashlib
import json
import shutil
import subprocess
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import PIL

from data_shards.manifest import ManifestInfo, rows_to_table, write_manifest
from data_shards.tar_index import read_member, samples
from data_shards.writer import ShardInfo
from models.anyres import AnyresGeometry
from tools.benchmarks.data.pictures import jpegs
from tools.benchmarks.machine import REPOSITORY

ENERGON = REPOSITORY / ".venv-energon"
NO_ENERGON = "`make setup-energon` makes the environment of energon"
# 3x3 pinpoints: every canvas of 1 to 3 tiles along both sides.
NINE = tuple((384 * rows, 384 * columns) for rows in (1, 2, 3) for columns in (1, 2, 3))


@dataclass(frozen=True)
class ImageSet:
    """Pictures of one size.

    Attributes:
        name: for the table.
        height, width: px, of every picture.
        geometry: how they are tiled.
        folder: the data set's, with manifest.parquet; the archive is under `energon`/shards.
        count: pictures.
    """

    name: str
    height: int
    width: int
    geometry: AnyresGeometry
    folder: Path
    count: int

    @property
    def archive(self) -> Path:
        """The tar that everyone reads."""
        return self.energon / "shards" / "pictures-000000.tar"

    @property
    def energon(self) -> Path:
        """The folder as energon wants it."""
        return self.folder / "energon"

    @property
    def n_tiles(self) -> int:
        """Tiles of one picture."""
        return self.geometry.n_tiles(self.height, self.width)


def write_set(image_set: ImageSet, seed: int) -> None:
    """The archive and our index of it; the archive is left alone when we index it."""
    import webdataset

    shutil.rmtree(image_set.folder, ignore_errors=True)  # energon prepares nothing twice
    image_set.archive.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(image_set.archive), mtime=0) as writer:
        files = jpegs(image_set.count, image_set.height, image_set.width, seed)
        for number, data in enumerate(files):
            record = json.dumps({"caption": f"Imagem {number}."}).encode()
            writer.write({"__key__": f"{number:06d}", "json": record, "jpg": data})
    _write_manifest(image_set)


def prepare_energon(sets: Sequence[ImageSet]) -> bool:
    """Run `energon prepare` on the archives; False where energon is not installed."""
    command = ENERGON / "bin" / "energon"
    if not command.exists():
        return False
    options = ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset"]
    for image_set in sets:
        subprocess.run(
            [str(command), "prepare", *options, "--num-workers", "1", str(image_set.energon)],
            check=True,
            capture_output=True,
            timeout=300,
        )
    return True


def _write_manifest(image_set: ImageSet) -> None:
    path, rows = image_set.archive, []
    with open(path, "rb") as file:
        for sample in samples(path):
            record, picture = sample.members["json"], sample.members["jpg"]
            content = {m.name: read_member(path, file.fileno(), m) for m in (record, picture)}
            places = [
                {
                    "offset": member.offset,
                    "size": member.size,
                    "crc32": zlib.crc32(content[member.name]),
                    "sha256": hashlib.sha256(content[member.name]).digest(),
                }
                for member in (record, picture)
            ]
            size = {"width": image_set.width, "height": image_set.height}
            rows.append(
                {
                    "key": sample.key,
                    "shard": 0,
                    **{f"json_{name}": value for name, value in places[0].items()},
                    "images": [{**places[1], **size, "tiles": image_set.n_tiles}],
                    "tokens": 1,
                    "target_tokens": 1,
                    "tokens_rejected": 0,
                    "target_tokens_rejected": 0,
                    "tiles": image_set.n_tiles,
                    **dict.fromkeys(("variety", "language", "source", "licence"), ""),
                }
            )
    whole = path.read_bytes()
    shard = ShardInfo(path.name, len(whole), hashlib.sha256(whole).hexdigest(), len(rows))
    info = ManifestInfo(
        name=image_set.folder.name,
        preference=False,
        tokenizer_digest="",
        geometry_digest=image_set.geometry.digest(),
        pillow=PIL.__version__,
        shards=(shard,),
        inputs_digest="",
        quarantined=0,
        shards_root=str(path.parent.resolve()),
    )
    write_manifest(image_set.folder / "manifest.parquet", rows_to_table(rows), info)
