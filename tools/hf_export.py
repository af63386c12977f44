"""A stage's checkpoint -> a complete Hugging Face directory, on any machine, in little memory.

    python -m tools.hf_export stage=runs/NAME/stage2 out=DIR [tokenizer=DIR] [dtype=bfloat16]
        [names=new] [workers=4] [licence=apache-2.0] [final=true]

The directory loads with `AutoProcessor` and `AutoModelForImageTextToText` of transformers 4.57.6
(`LlavaNextForConditionalGeneration`). Weights go tensor by tensor, whatever layout wrote them; an
export that was killed goes on where it stopped when the same command is given again. It is written
aside and renamed into place; with final=true only once `tools.parity_gate` has passed it. The
tokenizer is the one of the run's `import/` unless named; its
digest must be the one the stage was trained with.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from conf.compose import compose, from_mapping, load, to_mapping
from conf.schema import ModelConfig, PrecisionConfig
from data_shards.chat import ChatTokenizer
from data_shards.durable import sync_directory
from models.hf_state import new_style_name, table
from pipeline.checkpoint_tensors import CheckpointTensors
from pipeline.files import digest_and_fsync, saying_where_full
from pipeline.handoff import DONE, Done, read_done
from pipeline.manifest import MANIFEST, CheckpointError, read_manifest, verify_files
from tools.aside import clear, filling, must_be_free
from tools.command import required, run, split_arguments
from tools.export_weights import STATE, Rename, plan_files, write_files
from tools.hf_config import TRANSFORMERS, llava_config
from tools.model_card import render
from tools.processor_files import special_ids, write_processor, write_tokenizer
from tools.safetensors_files import SHARD_BYTES

USAGE = (
    "python -m tools.hf_export stage=runs/NAME/stage2 out=DIR [tokenizer=DIR] [dtype=...] "
    "[names=legacy|new] [workers=4]"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NAMES: dict[str, Rename] = {"legacy": str, "new": new_style_name}
CHECKSUMS = "SHA256SUMS"  # `sha256sum -c` reads it
FORMAT = 1  # raise it when the same checkpoint would give other bytes


def model_of(done: Done, source: Path) -> ModelConfig:
    """The typed `ModelConfig` that a DONE.json records."""
    values = to_mapping(compose([]))
    return from_mapping({**values, "model": dict(done.model)}, str(source / "DONE.json")).model


def precision_of(stage: Path) -> PrecisionConfig:
    """Precision a stage was trained or imported in; fp32 where there is no config.yaml."""
    path = stage / "config.yaml"
    return load(path).precision if path.is_file() else PrecisionConfig()


@dataclass(frozen=True)
class Request:
    """What to write, and how."""

    stage: Path
    out: Path
    tokenizer: Path | None = None  # None: the one of the run's import
    dtype: torch.dtype | None = None  # None: the checkpoint's own
    names: str = "legacy"
    workers: int = 2
    shard_bytes: int = SHARD_BYTES
    final: bool = False  # only with the gate's certificate
    licence: str = ""  # of the model, as Hugging Face names it (apache-2.0); empty: not stated


def export(request: Request) -> None:
    """Write every file of the export into `request.out`, which must not exist.

    Raises:
        ValueError: `out` exists, the stage is unfinished, its checkpoint damaged, or the tokenizer
            is not its own. Nothing stands under the name `out`.
    """
    out = request.out
    must_be_free(out)
    done = read_done(request.stage)
    model = model_of(done, request.stage)
    tokenizer = request.tokenizer or default_tokenizer(request.stage)
    if ChatTokenizer.from_directory(tokenizer).digest() != done.tokenizer_digest:
        raise ValueError(
            f"{tokenizer} is not the tokenizer that {done.stage} was trained with; "
            "name that one with tokenizer=DIR"
        )
    checkpoint = request.stage / done.checkpoint
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.partial")
    remedy = "make room and run the same command: it goes on after the last whole file"
    with (
        filling(aside),
        saying_where_full(aside, remedy),
        _verified(checkpoint, done, aside) as check,
        CheckpointTensors(checkpoint) as source,
    ):
        must_be_free(out)  # whoever was writing may have ended meanwhile
        dtype = request.dtype or source.dtype("image_newline")
        rename = NAMES[request.names]
        files = plan_files(model, dtype, rename, request.shard_bytes)
        facts = [FORMAT, done.checkpoint_digest, str(dtype), request.names, request.shard_bytes]
        facts += [dict(done.model), check.stamps]
        identity = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        digests = write_files(
            source, model, files, rename, aside, identity, request.workers, _say, check
        )
        _write_small_files(request, tokenizer, model, done, dtype, aside)
        write_checksums(aside, dict(digests))
        check(whole=True)
        if request.final:
            _certify(request.stage, aside, out)
        (aside / STATE).unlink()
        sync_directory(aside)
        aside.rename(out)
        sync_directory(out.parent)


def _certify(stage: Path, folder: Path, out: Path) -> None:
    """Run the gate on a folder that has no name yet; ValueError leaves it aside."""
    from tools.parity_gate import certify

    try:
        certify(stage, folder, compose([]), Path(sys.executable))
    except ValueError as error:
        raise ValueError(f"{error}; there is no {out}, its files stay in {folder}") from error


def verify_checkpoint(directory: Path, workers: int) -> None:
    """Every file against MANIFEST.json, some at a time. Raises CheckpointError."""
    manifest = read_manifest(directory)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        checks = [pool.submit(verify_files, directory, manifest, [name]) for name in manifest.files]
        for check in checks:
            check.result()


class Check:
    """Raises CheckpointError as soon as a file of the checkpoint is known to be damaged."""

    def __init__(self, checkpoint: Path, done: Done, pool: Executor):
        self._checkpoint = checkpoint
        self.stamps = _stamps(checkpoint)  # before anything is read
        manifest = read_manifest(checkpoint)
        if digest_and_fsync(checkpoint / MANIFEST)[1] != done.checkpoint_digest:
            raise CheckpointError(
                f"{checkpoint / MANIFEST} is not the one that {DONE} of {done.stage} was written "
                "for; finish the stage again, or bring its checkpoint back"
            )
        self._verdicts = {
            name: pool.submit(verify_files, checkpoint, manifest, [name]) for name in manifest.files
        }

    def __call__(self, whole: bool = False) -> None:
        """With `whole`, wait for the last file, and see that none was replaced meanwhile."""
        for name, verdict in self._verdicts.items():
            if whole or verdict.done():
                try:
                    verdict.result()
                except OSError as error:
                    path = self._checkpoint / name
                    raise CheckpointError(f"{path} cannot be read ({error})") from error
        if whole and _stamps(self._checkpoint) != self.stamps:
            raise CheckpointError(
                f"{self._checkpoint} was changed while it was read; run the same command again"
            )


@contextmanager
def _verified(checkpoint: Path, done: Done, aside: Path) -> Iterator[Check]:
    """Verify every file while the tensors are read; `check(whole=True)` waits for the last.

    What was written from a damaged checkpoint is removed.
    """
    with ThreadPoolExecutor(1) as pool:
        check = Check(checkpoint, done, pool)
        try:
            yield check
        except CheckpointError:
            clear(aside)
            check(whole=True)  # it names the damaged file, where that is why
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _stamps(checkpoint: Path) -> list[list[object]]:
    """Size and times of every file: what was read from another one must be read again.

    The inode's time, too: a file that is brought back from a copy often keeps the other.
    """
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    found = [(path.name, path.stat()) for path in files]
    return [[name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in found]


def _write_small_files(
    request: "Request",
    tokenizer: Path,
    model: ModelConfig,
    done: Done,
    dtype: torch.dtype,
    aside: Path,
) -> None:
    name = str(dtype).removeprefix("torch.")
    ids = special_ids(tokenizer)
    generation = {"_from_model_config": True, **ids, "transformers_version": TRANSFORMERS}
    for file, value in (
        ("config.json", llava_config(model, ids, name)),
        ("generation_config.json", {k: v for k, v in generation.items() if v is not None}),
    ):
        (aside / file).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    for change in write_tokenizer(tokenizer, aside, model.text.max_positions):
        print(f"note: {change}")
    write_processor(model, aside)
    parameters = sum(torch.Size(entry.shape).numel() for entry in table(model))
    card = render(request.stage, done, model, parameters, name, request.licence)
    (aside / "README.md").write_text(card, encoding="utf-8")


def write_checksums(folder: Path, digests: dict[str, str]) -> None:
    """SHA256SUMS of every file, all of which are flushed to disk."""
    for path in sorted(folder.iterdir()):
        if path.name not in digests and path.name != STATE:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    lines = [f"{digest}  {name}\n" for name, digest in sorted(digests.items())]
    with open(folder / CHECKSUMS, "w", encoding="utf-8") as sums:
        sums.writelines(lines)
        sums.flush()
        os.fsync(sums.fileno())


def _say(message: str) -> None:
    print(message, flush=True)


def default_tokenizer(stage: Path) -> Path:
    """The tokenizer in the import of the stage's run (or in `stage` itself, if it is one)."""
    for directory in (stage / "tokenizer", stage.parent / "import" / "tokenizer"):
        if directory.is_dir():
            return directory
    raise ValueError(f"no import/tokenizer beside {stage}; name it with tokenizer=DIR")


def _licence(name: str) -> str:
    if not re.fullmatch(r"[a-zA-Z0-9.+-]*", name):
        raise ValueError(f"licence={name!r}: a name as Hugging Face has it, such as apache-2.0")
    return name


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    words = ("stage", "out", "tokenizer", "dtype", "names", "workers", "licence", "final")
    ours, rest = split_arguments(arguments, words)
    if rest:
        raise ValueError(f"unknown argument {rest[0]!r}; usage: {USAGE}")
    stage, out = required(ours, "stage", USAGE), required(ours, "out", USAGE)
    for word, known in (("dtype", DTYPES), ("names", NAMES)):
        if ours.get(word, next(iter(known))) not in known:
            raise ValueError(f"{word}={ours[word]} is none of {', '.join(known)}")
    workers = ours.get("workers", "2")
    if not workers.isdigit() or int(workers) < 1:
        raise ValueError(f"workers={workers} is not a positive whole number")
    request = Request(
        stage=stage,
        out=out,
        tokenizer=Path(ours["tokenizer"]) if ours.get("tokenizer") else None,
        dtype=DTYPES[ours["dtype"]] if "dtype" in ours else None,
        names=ours.get("names", "legacy"),
        workers=int(workers),
        final=ours.get("final") == "true",
        licence=_licence(ours.get("licence", "")),
    )
    export(request)
    print(f"exported {stage} to {out}")


if __name__ == "__main__":
    sys.exit(run(main))
