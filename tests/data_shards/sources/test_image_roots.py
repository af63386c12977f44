"""Where image paths start, InternVL's meta files included."""

import json
from pathlib import Path

import pytest

from conf.schema.data import SourceConfig
from data_shards.layouts import to_fields
from data_shards.sources import SourceError, open_source
from tests.data_shards import toys


def mmpr(folder: Path, prefix: str) -> tuple[SourceConfig, Path]:
    """Two annotation files whose images have the same names, as OpenGVLab/MMPR-v1.2 has them."""
    home, meta = folder / "MMPR-v1.2", {}
    for name in ("ScienceQA", "M3CoT"):
        (home / "images" / name).mkdir(parents=True)
        (home / "images" / name / "1.jpg").write_bytes(name.encode())
        row = {"image": "1.jpg", "question": "Quantos?", "chosen": "Três.", "rejected": "Dois."}
        toys.write_jsonl(home / "annotations" / f"{name}_pairs.jsonl", [row])
        meta[f"{name}_pairs"] = {
            "root": f"{prefix}images/{name}",
            "annotation": f"/somewhere/else/annotations/{name}_pairs.jsonl",
            "repeat_time": 1,
        }
    (home / "meta.json").write_text(json.dumps(meta))
    config = SourceConfig(
        str(home / "annotations" / "*.jsonl"),
        "jsonl",
        preference=True,
        image_root=str(home / "meta.json"),
    )
    return config, home


@pytest.mark.parametrize("prefix", ["MMPR-v1.2/", "", "MMPR/", "/mnt/their/MMPR/"])
def test_each_annotation_file_has_its_folder(tmp_path: Path, prefix: str) -> None:
    config, _ = mmpr(tmp_path, prefix)
    found = open_source("pairs", config)
    images = [to_fields(row, config).images for b in found.blocks(10) for row in found.rows(b)]
    assert images == [[b"M3CoT"], [b"ScienceQA"]]


def test_meta_files_that_do_not_do(tmp_path: Path) -> None:
    config, home = mmpr(tmp_path, "MMPR-v1.2/")
    toys.write_jsonl(home / "annotations" / "new.jsonl", [{}])
    with pytest.raises(SourceError, match=r"meta\.json has no annotation new\.jsonl"):
        open_source("pairs", config)
    (home / "annotations" / "new.jsonl").unlink()
    (home / "images" / "M3CoT").rename(home / "images" / "moved")
    with pytest.raises(SourceError, match="names the image folder MMPR-v1.2/images/M3CoT"):
        open_source("pairs", config)
    (home / "images" / "moved").rename(home / "images" / "M3CoT")
    config, _ = mmpr(tmp_path / "x", "../")
    with pytest.raises(SourceError, match="is not below"):
        open_source("pairs", config)
    config, home = mmpr(tmp_path / "y", "")
    for content in ("[1]", "{", '{"a": 1}', '{"a": {"annotation": "x"}}'):
        (home / "meta.json").write_text(content)
        with pytest.raises(SourceError, match="is not a meta file"):
            open_source("pairs", config)
    (home / "meta.json").unlink()
    with pytest.raises(SourceError, match="cannot be opened"):
        open_source("pairs", config)
