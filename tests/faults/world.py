"""What every run of the fault tests begins from: an import and shards under the demo's names.

The names are those of conf/data/demo.yaml since the command line cannot add a source of its own.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from conf.compose import compose
from conf.schema import SourceConfig
from data_shards.build import build_dataset
from data_shards.chat import ChatTokenizer
from models.anyres import AnyresGeometry
from tests.data_shards import toys
from tests.tools.small_backbones import OVERRIDES, write_backbones
from tools import hf_import

IMPORT, SHARDS = "import", "shards"
# What of the demo's mixture has no shards here.
WITHOUT = ["~data.mix.stage2.style", "~data.mix.stage2.text"]


class World:
    """`root/import` and `root/shards/{captions,vqa,preferences}`, made where they are missing."""

    def __init__(self, root: Path) -> None:
        self.root = root
        if not (root / "complete").exists():
            shutil.rmtree(root, ignore_errors=True)
            self._make()
            (root / "complete").touch()

    def _make(self) -> None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        vision, language, tokenizer = write_backbones(self.root / "backbones")
        paths = [f"vision={vision}", f"language={language}", f"tokenizer={tokenizer}"]
        hf_import.main([*OVERRIDES, *paths, f"out={self.root / IMPORT}"])
        directory = self.root / IMPORT / "tokenizer"
        rows = {
            "captions": toys.chat_rows(32),
            "vqa": toys.chat_rows(12, first=100),
            "preferences": toys.pair_rows(12),
        }
        sources = {
            name: SourceConfig(
                str(toys.write_parquet(self.root / f"{name}.parquet", some)),
                preference=name == "preferences",
            )
            for name, some in rows.items()
        }
        data = toys.data_config(self.root / SHARDS, directory, **sources)
        geometry = AnyresGeometry.from_model(compose(OVERRIDES).model)
        digest = ChatTokenizer.from_directory(directory).digest()
        for name, source in sources.items():
            build_dataset(name, source, data, geometry, digest)
