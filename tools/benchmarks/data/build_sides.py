"""The sides of the builder's table, and the Parquet file that all of them read."""

import contextlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from conf.compose import compose
from conf.schema.data import DataConfig, ImageLimits, SourceConfig
from data_shards.difference_hash import difference_hash
from data_shards.image_store import StoredImage, store
from models.anyres import AnyresGeometry
from tools.benchmarks.data.pictures import jpegs
from tools.demo.tokenizer import CHAT_TEMPLATE, IMAGE, train_tokenizer

Turn = Callable[[], dict[str, float]]
ROWS, LARGE_EVERY, EXIF_EVERY = 2400, 12, 10
ROW_GROUP = 100
PIECES = 700
_PORTUGUESE = (
    "O autocarro para na paragem junto à escola, e as crianças estão a entrar.",
    "O gráfico mostra a despesa de cada mês; a de janeiro é a maior, com 1 240 euros.",
    "Na fotografia vê-se um porto ao fim da tarde, com barcos de pesca e gaivotas.",
    "A tabela tem quatro linhas, uma para cada cidade, e três colunas com valores.",
    "Soma-se a primeira coluna à segunda e divide-se o total por três: são 17.",
    "Há uma ponte de ferro ao fundo; à esquerda, duas pessoas conversam num banco.",
)
_ENGLISH = (
    "The bus stops next to the school while several children are getting on.",
    "The chart shows the expenses of each month; January has the largest, 1,240 euros.",
    "The photograph shows a harbour late in the afternoon, with fishing boats and gulls.",
    "The table lists four cities and the number of books in each of their libraries.",
    "Adding the first column to the second and dividing the sum by three gives 17.",
    "There is an iron bridge in the background, and two people talk on a bench.",
)


@dataclass(frozen=True)
class FineVision:
    """The file, the tokenizer beside it, and where the sides may write."""

    path: Path
    tokenizer: Path
    work: Path
    rows: int
    bytes: int  # of the images


def prepare(work: Path, scale: float) -> FineVision:
    """Write the source, unless it is there; `scale` 1: 2,400 rows, 340 MB."""
    count = max(24, round(ROWS * scale))
    path, tokenizer = work / f"finevision-{count}.parquet", work / "tokenizer"
    if not tokenizer.is_dir():
        _write_tokenizer(tokenizer)
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(list(_rows(count)))
        pq.write_table(table, f"{path}.tmp", row_group_size=ROW_GROUP, compression="none")
        os.replace(f"{path}.tmp", path)
    images = pq.read_table(path, columns=["images"])["images"].to_pylist()
    size = sum(len(image["bytes"]) for row in images for image in row)
    return FineVision(path, tokenizer, work, count, size)


def _write_tokenizer(directory: Path) -> None:
    """One in the manner of EuroLLM's, learnt from the sentences."""
    texts = [f"{text} {n}" for text in (*_PORTUGUESE, *_ENGLISH) for n in range(40)]
    directory.mkdir(parents=True)
    train_tokenizer(texts, PIECES).save(str(directory / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "<|im_end|>", "pad_token": "</s>"}
    config["extra_special_tokens"] = {"image_token": IMAGE}  # type: ignore[assignment]
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _rows(count: int) -> Iterator[dict[str, Any]]:
    """One picture and one to three turns; one row in fifty stands twice, one image is damaged."""
    large = jpegs(-(-count // LARGE_EVERY), 1536, 2048, seed=1)
    small = jpegs(count, 768, 1024)
    generator = np.random.default_rng(0)
    row: dict[str, Any] = {}
    for number in range(count):
        data = next(large) if number % LARGE_EVERY == 1 else next(small)
        if number % EXIF_EVERY == 3:
            data = _with_exif(data)
        if number == count // 2:
            data = data[: len(data) // 2]
        if number % 50 != 49:
            question, sentences = _LANGUAGES[number % 3 == 0]
            row = {
                "images": [{"bytes": data, "path": f"{number}.jpg"}],
                "texts": [
                    {"user": f"{question} ({number})", "assistant": _answer(generator, sentences)}
                    for _ in range(1 + int(generator.integers(3)))
                ],
                "source": "benchmark",
            }
        yield row


_LANGUAGES = (("What does the picture show?", _ENGLISH), ("O que se vê na imagem?", _PORTUGUESE))


def _answer(generator: np.random.Generator, sentences: tuple[str, ...]) -> str:
    chosen = generator.integers(0, len(sentences), int(generator.integers(1, 12)))
    return " ".join(f"{sentences[n]} ({generator.integers(1000)})" for n in chosen)


def _with_exif(data: bytes) -> bytes:
    """The same entropy-coded data with a camera's name and a thumbnail-sized note in APP1."""
    exif = Image.Exif()
    exif[0x010F], exif[0x010E] = "camera", "x" * 4000
    content = exif.tobytes()
    return data[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content + data[2:]


# --- sides, each in a process of its own ----------------------------------------------------------


def ours(source: FineVision, pillow: bool) -> Turn:
    """`data_shards.build` with one worker; with `pillow` another way of checking images."""
    from data_shards import prepare as rows
    from data_shards.build import build_dataset
    from data_shards.chat import ChatTokenizer

    if pillow:
        rows.store = store_with_pillow
    model = compose(["model=amalia_vl_9b", "data=demo"]).model
    geometry = AnyresGeometry.from_model(model)
    digest = ChatTokenizer.from_directory(source.tokenizer).digest()
    config = SourceConfig(str(source.path), licence="CC0-1.0")
    root = source.work / ("pillow" if pillow else "ours")
    data = DataConfig(str(root), str(source.tokenizer), {"set": config}, shard_bytes=256 << 20)

    def turn() -> dict[str, float]:
        shutil.rmtree(root, ignore_errors=True)
        with contextlib.redirect_stdout(io.StringIO()):
            manifest = build_dataset("set", config, data, geometry, digest)
        crc = 0
        for shard in manifest.info.shards:
            crc = zlib.crc32(shard.sha256.encode(), crc)
        return {
            **_counts(source),
            "kept": float(len(manifest)),
            "left_out": float(manifest.info.quarantined),
            "shards_crc": float(crc),
        }

    return turn


def store_with_pillow(data: bytes, limits: ImageLimits) -> StoredImage:
    """As `image_store.store` for plain JPEG files, every pixel decoded by Pillow."""
    from data_shards import jpeg_metadata

    bare = jpeg_metadata.take_apart(data).bare
    try:
        image = Image.open(io.BytesIO(bare), formats=("JPEG",))
        if image.width * image.height > limits.max_pixels:
            return store(data, limits)
        image.load()
    except OSError:
        return store(data, limits)  # for its words
    fingerprint = difference_hash(image.convert("L"))
    return StoredImage(bare, "jpg", image.width, image.height, fingerprint)


def tar_writer(source: FineVision, repeats: int) -> Turn:
    """Bytes and a JSON member to webdataset's TarWriter, no checks."""

    def turn() -> dict[str, float]:
        for _ in range(repeats):
            _write(source, source.work / "tar", lambda data: data)
        return {name: repeats * value for name, value in _counts(source).items()}

    return turn


def decoded(source: FineVision, again: bool) -> Turn:
    """Each image decoded in full, hashed, and written as it is or encoded `again`."""
    import simplejpeg

    def image(data: bytes) -> bytes | None:
        try:
            pixels = simplejpeg.decode_jpeg(data, "BGR")
        except ValueError:
            return None
        if min(pixels.shape[:2]) < 1:
            return None
        if again:
            data = simplejpeg.encode_jpeg(
                pixels, quality=95, colorspace="BGR", colorsubsampling="420"
            )
        sha256(data).hexdigest()
        return data

    def turn() -> dict[str, float]:
        _write(source, source.work / "decoded", image)
        return _counts(source)

    return turn


def _write(source: FineVision, folder: Path, image: Callable[[bytes], bytes | None]) -> None:
    import webdataset

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    number = 0
    with webdataset.TarWriter(str(folder / "000000.tar")) as writer:
        for batch in pq.ParquetFile(source.path).iter_batches(32, columns=["images", "texts"]):
            for row in batch.to_pylist():
                data = image(row["images"][0]["bytes"])
                if data is not None:
                    record = json.dumps({"texts": row["texts"]}, ensure_ascii=False).encode()
                    writer.write({"__key__": f"{number:09d}", "json": record, "jpg": data})
                number += 1


def _counts(source: FineVision) -> dict[str, float]:
    return {"samples": float(source.rows), "megabytes": source.bytes / 1e6}
