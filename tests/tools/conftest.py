"""A run that has an import and its export, shared by the tests of this directory."""

from pathlib import Path

import pytest

from tests.tools.small_backbones import OVERRIDES, write_backbones
from tools import hf_export, hf_import
from tools.command import run


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`backbones/`, `import/` and `hf/`, made through the command lines' main functions."""
    root = tmp_path_factory.mktemp("run")
    vision, language, tokenizer = write_backbones(root / "backbones")
    paths = [f"vision={vision}", f"language={language}", f"tokenizer={tokenizer}"]
    assert run(hf_import.main, [*OVERRIDES, *paths, f"out={root / 'import'}"]) == 0
    assert run(hf_export.main, [f"stage={root / 'import'}", f"out={root / 'hf'}"]) == 0
    return root
