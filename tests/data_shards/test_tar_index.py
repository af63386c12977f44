"""The strict tar scanner against archives of Python's tarfile, GNU tar and webdataset, whole and
damaged."""

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds

from data_shards.tar_headers import BLOCK
from data_shards.tar_index import TarError, read_member, samples, scan

FILES = {"a/000.jpg": b"j" * 700, "a/000.json": b"{}", "a/001.jpg": b"", "a/001.txt": b"x" * 512}


def archive(path: Path, files: dict[str, bytes], mode: Any = "w", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def contents(path: Path) -> dict[str, bytes]:
    with open(path, "rb") as file:
        return {m.name: read_member(path, file.fileno(), m) for m in scan(path)}


def patched(path: Path, change: Callable[[bytearray], None]) -> Path:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    return path


def rechecked(header: bytearray) -> bytearray:
    """The header with a checksum that fits."""
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return header


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(tmp_path: Path, form: int) -> None:
    files = dict(FILES)
    if form != tarfile.USTAR_FORMAT:
        files["long/" + "n" * 300 + ".json"] = b"[]"
        files["ação/é.txt"] = "olá".encode()
    path = archive(tmp_path / "x.tar", files, format=form)
    assert contents(path) == files
    with tarfile.open(path) as tar:
        assert [(m.name, m.offset_data, m.size) for m in tar] == [
            (m.name, m.offset, m.size) for m in scan(path)
        ]


@pytest.mark.parametrize("form", ["ustar", "gnu", "posix", "oldgnu", "v7"])
def test_reads_what_gnu_tar_writes(tmp_path: Path, form: str) -> None:
    if shutil.which("tar") is None:
        pytest.skip("no tar on this machine")
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "x.tar"
    subprocess.run(
        ["tar", "--sort=name", f"--format={form}", "-cf", path, "-C", tmp_path, "./a"], check=True
    )
    assert contents(path) == {f"./{name}": content for name, content in FILES.items()}
    assert [sample.key for sample in samples(path)] == ["./a/000", "./a/001"]


def test_large_sizes_and_prefixes(tmp_path: Path) -> None:
    name = "p" * 120 + "/" + "n" * 90 + ".bin"
    path = archive(tmp_path / "x.tar", {name: b"abc"}, format=tarfile.USTAR_FORMAT)
    assert contents(path) == {name: b"abc"}
    info = tarfile.TarInfo("huge.bin")
    info.size = 9 << 30
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):  # base 256, and a PAX record
        with open(path, "wb") as file:
            head = info.tobuf(form)
            file.write(head)
            file.truncate(len(head) + info.size + 2 * BLOCK)  # a hole
        (member,) = scan(path)
        assert (member.offset, member.size) == (len(head), info.size)


def test_groups_as_webdataset(tmp_path: Path) -> None:
    names = ["d.x/a.JPG", "d.x/a.seg.png", "d.x/a.json", "b.0.jpg", "b.1.jpg", "plain", ".hidden"]
    names += ["__index__", "__meta__/x.json", "c.json", "x/.jpg", "e."]
    path = archive(tmp_path / "x.tar", {name: name.encode() for name in names})
    theirs = [
        (sample["__key__"], {k: v for k, v in sample.items() if not k.startswith("__")})
        for sample in wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
    ]
    ours = []
    with open(path, "rb") as file:
        for sample in samples(path):
            assert sample.problem is None
            members = {e: read_member(path, file.fileno(), m) for e, m in sample.members.items()}
            ours.append((sample.key, members))
    assert ours == theirs


def test_repeated_and_split_samples_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        for name in ["a.jpg", "a.JPG", "b.jpg", "c.jpg", "b.json"]:
            tar.addfile(tarfile.TarInfo(name))
    found = [(sample.key, sample.problem) for sample in samples(path)]
    assert found == [
        ("a", "its member a.JPG stands twice"),
        ("b", None),
        ("c", None),
        ("b", "its key b stands earlier in the archive already"),
    ]
    third, last = list(samples(path))[2:]
    assert list(samples(path, third.offset)) == [third, last]


@pytest.mark.parametrize(
    ("name", "kind", "cause"),
    [
        ("a.json", tarfile.SYMTYPE, "a symbolic link"),
        ("a.json", tarfile.LNKTYPE, "a hard link"),
        ("a.json", tarfile.CHRTYPE, "a character device"),
        ("a.json", tarfile.FIFOTYPE, "a named pipe"),
        ("../a.json", tarfile.REGTYPE, "leaves the archive"),
        ("x/../../a.json", tarfile.REGTYPE, "leaves the archive"),
        ("x\\..\\a.json", tarfile.REGTYPE, "leaves the archive"),
        ("/etc/a.json", tarfile.REGTYPE, "is absolute"),
        ("C:/a.json", tarfile.REGTYPE, "is absolute"),
        ("a.json/", tarfile.REGTYPE, "no file by its name"),
        ("a\n.json", tarfile.REGTYPE, "control characters"),
        ("a\udcff.json", tarfile.REGTYPE, "not UTF-8"),
        ("link", tarfile.SYMTYPE, "a symbolic link"),
    ],
)
def test_unusable_members_are_named_not_followed(
    tmp_path: Path, name: str, kind: bytes, cause: str
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("0.json"))
        tar.addfile(info)
        tar.addfile(tarfile.TarInfo("z.json"))
    first, bad, last = samples(path)
    assert first.problem is None and last.problem is None
    assert bad.problem is not None and cause in bad.problem and not bad.members


def test_every_flipped_bit_of_a_header_is_an_error(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar", FILES, format=tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    second = [m.header_offset for m in scan(path)][1]
    for bit in range(0, 8 * BLOCK, 13):
        damaged = bytearray(whole)
        damaged[second + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        # Within the checksum field some bits mean nothing: a blank for a NUL.
        if 148 <= bit // 8 < 156 and names_of(path) == list(FILES):
            continue
        with pytest.raises(TarError, match=f"byte {second}"):
            list(scan(path))


def names_of(path: Path) -> list[str] | None:
    try:
        return [member.name for member in scan(path)]
    except TarError:
        return None


def test_every_shortened_archive_is_an_error(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.tar", FILES)
    whole = path.read_bytes()
    end = max(m.offset + m.size + -m.size % BLOCK for m in scan(path))
    assert len(whole) > end + 2 * BLOCK  # tarfile fills up a tape record
    for size in [*range(0, end + BLOCK + 1, 100), end, end + BLOCK, end + BLOCK + 1]:
        path.write_bytes(whole[:size])
        with pytest.raises(TarError, match=r"cut short|ends (after|within)"):
            list(scan(path))
    path.write_bytes(whole[: end + 2 * BLOCK])
    assert len(list(scan(path))) == len(FILES)


def _zero_header(data: bytearray) -> None:
    data[2 * BLOCK + BLOCK : 2 * BLOCK + 2 * BLOCK] = bytes(BLOCK)


def _swap_size(data: bytearray) -> None:
    data[124:136] = b"00000000001\0"
    data[:BLOCK] = rechecked(data[:BLOCK])


def _negative(data: bytearray) -> None:
    data[124:136] = b"\xff" * 12
    data[:BLOCK] = rechecked(data[:BLOCK])


def _link_with_content(data: bytearray) -> None:
    data[156] = ord("1")
    data[:BLOCK] = rechecked(data[:BLOCK])


def _unknown_type(data: bytearray) -> None:
    data[156] = ord("S")
    data[:BLOCK] = rechecked(data[:BLOCK])


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (_zero_header, "byte 1536.*zeroed header"),
        (_swap_size, "byte 1024: .*no tar header|byte 1024: its checksum"),
        (_negative, "size field"),
        (_link_with_content, "claims content"),
        (_unknown_type, "type b'S'"),
        (lambda data: data.extend(b"rubbish" * 512), "after the end"),
        (lambda data: data.extend(bytes(20_000)), "zero bytes at the end"),
        (lambda data: data.__setitem__(slice(1536, len(data)), bytes(len(data) - 1536)), None),
    ],
)
def test_damage_is_named(
    tmp_path: Path, change: Callable[[bytearray], None], cause: str | None
) -> None:
    files: dict[str, bytes] = {**FILES, "z.bin": b"z" * 20_000}
    path = patched(archive(tmp_path / "x.tar", files, format=tarfile.USTAR_FORMAT), change)
    with pytest.raises(TarError, match=cause) as error:
        list(scan(path))
    assert str(path) in str(error.value) and "copy the archive again" in str(error.value)


def test_webdataset_loses_what_a_zeroed_header_hides(tmp_path: Path) -> None:
    # Why this scanner exists: no exception there, and two samples of three are gone.
    files = {f"{n}.bin": b"x" * 100 for n in range(3)}
    path = archive(tmp_path / "x.tar", files, format=tarfile.USTAR_FORMAT)
    patched(path, lambda data: data.__setitem__(slice(2 * BLOCK, 3 * BLOCK), bytes(BLOCK)))
    assert len(list(wds.WebDataset(str(path), shardshuffle=False))) == 1
    with pytest.raises(TarError, match="byte 1024: a zeroed header, but the archive goes on"):
        list(samples(path))


def test_a_prefix_that_only_some_readers_see_is_named(tmp_path: Path) -> None:
    def change(data: bytearray) -> None:
        data[257:265] = b"ustar  \0"  # GNU's magic: the field means something else there
        data[345:350] = b"other"
        data[:BLOCK] = rechecked(data[:BLOCK])

    path = archive(tmp_path / "x.tar", {"a.bin": b""}, format=tarfile.USTAR_FORMAT)
    (sample,) = samples(patched(path, change))
    assert sample.problem == "its member 'a.bin' has two names in one header"
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["other/a.bin"]


def _pax(records: bytes, then: bytes = b"") -> bytes:
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    body = records + bytes(-len(records) % BLOCK)
    return header.tobuf(tarfile.USTAR_FORMAT) + body + then


def _plain(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = len(content), kind
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK)


END = bytes(2 * BLOCK)


@pytest.mark.parametrize(
    ("parts", "cause"),
    [
        ([_pax(b"12 path=a.b\n" * 2), _plain("a")], "twice"),
        ([_pax(b"99 path=a.b\n"), _plain("a")], "malformed"),
        ([_pax(b"10 size=7\n"), _plain("a.json", b"12345")], "one place and 7"),
        ([_pax(b"11 size=-1\n"), _plain("a.json")], "not a number"),
        ([_pax(b"22 GNU.sparse.major=1\n"), _plain("a.json")], "sparse"),
        ([_pax(b"12 path=a.b\n")], "no member"),
        ([_pax(b"12 path=a.b\n"), _pax(b"12 path=a.b\n"), _plain("a")], "type b'x'"),
        ([_plain("x", b"n.json\0", b"L"), _pax(b"12 path=a.b\n"), _plain("a")], "differ"),
        ([_plain("x", b"\0n.json\0", b"L"), _plain("a.json")], "long name is empty"),
        ([_plain("x", b"n.json\0x", b"L"), _plain("a.json")], "does not end in the one NUL"),
        ([_plain("x", b"n.json", b"L"), _plain("a.json")], "does not end in the one NUL"),
        ([_pax(b"8 path=\n"), _plain("a.json")], "PAX name is empty"),
        ([_pax(b"12 path=a\0b\n"), _plain("a.json")], "PAX name is empty or holds"),
        ([_plain("x", b"12 path=a.b\n", b"g"), _plain("a")], "global header"),
        ([_plain("x", bytes(2 << 20), b"L"), _plain("a")], "extended header of"),
    ],
)
def test_ambiguous_extended_headers_are_refused(
    tmp_path: Path, parts: Sequence[bytes], cause: str
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(b"".join(parts) + END)
    with pytest.raises(TarError, match=cause):
        list(scan(path))


def test_a_global_comment_is_skipped(tmp_path: Path) -> None:
    # `git archive` begins with one.
    path = tmp_path / "x.tar"
    path.write_bytes(_plain("x", b"16 comment=hello\n"[:16] + b"", b"g") + _plain("a.json") + END)
    with pytest.raises(TarError, match="malformed"):
        list(scan(path))
    path.write_bytes(_plain("x", b"17 comment=hello\n", b"g") + _plain("a.json") + END)
    assert [(m.name, m.header_offset) for m in scan(path)] == [("a.json", 2 * BLOCK)]


def test_what_is_no_plain_archive_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TarError, match="cannot be opened"):
        list(scan(tmp_path / "absent.tar"))
    with pytest.raises(TarError, match="no regular file"):
        list(scan(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TarError, match="no regular file"):
        list(scan(tmp_path / "pipe"))
    with pytest.raises(TarError, match="compressed with gzip"):
        list(scan(archive(tmp_path / "x.tar.gz", {"a.bin": os.urandom(999)}, mode="w:gz")))


def _mutated(whole: bytes, generator: np.random.Generator) -> bytes:
    """Some bytes changed, blocks swapped or zeroed, the end cut; checksums then made to fit."""
    data = bytearray(whole)
    blocks = len(data) // BLOCK
    for _ in range(generator.integers(1, 4)):
        kind, block = generator.random(), int(generator.integers(blocks)) * BLOCK
        if kind < 0.5:
            field = int(generator.choice([0, 1, 99, 124, 130, 135, 156, 157, 257, 263, 345]))
            data[block + field] = int(generator.choice([0, 32, 46, 47, 49, 53, 76, 120, 128, 255]))
        elif kind < 0.7:
            data[block : block + BLOCK] = bytes(BLOCK)
        elif kind < 0.9:
            other = int(generator.integers(blocks)) * BLOCK
            content = data[block : block + BLOCK]
            data[block : block + BLOCK] = data[other : other + BLOCK]
            data[other : other + BLOCK] = content
        else:
            data = data[: block + int(generator.integers(BLOCK))] + bytes(BLOCK)
            blocks = len(data) // BLOCK
    for block in range(0, len(data) - BLOCK + 1, BLOCK):
        if data[block + 257 : block + 262] == b"ustar" and generator.random() < 0.9:
            data[block : block + BLOCK] = rechecked(data[block : block + BLOCK])
    return bytes(data)


def test_what_is_read_of_forged_archives_is_what_tarfile_reads(tmp_path: Path) -> None:
    generator = np.random.default_rng(5)
    path, read, refused = tmp_path / "x.tar", 0, 0
    files = {**FILES, "n" * 120 + ".txt": b"long", "é.bin": b"e" * 600}
    forms = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    wholes = [archive(path, files, format=form).read_bytes() for form in forms]
    for number in range(300):
        path.write_bytes(_mutated(wholes[number % 2], generator))
        try:
            ours = {(m.offset, m.size): m for m in scan(path)}
        except TarError:
            refused += 1
            continue
        read += 1
        try:
            with tarfile.open(path) as tar:
                theirs = [member for member in tar if member.isreg()]
        except tarfile.ReadError:
            continue  # it also reads fields that say nothing of the content
        for member in theirs:  # it may have stopped early, without a word
            mine = ours[member.offset_data, member.size]
            assert mine.problem is not None or mine.name == member.name
    assert read > 30 and refused > 100
