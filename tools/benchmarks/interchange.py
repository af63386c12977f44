"""Export and import at full size: true shapes and random weights, beside a plain copy of the bytes.

`scale` is the share of decoder layers: 1 writes all 42 of AMALIA-VL (9.6 B parameters, 19 GB, twice
that on disk while it runs), 0.05 two of them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from conf.compose import compose, dump
from conf.schema import ModelConfig
from data_shards.chat import ChatTokenizer
from models.hf_state import Entry, table
from pipeline.checkpoint_writer import LazyPart, write_checkpoint
from pipeline.manifest import Manifest
from tools.benchmarks.machine import facts
from tools.benchmarks.table import Section
from tools.hf_import import finish_import, stacked_layers
from tools.import_weights import checkpoint_name

GIB = 1 << 30
COPY_GOAL = 0.5  # of a plain copy's bytes a second
MEMORY_GOAL = 3.0  # GiB over the interpreter
_BLOCK = 64 << 20  # bytes


def random_parts(model: ModelConfig, halves: int = 2) -> Iterator[LazyPart]:
    """Random weights cut as `halves` tensor-parallel ranks would; none exists before its turn."""
    layers = stacked_layers(model)
    draw = torch.Generator().manual_seed(5)
    noise = (torch.randn(_BLOCK // 2, generator=draw) * 0.02).bfloat16()

    def reader(seed: int, shape: tuple[int, ...]) -> Callable[[], Tensor]:
        def read() -> Tensor:
            # The same noise, begun elsewhere: drawing 10 B numbers would take minutes.
            count = torch.Size(shape).numel()
            first = seed * 7919 % (len(noise) // 2)
            repeats = -(-(count + first) // len(noise))
            return noise.repeat(repeats)[first : first + count].reshape(shape).clone()

        return read

    for number, entry in enumerate(table(model)):
        name, layer = checkpoint_name(entry.megatron)
        whole: tuple[int, ...] = entry.shape
        lead: tuple[int, ...] = ()
        if layer is not None:
            whole = (layers[name[: name.index(".layers") + len(".layers")]], *entry.shape)
            lead = (layer,)
        for first, rows in _cuts(entry, halves):
            shape = (*[1] * len(lead), rows, *entry.shape[1:])
            start = (*lead, first, *[0] * (len(entry.shape) - 1))
            seed = number * 64 + first
            yield LazyPart(name, whole, start, shape, torch.bfloat16, reader(seed, shape))


def _cuts(entry: Entry, halves: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each rank's part."""
    rows = entry.shape[0]
    if len(entry.shape) == 1 or rows % halves:
        yield 0, rows
        return
    for rank in range(halves):
        yield rank * rows // halves, rows // halves


def write_stage(stage: Path, overrides: list[str]) -> tuple[ModelConfig, int]:
    """A finished stage of random weights with a tokenizer; returns the model and the bytes."""
    from tools.demo.tokenizer import save_tokenizer, train_tokenizer

    words = train_tokenizer(["uma imagem e uma pergunta sobre o que se vê"] * 9, 290)
    config = compose([*overrides, f"model.image_token_id={words.token_to_id('<image>')}"])
    model = config.model
    stage.mkdir(parents=True)
    save_tokenizer(words, stage / "tokenizer", model)
    (stage / "config.yaml").write_text(dump(config))
    manifest = Manifest(0, 0, "bench", "bench", {"world_size": 1}, "bench", {})
    checkpoint = write_checkpoint(list(random_parts(model)), stage, manifest, workers=2)
    tokenizer_digest = ChatTokenizer.from_directory(stage / "tokenizer").digest()
    finish_import(stage, checkpoint, model, tokenizer_digest)
    return model, sum(path.stat().st_size for path in checkpoint.iterdir())


# Of this process's own memory (VmHWM): what getrusage says begins with the parent's.
_TIMED = """
import json, sys, time
from pathlib import Path
from conf.compose import load
from tools.hf_export import Request, export
from tools.hf_import import import_model

def most():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

what, source, out, config = sys.argv[1], *map(Path, sys.argv[2:5])
before = most()
began = time.perf_counter()
if what == "export":
    export(Request(source, out))
else:
    import_model(load(config), out, source, llava=source)
took = time.perf_counter() - began
print(json.dumps({"seconds": took, "over": (most() - before) * 1024}))
"""


def plain_copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files, flushed to disk."""
    began = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    return time.perf_counter() - began


def timed(what: str, source: Path, out: Path, config: Path) -> dict[str, float]:
    """Seconds, and bytes of memory over the interpreter, of one command in a process of its own."""
    words = [sys.executable, "-c", _TIMED, what, str(source), str(out), str(config)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"the {what} failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def check_names(export: Path, model: ModelConfig) -> list[str]:
    """What transformers says of the folder's names, and our list of keys of the whole model."""
    from transformers import AutoModelForImageTextToText

    from tools.safetensors_reader import SafetensorsDirectory

    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        export, device_map="meta", output_loading_info=True
    )
    info: dict[str, Any] = loaded[1]
    with SafetensorsDirectory(export) as written:
        expected = {
            name: shape
            for entry in table(model)
            for name, shape in zip(entry.hf, entry.shapes, strict=True)
        }
        same = written.shapes() == expected
        count = len(written.shapes())
    complete = not info["missing_keys"] and not info["unexpected_keys"]
    return [
        f"{count} tensors, names and shapes {'as' if same else 'NOT as'} the model's table (the "
        "table is compared with the list of the 823 keys of the 9B in tests/models)",
        f"from_pretrained on the meta device: {len(info['missing_keys'])} missing, "
        f"{len(info['unexpected_keys'])} unexpected keys" + ("" if complete else ": NOT complete"),
    ]


def measure(
    *, work: Path, scale: float, turns: int, threads: int, say: Callable[[str], None], **_: Any
) -> Section:
    """The section of the page."""
    folder = work / "interchange"
    shutil.rmtree(folder, ignore_errors=True)
    layers = max(round(42 * scale), 1)
    overrides = ["model=amalia_vl_9b", "precision=bf16", f"model.text.layers={layers}"]
    model, size = write_stage(folder / "stage", overrides)
    say(f"wrote {size / 1e9:.1f} GB")
    checkpoint = next((folder / "stage/checkpoints").glob("step_*"))
    config = folder / "config.yaml"
    shutil.copyfile(folder / "stage/config.yaml", config)
    copies, exports = [], []
    for turn in range(turns):
        shutil.rmtree(folder / "hf", ignore_errors=True)
        copies.append(plain_copy(checkpoint, folder / "copy"))
        shutil.rmtree(folder / "copy")
        exports.append(timed("export", folder / "stage", folder / "hf", config))
        say(f"turn {turn + 1}: copy {copies[-1]:.1f} s, export {exports[-1]['seconds']:.1f} s")
    notes = check_names(folder / "hf", model)
    shutil.rmtree(folder / "stage")  # three times the weights would be 60 GB
    imported = timed("import", folder / "hf", folder / "import", config)
    say(f"import {imported['seconds']:.1f} s")
    shutil.rmtree(folder)
    copied, exported = median(copies), median(run["seconds"] for run in exports)
    ratios = [c / e["seconds"] for c, e in zip(copies, exports, strict=True)]
    ratio = median(ratios)
    over = max(run["over"] for run in exports) / GIB
    numbers = sum(torch.Size(entry.shape).numel() for entry in table(model))
    notes += [
        f"throughput {ratio:.2f} of the copy's ({min(ratios):.2f} to {max(ratios):.2f}): goal "
        f"{COPY_GOAL} " + ("reached" if ratio >= COPY_GOAL else "MISSED"),
        f"peak memory {over:.2f} GiB over the interpreter: goal {MEMORY_GOAL} "
        + ("reached" if over <= MEMORY_GOAL else "MISSED"),
    ]
    return Section(
        title=f"Export of {numbers / 1e9:.1f} B parameters",
        method=(
            "A checkpoint of random BF16 weights in the parts of two tensor-parallel ranks, to a "
            "Hugging Face folder, and that folder back to a checkpoint (once). The export reads "
            "the checkpoint twice, once for its SHA-256, and what it wrote once more for "
            "SHA256SUMS, all at the same time; the copy reads and writes once. All end when the "
            "disk has everything."
        ),
        columns=["", "seconds", "GB/s", "peak memory over the interpreter, GiB"],
        rows=[
            ["plain copy", copied, size / 1e9 / copied, None],
            ["export", exported, size / 1e9 / exported, over],
            [
                "import",
                imported["seconds"],
                size / 1e9 / imported["seconds"],
                imported["over"] / GIB,
            ],
        ],
        facts=facts(),
        notes=notes,
        settings={"layers": layers, "turns": turns, "workers": 2},
        data={"copies": copies, "exports": exports, "import": imported},
    )
