"""PNG and JPEG files put together and taken apart by hand."""

import struct
import zlib

import numpy as np


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these chunks."""
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in chunks:
        body = name + content
        parts.append(struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body)))
    return b"".join(parts)


def chunks_of(data: bytes) -> list[tuple[bytes, bytes]]:
    found, position = [], 8
    while position < len(data):
        length = int.from_bytes(data[position : position + 4])
        start = position + 8
        found.append((data[position + 4 : start], data[start : start + length]))
        position = start + length + 4
    return found


def header(width: int, height: int, depth: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def rows(samples: np.ndarray) -> tuple[bytes, bytes]:
    """Unfiltered rows of bytes, uint8 [height, bytes of a row], as IDAT."""
    plain = np.concatenate([np.zeros((len(samples), 1), np.uint8), samples], 1)
    return b"IDAT", zlib.compress(plain.tobytes())


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


def after_start(data: bytes, *segments: bytes) -> bytes:
    """A JPEG with segments put behind its start marker."""
    return data[:2] + b"".join(segments) + data[2:]


def without_jfif(data: bytes) -> bytes:
    assert data[2:4] == b"\xff\xe0"
    return data[:2] + data[4 + int.from_bytes(data[4:6]) :]


def end() -> tuple[bytes, bytes]:
    return b"IEND", b""
