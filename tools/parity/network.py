"""Both networks on the same chats: each in processes of its own, one after the other."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.compose import to_mapping
from data_shards.chat import ChatTokenizer
from tools.parity.cases import Case
from tools.parity.finding import Finding, largest_difference, yes_or_no
from tools.parity.our_side import OurSide, save_batch
from tools.parity.processor import PIXELS, check_chats, normalised

# Float32 sums in another order: the same bound as the model's own parity tests.
LOGITS = 1e-4
FEATURES = 1e-4
GREEDY = 64  # tokens
_HF_SIDE = Path(__file__).with_name("hf_side.py")


@dataclass(frozen=True)
class Sides:
    """Where to find what is compared."""

    export: Path
    checkpoint: Path
    our: OurSide
    bos: str | None
    python: Path  # whose transformers reads the export
    tokens: int = GREEDY
    rounded: str = "float32"  # the export's dtype, to which the trainer's weights are rounded too


def compare(sides: Sides, cases: Sequence[Case], say: Callable[[str], None]) -> list[Finding]:
    """Chats, pixels, features, logits, top tokens and greedy answers.

    Raises:
        ValueError: one side cannot be run at all, with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="parity-") as name:
        folder = Path(name)
        version = ask_transformers(sides.export, sides.python, folder, cases, sides.tokens, say)
        theirs = {case.name: _load(folder / f"{case.name}.npz") for case in cases}
        say(f"transformers {version} has answered")
        prompts = {case.name: sides.our.prompt(case) for case in cases}
        findings = [
            check_chats(
                sides.our.tokenizer,
                sides.bos,
                {name: (prompts[name], theirs[name]) for name in prompts},
                f"transformers {version}",
            )
        ]
        batches = {}
        for case in cases:
            ids = np.concatenate([prompts[case.name], theirs[case.name]["ids"][-sides.tokens :]])
            batches[case.name] = sides.our.batch(case, ids)
            first = len(prompts[case.name]) - (
                int(theirs[case.name]["prompt"]) - int(theirs[case.name]["first"])
            )
            save_batch(folder / f"{case.name}.batch.npz", batches[case.name], first)
        findings.append(_pixels(cases, batches, theirs))
        _run_ranks(sides, cases, folder, say)
        ours = {case.name: _load(folder / f"{case.name}.logits.npz") for case in cases}
        findings += [
            _features(cases, folder, theirs),
            _logits(ours, theirs),
            _top(ours, theirs),
            _greedy(ours, theirs, sides),
        ]
        return findings


def ask_transformers(
    export: Path,
    python: Path,
    folder: Path,
    cases: Sequence[Case],
    tokens: int,
    say: Callable[[str], None],
) -> str:
    """Have an environment's transformers answer all cases into `folder`; returns its version.

    Raises:
        ValueError: it cannot, with the end of what it said.
    """
    _write_cases(folder, cases)
    command = [str(python), str(_HF_SIDE), str(export), str(folder), str(folder), str(tokens)]
    _run(command, {}, f"transformers of {python} cannot run the export", say)
    return (folder / "version.txt").read_text(encoding="utf-8")


def _write_cases(folder: Path, cases: Sequence[Case]) -> None:
    listed = []
    for case in cases:
        names = [f"{case.name} {number}.png" for number in range(len(case.pictures))]
        for name, data in zip(names, case.pictures, strict=True):
            (folder / name).write_bytes(data)
        listed.append({"name": case.name, "pictures": names, "text": case.text})
    (folder / "cases.json").write_text(json.dumps(listed), encoding="utf-8")


def _run_ranks(
    sides: Sides, cases: Sequence[Case], folder: Path, say: Callable[[str], None]
) -> None:
    spec = {
        "config": to_mapping(sides.our.config),
        "checkpoint": str(sides.checkpoint),
        "folder": str(folder),
        "rounded": sides.rounded,
        "cases": [case.name for case in cases],
    }
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    ranks = sides.our.config.parallel.world_size
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    command += [f"--nproc-per-node={ranks}", sys.executable, "-m", "tools.parity.megatron_rank"]
    threads = max((os.cpu_count() or 1) // ranks, 1)
    environment = {"OMP_NUM_THREADS": str(threads)}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    _run(
        [*command, str(folder / "spec.json")],
        environment,
        "the trainer's network cannot run the checkpoint",
        say,
    )


def _run(
    command: list[str], environment: dict[str, str], failure: str, say: Callable[[str], None]
) -> None:
    from slurm.local import OFFLINE

    done = subprocess.run(
        command,
        env={**os.environ, **OFFLINE, **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-12:]
        errors = [line for line in last if "Error" in line] or last[-1:]
        raise ValueError(f"{failure}: {errors[-1].strip() if errors else done.returncode}")
    for line in done.stdout.splitlines():
        say(line)


def _load(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _pixels(cases: Sequence[Case], batches: dict[str, Any], theirs: dict[str, Any]) -> Finding:
    def pairs() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for case in cases:
            if case.pictures:
                pixels = theirs[case.name]["pixels"]  # [pictures, most tiles, 3, side, side]
                ours = normalised(batches[case.name].tiles_NCHW)
                # Pictures with fewer tiles are padded with zeros, which no real tile is.
                real = [tiles[np.abs(tiles).max(axis=(1, 2, 3)) > 0] for tiles in pixels]
                yield case.name, ours, np.concatenate(real)

    return largest_difference("pixels", pairs(), PIXELS, "chats with pictures")


def _features(cases: Sequence[Case], folder: Path, theirs: dict[str, Any]) -> Finding:
    def pairs() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for case in cases:
            if case.pictures:
                found = np.load(folder / f"{case.name}.features.npy")
                yield case.name, found, theirs[case.name]["features"]

    return largest_difference("image features", pairs(), FEATURES, "chats with pictures")


def _logits(ours: dict[str, Any], theirs: dict[str, Any]) -> Finding:
    def pairs() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, arrays in theirs.items():
            rows = len(arrays["logits"])  # ours may be padded behind
            yield name, ours[name]["logits"][:rows], arrays["logits"]

    return largest_difference("logits", pairs(), LOGITS, "chats, the prompt's end and the answer")


def _top(ours: dict[str, Any], theirs: dict[str, Any]) -> Finding:
    equal = total = 0
    for name, arrays in theirs.items():
        rows = arrays["top"]
        mine = ours[name]["top"][: len(rows)]
        if mine.shape != rows.shape:
            return Finding("top tokens", False, f"{name}: {len(mine)} positions, not {len(rows)}")
        # As sets: two that are equal within the tolerance may change places.
        equal += int((np.sort(mine, axis=1) == np.sort(rows, axis=1)).all(axis=1).sum())
        total += len(rows)
    share = equal / max(total, 1)
    detail = f"the five likeliest tokens agree at {equal} of {total} positions"
    return Finding("top tokens", share >= 0.999, detail)


def _greedy(ours: dict[str, Any], theirs: dict[str, Any], sides: Sides) -> Finding:
    """The trainer's network, given the other's answer, would have written every token of it; so
    greedy decoding writes the same."""
    problems = []
    for name, arrays in theirs.items():
        ids, prompt = arrays["ids"], int(arrays["prompt"])
        top = ours[name]["top"][: len(ids)][prompt - 1 : -1]
        # The other side has held the end tokens back.
        allowed = ~np.isin(top, arrays["ends"])
        chosen = top[np.arange(len(top)), allowed.argmax(axis=1)]
        if chosen.shape != ids[prompt:].shape:
            problems.append(f"{name}: the prompts differ in length")
            continue
        differing = np.flatnonzero(chosen != ids[prompt:])
        if len(differing):
            problems.append(f"{name}: token {int(differing[0])} of the answer is another")
    return yes_or_no(
        "greedy answers", problems, f"{len(theirs)} answers of {sides.tokens} tokens are the same"
    )


def tokenizer_of(stage_tokenizer: Path) -> ChatTokenizer:
    """The tokenizer that the run was trained with."""
    return ChatTokenizer.from_directory(stage_tokenizer)


def layout_name(parallel: Any) -> str:
    """For the certificate."""
    sizes = {name: value for name, value in asdict(parallel).items() if name in _SIZES}
    return " ".join(f"{name}={value}" for name, value in sizes.items())


_SIZES = ("tensor", "pipeline", "virtual_pipeline")
