"""A WebDataset archive with hostile members: links, devices, paths, bombs, damage."""

import io
import json
import tarfile
from pathlib import Path

from tests.data_shards import toys
from tests.data_shards.hostile.pictures import drawn


def record(name: str) -> bytes:
    turns = [
        {"role": "user", "content": f"<image>\nQue é {name}?"},
        {"role": "assistant", "content": "Uma imagem."},
    ]
    return json.dumps({"messages": turns}).encode()


class Archive:
    """A tar file that grows."""

    def __init__(self, path: Path):
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)

    def file(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def special(self, name: str, kind: bytes, target: str = "") -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        self._tar.addfile(info)

    def close(self) -> None:
        self._tar.close()


GOOD = ("good", "last")
SPECIAL = (
    ("link", tarfile.SYMTYPE, "/etc/passwd", "is a symbolic link"),
    ("hard", tarfile.LNKTYPE, "good.png", "is a hard link"),
    ("device", tarfile.CHRTYPE, "", "is a .*device"),
    ("pipe", tarfile.FIFOTYPE, "", "is a .*pipe"),
)
PATHS = (
    ("../up", "leaves the archive"),
    ("/root/key", "is absolute"),
    ("a/../../b", "leaves the archive"),
    ("C:/x", "is absolute"),
)
RECORDS = (
    ("bomb", b'{"messages": ' + b"[" * 100_000, "not JSON|nested too deeply"),
    ("list", b"[]", "not a JSON object"),
    ("twice", record("good")[:-3], "not JSON"),
)


def write(path: Path) -> None:
    """One archive: two good samples with bad ones between them."""
    archive = Archive(path)
    picture = toys.encoded(drawn(60))
    archive.file("good.json", record("good"))
    archive.file("good.png", picture)
    for key, kind, target, _ in SPECIAL:
        archive.file(f"{key}.json", record(key))
        archive.special(f"{key}.png", kind, target)
    for key, _ in PATHS:
        archive.file(f"{key}.json", record(key))
        archive.file(f"{key}.png", picture)
    for key, data, _ in RECORDS:
        archive.file(f"{key}.json", data)
        archive.file(f"{key}.png", picture)
    archive.file("broken.json", record("broken"))
    archive.file("broken.png", picture[:-30])
    archive.file("good.json", record("good again"))
    archive.file("last.json", record("last"))
    archive.file("last.png", toys.encoded(drawn(61)))
    archive.close()


def refused() -> list[tuple[str, str]]:
    """(key, regex of the reason) of each sample that is not good, in their order."""
    return [
        *((key, why) for key, _, _, why in SPECIAL),
        *PATHS,
        *((key, why) for key, _, why in RECORDS),
        ("broken", "truncated"),
        ("good", "stands earlier in the archive"),
    ]
