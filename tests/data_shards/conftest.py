"""Built once for all tests of this room: a tokenizer and three data sets."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from conf.schema.data import DataConfig, SourceConfig
from data_shards.build import build_dataset
from data_shards.chat import ChatTokenizer
from data_shards.manifest import Manifest
from tests.data_shards import toys


@dataclass(frozen=True)
class World:
    """Everything a plan and a loader need."""

    data: DataConfig
    tokenizer: ChatTokenizer
    manifests: dict[str, Manifest]


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toys.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> ChatTokenizer:
    return ChatTokenizer.from_directory(tokenizer_directory)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tokenizer_directory: Path) -> World:
    """Data sets `chats` (24 samples), `more` (12), `pairs` (9). Copy before damaging."""
    folder = tmp_path_factory.mktemp("world")
    chats = toys.write_parquet(folder / "chats.parquet", toys.chat_rows(24), group=7)
    more = toys.write_parquet(folder / "more.parquet", toys.chat_rows(12, first=100))
    pairs = toys.write_parquet(folder / "pairs.parquet", toys.pair_rows(9))
    data = toys.data_config(
        folder / "shards",
        tokenizer_directory,
        chats=SourceConfig(str(chats), licence="CC-BY-4.0"),
        more=SourceConfig(str(more)),
        pairs=SourceConfig(str(pairs), preference=True),
    )
    tokenizer = ChatTokenizer.from_directory(tokenizer_directory)
    manifests = {
        name: build_dataset(name, source, data, toys.GEOMETRY, tokenizer.digest())
        for name, source in data.sources.items()
    }
    return World(data, tokenizer, manifests)
