"""What a build has to do: which data sets, from what, compared with what."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from conf.schema.data import DataConfig, SourceConfig
from data_shards.build_inputs import Compared, dataset_digest, examine_digest
from data_shards.dataset_folder import DatasetFolder
from data_shards.examined import ExaminedFolder
from data_shards.manifest import Manifest, ManifestError, read_manifest
from data_shards.prepare import Settings
from data_shards.sources import open_source
from data_shards.sources.blocks import Block
from data_shards.workers import EXAMINE, WRITE, Recipe
from models.anyres import AnyresGeometry

_MAX_NAME = 64  # characters of a source's name, part of file names


class BuildError(ValueError):
    """A data set that cannot be built; the message says why and what to do."""


@dataclass(frozen=True)
class Share:
    """The k-th of n parts of the blocks of one phase of one source."""

    source: str
    phase: str
    part: int
    parts: int

    @classmethod
    def parse(cls, source: str, phase: str, part: str) -> "Share | None":
        """From the words of the command line; None where they ask for no share.

        Raises:
            BuildError: words that are none.
        """
        if not source and not phase:
            return None
        match = re.fullmatch(r"(\d+)/(\d+)", part)
        if not source or phase not in (EXAMINE, WRITE) or match is None:
            raise BuildError(
                f"source={source} phase={phase} part={part}: a share needs source=NAME, "
                f"phase={EXAMINE} or {WRITE}, and part=K/N with K from 0"
            )
        number, count = int(match[1]), int(match[2])
        if number >= count:
            raise BuildError(f"part={part}: K is from 0 to N-1")
        return cls(source, phase, number, count)

    def of(self, blocks: Sequence[Block]) -> list[Block]:
        """Consecutive blocks; all parts together have each once."""
        first, last = (len(blocks) * n // self.parts for n in (self.part, self.part + 1))
        return list(blocks[first:last])


@dataclass(frozen=True)
class Examination:
    """One source, or one evaluation set, as far as it is examined."""

    key: str  # of its recipe
    settings: Settings
    digest: str
    folder: ExaminedFolder
    block_rows: int

    def blocks(self) -> list[Block]:
        """Its blocks; the first time, or when its files have moved, they are looked through."""
        blocks = self.folder.read_blocks()
        # Files that lie elsewhere now, otherwise unchanged, leave the digest as it was.
        if blocks is None or any(not block.pieces[0].file.exists() for block in blocks[:1]):
            source = open_source(self.settings.name, self.settings.source)
            blocks = source.blocks(self.block_rows)
            self.folder.write_blocks(blocks)
        return blocks

    def counts(self) -> bool:
        """Whether it has been examined in full, from these very inputs."""
        return self.folder.stamped().stamp() == self.digest and self.folder.is_complete()


@dataclass(frozen=True)
class Target:
    """One data set that was asked for."""

    examination: Examination
    before: tuple[Examination, ...]  # whose samples stay where both have them
    folder: DatasetFolder
    digest: str

    @property
    def name(self) -> str:
        return self.examination.settings.name

    def existing(self) -> Manifest | None:
        """The finished data set, if it was built from these inputs and is whole."""
        try:
            manifest = read_manifest(self.folder.manifest)
            manifest.check_shards()
        except ManifestError:
            return None
        return manifest if manifest.info.inputs_digest == self.digest else None


class BuildPlan:
    """Examinations and targets of one command.

    Raises:
        BuildError, SourceError: a source is named or configured wrong, or has no files.
    """

    def __init__(
        self,
        data: DataConfig,
        geometry: AnyresGeometry,
        tokenizer_digest: str,
        only: Sequence[str] | None = None,
    ):
        unknown = sorted(set(only or ()) - set(data.sources))
        if unknown:
            raise BuildError(
                f"only= names {', '.join(unknown)}; data.sources has {', '.join(data.sources)}"
            )
        self.data, self.geometry, self.tokenizer_digest = data, geometry, tokenizer_digest
        self.asked = [name for name in data.sources if only is None or name in only]
        self._root = Path(data.root)
        self._examinations: dict[str, Examination] = {}

    @cached_property
    def evaluation(self) -> list[Examination]:
        """Sets whose samples must not be trained on."""
        return [
            self._examine(f"evaluation/{name}", name, source)
            for name, source in self.data.duplicates.evaluation.items()
        ]

    def targets(self, share: Share | None = None) -> list[Target]:
        """What was asked for, in the order of data.sources; of a share only its source.

        Raises:
            BuildError: the source of the share was not asked for.
        """
        if share is not None and share.source not in self.asked:
            raise BuildError(f"source={share.source} is none of {', '.join(self.asked)}")
        names = self.asked if share is None else [share.source]
        return [self._target(name) for name in names]

    def recipes(self) -> dict[str, Recipe]:
        """For every examination that was made so far."""
        return {
            key: Recipe(
                one.settings,
                one.folder.path,
                None if one in self.evaluation else self._root,
                self.data.shard_bytes,
            )
            for key, one in self._examinations.items()
        }

    def _target(self, name: str) -> Target:
        mine = self._of_source(name)
        before = tuple(self._before(name)) if self.data.duplicates.across_sources else ()
        digest = dataset_digest(
            mine.digest,
            self.data.sources[name],
            self.data,
            [self._compared(one) for one in before],
            [self._compared(one) for one in self.evaluation],
        )
        return Target(mine, before, DatasetFolder(self._root, name), digest)

    def _before(self, name: str) -> list[Examination]:
        """Sources before `name` that count: asked for too, or examined already."""
        names = list(self.data.sources)
        found = []
        for other in names[: names.index(name)]:
            if other in self.asked:
                found.append(self._of_source(other))
            elif (self._root / f".{other}.examined").is_dir():
                one = self._of_source(other)
                if one.counts():
                    found.append(one)
        return found

    def _of_source(self, name: str) -> Examination:
        return self._examine(name, name, self.data.sources[name])

    def _examine(self, key: str, name: str, source: SourceConfig) -> Examination:
        if key not in self._examinations:
            _check_name(name)
            data = self.data
            settings = Settings(
                name, source, data.images, data.tokenizer, self.geometry, data.variety_model
            )
            files = open_source(name, source).files
            digest = examine_digest(files, settings, self.tokenizer_digest, data.block_rows)
            of = ExaminedFolder.of_source if key == name else ExaminedFolder.of_evaluation
            folder = of(self._root, name)
            self._examinations[key] = Examination(key, settings, digest, folder, data.block_rows)
        return self._examinations[key]

    def _compared(self, one: Examination) -> Compared:
        return Compared(one.settings.name, one.digest, one.settings.source.unique_images)


def _check_name(name: str) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or len(name) > _MAX_NAME:
        raise BuildError(
            f"data.sources.{name}: a name is at most {_MAX_NAME} letters, digits, - and _"
        )
