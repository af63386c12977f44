"""Packed samples as the columns of a plan, in memory or as files, while they stream by."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from conf.schema.stage import StageConfig
from data_shards.manifest_index import ColumnFile, map_column
from data_shards.packing import Packer
from data_shards.plan_sources import PlanSource, padded_tokens

# Column -> (dtype, values of one row of it); see `data_shards.plan.Plan`.
COLUMNS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "offsets": ("<i8", 1),
        "samples": ("<i4", 2),
        "tiles": ("<i4", 1),
        "attention": ("<i8", 1),
    }
)
_RELEASED = 1 << 22  # samples after which the manifests' pages are let go of
ROW_BITS = 40  # of a code: (source number, manifest row) in one integer


@dataclass(frozen=True)
class Written:
    """The columns of a plan, the SHA-256 (hex) of each one's values, and figures for people."""

    columns: Mapping[str, np.ndarray]
    contents: Mapping[str, str]
    report: Mapping[str, Any]


class _Held:
    """A column in memory, with the interface of a `ColumnFile`."""

    def __init__(self, dtype: str, width: int):
        self._dtype, self._width = dtype, width
        self._parts: list[np.ndarray] = []

    def append(self, values: np.ndarray) -> None:
        self._parts.append(np.ascontiguousarray(values, self._dtype))

    def values(self) -> np.ndarray:
        shape = (0, self._width) if self._width > 1 else (0,)
        return np.concatenate([np.empty(shape, self._dtype), *self._parts])


class PlanWriter:
    """Sends samples to the packer and closed packs to the plan's columns."""

    def __init__(self, sources: Sequence[PlanSource], stage: StageConfig, folder: Path | None):
        self.sources, self._stage, self._folder = sources, stage, folder
        self._columns: dict[str, Any] = {
            name: _Held(*kind) if folder is None else ColumnFile(folder / f"{name}.npy", *kind)
            for name, kind in COLUMNS.items()
        }
        self._columns["offsets"].append(np.zeros(1, np.int64))
        self._samples = self._packs = 0
        self._release_at = _RELEASED
        self._sums = np.zeros((len(sources), 4), np.int64)  # samples, tokens, targets, tiles

    def pack(self, packer: Packer, chunk: np.ndarray) -> int:
        """Pack int64 [n, 2] (source number, row); how many found a place."""
        placed = packer.add(*sizes(self.sources, chunk, self._stage))
        self._write(*packer.take())
        return placed

    def finish(self, packer: Packer) -> Written:
        """Close all packs and fill up the last step with empty ones."""
        packer.close()
        self._write(*packer.take())
        empty = -self._packs % self._stage.global_batch_size
        self._columns["offsets"].append(np.full(empty, self._samples, np.int64))
        for name in ("tiles", "attention"):
            self._columns[name].append(np.zeros(empty, np.int64))
        self._packs += empty
        columns, contents = self._close()
        return Written(columns, contents, self._report())

    def _close(self) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        arrays, digests = {}, {}
        for name, column in self._columns.items():
            if self._folder is None:
                arrays[name] = column.values()
                digests[name] = hashlib.sha256(arrays[name].tobytes()).hexdigest()
            else:
                described = column.close()
                digests[name] = described["sha256"]
                path = self._folder / f"{name}.npy"
                arrays[name] = map_column(path, described["dtype"], described["shape"])
        return arrays, digests

    def _write(self, codes: np.ndarray, lengths: np.ndarray) -> None:
        if not len(lengths):
            return
        chunk = np.stack([codes >> ROW_BITS, codes & (1 << ROW_BITS) - 1], axis=1)
        tiles, attention = np.empty(len(codes), np.int64), np.empty(len(codes), np.int64)
        for which, rows, mine in _by_source(chunk):
            manifest = self.sources[which].manifest
            chosen = manifest.tokens[rows].astype(np.int64)
            rejected = manifest.tokens_rejected[rows].astype(np.int64)
            tiles[mine] = manifest.tiles[rows]
            attention[mine] = (chosen * (chosen + 1) + rejected * (rejected + 1)) // 2
            targets = manifest.target_tokens[rows].sum(dtype=np.int64)
            sums = [len(rows), (chosen + rejected).sum(), targets, tiles[mine].sum()]
            self._sums[which] += np.array(sums, np.int64)
        ends = np.cumsum(lengths)
        self._columns["offsets"].append(self._samples + ends)
        self._columns["samples"].append(chunk)
        self._columns["tiles"].append(np.add.reduceat(tiles, ends - lengths))
        self._columns["attention"].append(np.add.reduceat(attention, ends - lengths))
        self._samples, self._packs = self._samples + len(codes), self._packs + len(lengths)
        if self._samples >= self._release_at:
            self._release_at = self._samples + _RELEASED
            for source in self.sources:
                source.manifest.release()

    def _report(self) -> dict[str, Any]:
        """Figures of a plan, ready for JSON."""
        samples, tokens, targets, tiles = self._sums.sum(axis=0).tolist()
        by_source = {
            source.mix.name: {
                "samples": mine[0],
                "share": mine[0] / max(samples, 1),
                "epochs": mine[0] / len(source.manifest),
                "tokens": mine[1],
                "token_share": mine[1] / max(tokens, 1),
            }
            for source, mine in zip(self.sources, self._sums.tolist(), strict=True)
        }
        return {
            "packs": self._packs,
            "samples": samples,
            "tokens": tokens,
            "target_tokens": targets,
            "tiles": tiles,
            "efficiency": tokens / max(self._packs * self._stage.sequence_length, 1),
            "sources": by_source,
        }


def sizes(
    sources: Sequence[PlanSource], chunk: np.ndarray, stage: StageConfig
) -> tuple[list[int], list[int], list[int]]:
    """(codes, padded tokens, tiles) of samples, int64 [n, 2] of source number and row."""
    tokens, tiles = np.empty(len(chunk), np.int64), np.empty(len(chunk), np.int64)
    for which, rows, mine in _by_source(chunk):
        manifest = sources[which].manifest
        tokens[mine] = padded_tokens(manifest, stage.document_multiple, rows)
        tiles[mine] = manifest.tiles[rows]
    codes = chunk[:, 0] << ROW_BITS | chunk[:, 1]
    return codes.tolist(), tokens.tolist(), tiles.tolist()


def _by_source(chunk: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(source, its rows, where they stand in the chunk)."""
    for which in np.unique(chunk[:, 0]).tolist():
        mine = np.flatnonzero(chunk[:, 0] == which)
        yield which, chunk[mine, 1], mine
