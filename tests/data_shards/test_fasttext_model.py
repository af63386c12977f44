"""A real model, trained here with fastText itself in a second, and files that are none."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from conf.schema.data import SourceConfig
from data_shards.build import build_dataset
from data_shards.chat import ChatTokenizer
from data_shards.fasttext_file import ModelError, check_file
from data_shards.fasttext_model import FastTextModel, file_digest, labels_file
from data_shards.variety_judge import AGREEMENT, MODEL, Judge
from tests.data_shards import toys

pytest.importorskip("fasttext", reason="needs the extra [variety]")
PORTUGAL = ("o autocarro está a chegar", "a equipa marcou um golo", "o ecrã do telemóvel")
BRAZIL = ("o ônibus está chegando", "o time marcou um gol", "a tela do celular")


TRAIN = """
import sys, fasttext
folder = sys.argv[1]
for names, kind in (("euptvid", "bin"), ("euptvid", "ftz"), ("other", "bin")):
    lines = f"{folder}/{names}.txt"
    model = fasttext.train_supervised(
        lines, dim=8, lr=0.3, epoch=60, minn=2, maxn=4, bucket=2000, thread=1, verbose=0
    )
    if kind == "ftz":
        model.quantize(input=lines, retrain=False, thread=1, verbose=0)
    model.save_model(f"{folder}/{names}.{kind}")
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with euptvid.bin, euptvid.ftz (labels as that model has them) and other.bin."""
    folder = tmp_path_factory.mktemp("models")
    for name, labels in (("euptvid", ("PT_PT", "PT_BR")), ("other", ("lusitano", "PT_BR"))):
        text = "".join(
            f"__label__{label} {line}\n"
            for label, texts in zip(labels, (PORTUGAL, BRAZIL), strict=True)
            for line in texts * 30
        )
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    # fastText trains from memory that it never cleared, at times into NaN. 255: glibc clears it.
    environment = {**os.environ, "MALLOC_PERTURB_": "255"}
    subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder)], check=True, env=environment, timeout=120
    )
    return folder


@pytest.fixture
def staged(models: Path) -> Path:
    return models / "euptvid.bin"


@pytest.mark.parametrize("kind", ["bin", "ftz"])
def test_a_model_says_what_it_was_taught(models: Path, tmp_path: Path, kind: str) -> None:
    path = models / f"euptvid.{kind}"
    model = FastTextModel(path)
    for label, texts in (("pt-PT", PORTUGAL), ("pt-BR", BRAZIL)):
        for text in texts:
            verdict = model.classify(text.replace(" ", "\n"))  # fastText reads one line
            assert verdict.label == label and 0.7 <= verdict.probability <= 1.0
    for text in ("", " \n", "\0", "7"):
        assert model.classify(text).label in ("undecided", "pt-PT", "pt-BR")
    assert model.classify("").label == "undecided"
    cut = tmp_path / f"cut.{kind}"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="ends before"):
        FastTextModel(cut)


def test_the_judge_keeps_both_verdicts_apart(staged: Path) -> None:
    judge = Judge(str(staged))
    verdict = judge("O ônibus está chegando.")
    assert verdict.label == "pt-BR" and verdict.hits[f"{MODEL}pt-BR"] == 1
    assert verdict.hits[f"{AGREEMENT}pt-BR, pt-BR"] == 1 and verdict.hits["ônibus"] == 1
    assert Judge()("O ônibus está chegando.").hits.keys() == verdict.hits.keys() - {
        f"{MODEL}pt-BR",
        f"{AGREEMENT}pt-BR, pt-BR",
    }
    assert not judge("The bus is coming and the cat is on the mat.").hits


def test_labels_of_other_names_are_mapped_by_a_file_beside_the_model(models: Path) -> None:
    path = models / "other.bin"
    with pytest.raises(ModelError, match=r"labels lusitano; write other.bin.labels.yaml"):
        FastTextModel(path)
    before = file_digest(path)
    labels_file(path).write_text("lusitano: pt-PT\n")
    assert FastTextModel(path).classify(PORTUGAL[0]).label == "pt-PT"
    assert file_digest(path) != before
    labels_file(path).write_text("lusitano: Portugal\n")
    with pytest.raises(ModelError, match="must map each label to one of"):
        FastTextModel(path)


def test_files_that_are_no_such_model_are_refused_before_the_library_sees_them(
    tmp_path: Path, staged: Path
) -> None:
    good = staged.read_bytes()
    check_file(staged)
    bad = tmp_path / "bad.bin"
    for content, cause in (
        (b"", "has 0 bytes"),
        (good[:60], "has 60 bytes"),
        (good[: len(good) // 2], "is damaged: it ends before"),
        (good[:-1], "is damaged: it ends before"),
        (good + b"!", "is damaged: 1 bytes too many"),
        (b"PK\3\4" + good[4:], "is not a fastText model"),
        (good[:4] + struct.pack("<i", 99) + good[8:], "is of version 99"),
        (good[:36] + struct.pack("<i", 1) + good[40:], "holds word vectors"),
        (good[:64] + struct.pack("<3i", 1 << 30, 1 << 30, 0) + good[76:], "is damaged: 1073741824"),
        (good[:64] + struct.pack("<3i", 1 << 30, (1 << 30) - 2, 2) + good[76:], "is damaged"),
        (good[:8] + struct.pack("<i", 9) + good[12:], "is damaged: its matrices do not fit"),
        (good[:32] + struct.pack("<i", 7) + good[36:], "is damaged: its settings contradict"),
        (good[:40] + struct.pack("<i", 0) + good[44:], "is damaged: its settings contradict"),
        (good[:40] + struct.pack("<i", 9999) + good[44:], "is damaged: its matrices do not fit"),
    ):
        bad.write_bytes(content)
        with pytest.raises(ModelError, match=rf"bad.bin {cause}"):
            FastTextModel(bad)
    with pytest.raises(ModelError, match="cannot be read"):
        FastTextModel(tmp_path / "none.bin")


def test_a_build_asks_the_model_and_is_made_again_when_it_changes(
    models: Path, tmp_path: Path, tokenizer_directory: Path
) -> None:
    staged = Path(shutil.copy(models / "euptvid.bin", tmp_path / "model.bin"))
    chats = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": text}]}
        for n, text in enumerate((*PORTUGAL, *BRAZIL))
    ]
    path = toys.write_jsonl(tmp_path / "chats.jsonl", chats)
    source = SourceConfig(str(path), format="jsonl")
    data = toys.data_config(tmp_path / "shards", tokenizer_directory, chats=source)
    data.variety_model = str(staged)
    digest = ChatTokenizer.from_directory(tokenizer_directory).digest()
    first = build_dataset("chats", source, data, toys.GEOMETRY, digest)
    hits = json.loads((tmp_path / "shards" / "chats" / "hits.json").read_text())
    assert hits[f"{MODEL}pt-PT"] == 3 and hits[f"{MODEL}pt-BR"] == 3
    assert first.info.varieties == {"pt-BR": 3, "pt-PT": 3}
    staged.write_bytes((models / "euptvid.ftz").read_bytes())
    again = build_dataset("chats", source, data, toys.GEOMETRY, digest)
    assert again.info.inputs_digest != first.info.inputs_digest
    staged.write_bytes(b"no model")
    with pytest.raises(ValueError, match="model.bin has 8 bytes"):
        build_dataset("chats", source, data, toys.GEOMETRY, digest)
