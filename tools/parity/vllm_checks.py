"""vLLM's answers about an export against the trainer's geometry and transformers' numbers."""

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema.model import ModelConfig
from models.anyres import AnyresGeometry
from tools.parity.cases import image_sizes
from tools.parity.finding import Finding, largest_difference, yes_or_no
from tools.processor_files import special_ids

ARCHITECTURE = "LlavaNextForConditionalGeneration"
# The same operations in float32, joined and ordered otherwise (fused projections).
LOGITS = 1e-4
# vLLM resizes by torchvision unless told otherwise, which was seen to differ from Pillow by one
# grey level of 255 on smooth pictures and by four on noise; other tiles differ by far more.
GREY_LEVELS = 8
_SIDE = Path(__file__).with_name("vllm_side.py")


@dataclass(frozen=True)
class VllmAnswers:
    """What vllm_side.py wrote; `arrays` holds only the chats that vLLM could answer."""

    report: dict[str, Any]
    arrays: dict[str, dict[str, np.ndarray]]

    @property
    def name(self) -> str:
        """For each finding."""
        return f"vLLM {self.report['vllm']}"

    def errors(self, *parts: str) -> list[str]:
        """What failed in these parts."""
        found: dict[str, str] = self.report["errors"]
        return [f"{part}: {found[part]}" for part in parts if part in found]


def ask_vllm(
    export: Path,
    python: Path,
    requests: Mapping[str, dict[str, Any]],
    ids: Mapping[str, np.ndarray],
    sizes: list[tuple[int, int]],
    network: bool = True,
) -> VllmAnswers:
    """An environment's vLLM on an export.

    Args:
        requests: bodies of chat requests by name.
        ids: int64 [T] by the same names, prompt and answer, for which logits are computed.
        sizes: (height, width) of the pictures whose tokens are counted.
        network: whether to compute, in float32 and memory to match.

    Raises:
        ValueError: vLLM cannot even be imported there, with the end of what it said.
    """
    from slurm.local import OFFLINE

    with tempfile.TemporaryDirectory(prefix="vllm-") as name:
        folder = Path(name)
        spec = {"sizes": sizes, "requests": dict(requests), "network": network}
        (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
        for case in requests:
            np.save(folder / f"{case}.ids.npy", ids[case])
        done = subprocess.run(
            [str(python), str(_SIDE), str(export), str(folder)],
            env={**os.environ, **OFFLINE, "GLOO_SOCKET_IFNAME": "lo"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            last = ([line for line in done.stderr.splitlines() if line.strip()] or [""])[-1]
            raise ValueError(f"vLLM of {python} does not start: {last} (code {done.returncode})")
        report = json.loads((folder / "vllm.json").read_text(encoding="utf-8"))
        arrays = {}
        for case in requests:
            if (folder / f"{case}.vllm.npz").is_file():
                with np.load(folder / f"{case}.vllm.npz") as found:
                    arrays[case] = {key: found[key] for key in found.files}
        return VllmAnswers(report, arrays)


def check_vllm(
    answers: VllmAnswers,
    export: Path,
    model: ModelConfig,
    theirs: Mapping[str, Mapping[str, np.ndarray]],
) -> list[Finding]:
    """All findings; only the first where vLLM refuses the configuration.

    Args:
        theirs: transformers' arrays of the same chats (hf_side.py).
    """
    first = check_configuration(answers, model)
    if answers.errors("config", "engine"):
        return [first]
    findings = [
        first,
        check_weights(answers, model),
        check_counts(answers, AnyresGeometry.from_model(model)),
        check_chats(answers, special_ids(export)["bos_token_id"], theirs),
        _pixels(answers, theirs, "pixels", "pixels as trained", 0.0),
        _pixels(answers, theirs, "default_pixels", "pixels by default", GREY_LEVELS / 127.5),
    ]
    if any("logits" in arrays for arrays in answers.arrays.values()):
        findings += [
            largest_difference(
                f"{answers.name}: features", _features(answers, theirs), LOGITS, "chats"
            ),
            largest_difference(
                f"{answers.name}: logits", _logits(answers, theirs), LOGITS, "chats"
            ),
            check_greedy(answers, theirs),
        ]
    elif problems := answers.errors("ranks", "network"):
        findings.append(yes_or_no(f"{answers.name}: logits", problems, ""))
    return findings


def check_configuration(answers: VllmAnswers, model: ModelConfig) -> Finding:
    """config.json as vLLM's registry and model configuration read it."""
    problems = answers.errors("config", "engine")
    found = answers.report["config"] or {}
    text = model.text
    positions = text.max_positions
    if text.rope_scaling.kind == "linear":  # vLLM takes it for the length before scaling
        positions = int(positions * text.rope_scaling.factor)
    kind = "default" if text.rope_scaling.kind == "none" else text.rope_scaling.kind
    rope = found.get("rope") or {}
    expected = {
        "architecture": (found.get("architecture"), ARCHITECTURE),
        "takes pictures": (found.get("multimodal"), True),
        "max_model_len": (found.get("max_model_len"), positions),
        "vocabulary": (found.get("vocabulary"), text.vocab_size),
        "rope_theta": (rope.get("rope_theta"), text.rope_theta),
        "rope_type": (rope.get("rope_type"), kind),
    }
    if not problems:
        problems = [
            f"{name} is {theirs}, trained with {ours}"
            for name, (theirs, ours) in expected.items()
            if theirs != ours
        ]
    good = (
        f"{found.get('class', '').rpartition('.')[2]}, {positions} positions, "
        f"{found.get('dtype')} where --dtype is not given"
    )
    return yes_or_no(f"{answers.name}: configuration", problems, good)


def check_weights(answers: VllmAnswers, model: ModelConfig) -> Finding:
    """Every tensor lands on a parameter of vLLM's model, and every parameter is filled."""
    name = f"{answers.name}: weights"
    if problems := answers.errors("weights"):
        return yes_or_no(name, problems, "")
    found = answers.report["weights"]
    problems = [f"{tensor} is refused ({why})" for tensor, why in found["refused"].items()]
    problems += [
        f"{parameter} gets {came:,} of {wanted:,} numbers"
        for parameter, (wanted, came) in found["unfilled"].items()
    ]
    unused = [tensor for tensor in found["left_out"] if not _unused(tensor, model)]
    problems += [f"{tensor} is left out" for tensor in unused]
    good = "every parameter is filled"
    if found["left_out"]:
        good += f"; {len(found['left_out'])} tensors behind the feature layer are left out"
    return yes_or_no(name, problems, good)


def _unused(tensor: str, model: ModelConfig) -> bool:
    """Whether it lies behind the layer whose features are taken."""
    _, tower, rest = tensor.partition("vision_model.")
    if not tower:
        return False
    words = rest.split(".")
    if words[:2] == ["encoder", "layers"]:
        return int(words[2]) >= model.vision.layers_used
    return words[0] in ("post_layernorm", "head")


def check_counts(answers: VllmAnswers, geometry: AnyresGeometry) -> Finding:
    """Image tokens of each size, and the most that vLLM keeps room for."""
    problems = answers.errors("tokens")
    found = answers.report["tokens"]
    sizes = image_sizes(geometry)
    if found:
        problems += [
            f"{width}x{height} px: {theirs} tokens, trained with {ours}"
            for (height, width), theirs in zip(sizes, found["counts"], strict=True)
            if theirs != (ours := geometry.n_tokens(height, width))
        ]
        most = max(geometry.n_tokens(*pinpoint) for pinpoint in geometry.pinpoints)
        if found["most"] != most:
            problems.append(f"keeps room for {found['most']} tokens a picture, not {most}")
    good = f"{len(sizes)} sizes count the same, {found and found['most']} at most"
    return yes_or_no(f"{answers.name}: image tokens", problems, good)


def check_chats(
    answers: VllmAnswers, bos: int | None, theirs: Mapping[str, Mapping[str, np.ndarray]]
) -> Finding:
    """Ids of each chat, pictures expanded, as transformers' processor has them; one BOS."""
    problems = answers.errors("chats", "default chats", "format")
    if answers.report["content_format"] not in ("openai", None):
        problems.append(f"the template is taken for {answers.report['content_format']!r} content")
    for name, arrays in theirs.items():
        if name not in answers.arrays:
            problems += answers.errors(name) or [f"{name}: no answer"]
            continue
        ids = answers.arrays[name]["ids"]
        if bos is not None and (count := int((ids == bos).sum())) != 1:
            problems.append(f"{name}: {count} BOS tokens")
        elif not np.array_equal(ids, arrays["ids_processor"]):
            problems.append(f"{name}: other token ids than by transformers' processor")
    good = f"{len(theirs)} requests, pictures expanded, as by transformers, one BOS"
    return yes_or_no(f"{answers.name}: chats", problems, good)


def _pixels(
    answers: VllmAnswers,
    theirs: Mapping[str, Mapping[str, np.ndarray]],
    key: str,
    label: str,
    limit: float,
) -> Finding:
    def pairs() -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, arrays in answers.arrays.items():
            if key in arrays and "pixels" in theirs[name]:
                ours = np.concatenate(list(theirs[name]["pixels"]))
                yield name, _without_padding(arrays[key]), _without_padding(ours)

    return largest_difference(f"{answers.name}: {label}", pairs(), limit, "chats with pictures")


def _without_padding(tiles: np.ndarray) -> np.ndarray:
    """A batch's pictures are padded with tiles of zeros, which no real tile is."""
    return tiles[np.abs(tiles).max(axis=(1, 2, 3)) > 0]


def _features(
    answers: VllmAnswers, theirs: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for name, arrays in answers.arrays.items():
        if "features" in arrays:
            yield name, arrays["features"], theirs[name]["features"]


def _logits(
    answers: VllmAnswers, theirs: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    for name, arrays in answers.arrays.items():
        if "logits" in arrays:
            yield name, arrays["logits"][int(theirs[name]["first"]) :], theirs[name]["logits"]


def check_greedy(answers: VllmAnswers, theirs: Mapping[str, Mapping[str, np.ndarray]]) -> Finding:
    """vLLM's network, given transformers' answer, would have written every token of it."""
    problems = []
    for name, arrays in theirs.items():
        if "logits" not in answers.arrays.get(name, {}):
            problems.append(f"{name}: no answer")
            continue
        ids, prompt = arrays["ids"], int(arrays["prompt"])
        logits = answers.arrays[name]["logits"][prompt - 1 : -1].copy()
        logits[:, arrays["ends"]] = -np.inf  # held back on the other side
        chosen = logits.argmax(axis=1)
        differing = np.flatnonzero(chosen != ids[prompt:])
        if len(differing):
            problems.append(f"{name}: token {int(differing[0])} of the answer is another")
    return yes_or_no(f"{answers.name}: greedy answers", problems, f"{len(theirs)} are the same")
