"""Does an export answer the same in every program that may serve it?

    python -m tools.serve_check hf=DIR [pythons=[.venv-serve/bin/python,...]] [tokens=64]
        [vllm=.venv-vllm/bin/python] [server=DIR/bin/vllm]

Asks transformers in this environment and in others, each in a process of its own, the questions of
the gate, and compares token ids, pixels, features, logits and greedy answers; then vLLM's own code
without a GPU; then, where there is a GPU, a real `vllm serve` by the model card's request. What
could not be tried is said.
"""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.schema.model import ModelConfig
from models.anyres import AnyresGeometry
from tools import vllm_server
from tools.command import required, run, split_arguments
from tools.model_from_hf import from_llava
from tools.parity.cases import Case, cases, image_sizes
from tools.parity.chat_requests import CARD, card_case, card_request, request_of, with_picture
from tools.parity.finding import Finding, largest_difference, yes_or_no
from tools.parity.network import GREEDY, ask_transformers
from tools.parity.vllm_checks import ask_vllm, check_vllm
from tools.parity_gate import certified
from tools.processor_files import read_tokenizer

USAGE = (
    "python -m tools.serve_check hf=DIR [pythons=[DIR/bin/python,...]] [tokens=64] "
    "[vllm=DIR/bin/python] [server=DIR/bin/vllm]"
)
HERE = Path(".venv-serve/bin/python")
VLLM = Path(".venv-vllm/bin/python")
# The same operations in float32; releases may order a sum otherwise.
LOGITS = 1e-5


@dataclass(frozen=True)
class Answers:
    """What one environment's transformers made of all cases."""

    version: str
    arrays: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Export:
    """A folder and what it is asked; `card` is the model card's request, None where it has none."""

    path: Path
    model: ModelConfig
    cases: tuple[Case, ...]
    card: dict[str, Any] | None

    @classmethod
    def open(cls, path: Path) -> "Export":
        """Raises ValueError for a folder that is no LLaVA-NeXT export."""
        model = from_llava("export", path).model
        geometry = AnyresGeometry.from_model(model)
        card = card_request(path)
        own = () if card is None else (card_case(card, geometry),)
        return cls(path, model, (*cases(geometry), *own), card)

    def request(self, case: Case) -> dict[str, Any]:
        """The body that asks a server this case."""
        if case.name == CARD and self.card is not None:
            return with_picture(self.card, case.pictures[0], str(self.path))
        return request_of(case, str(self.path))


def compare(ours: Answers, theirs: Answers) -> list[Finding]:
    """Each kind of array of every case, ours against another release's."""
    label = f"{ours.version} and {theirs.version}"

    def pairs(key: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        for name, arrays in ours.arrays.items():
            if key in arrays:
                yield name, arrays[key], theirs.arrays[name][key]

    different = [
        f"{name}, {key}"
        for name, arrays in ours.arrays.items()
        for key in arrays
        if key.startswith("ids") and not np.array_equal(arrays[key], theirs.arrays[name][key])
    ]
    return [
        yes_or_no(f"{label}: tokens", different, "chats and greedy answers are the same"),
        largest_difference(f"{label}: pixels", pairs("pixels"), 0.0, "chats with pictures"),
        largest_difference(f"{label}: features", pairs("features"), LOGITS, "chats with pictures"),
        largest_difference(f"{label}: logits", pairs("logits"), LOGITS, "chats"),
    ]


def ask(export: Export, python: Path, tokens: int) -> Answers:
    """One environment's answers. Raises ValueError where it cannot run the export."""
    with tempfile.TemporaryDirectory(prefix="serve-") as name:
        folder = Path(name)
        version = ask_transformers(export.path, python, folder, export.cases, tokens, print)
        arrays = {}
        for case in export.cases:
            with np.load(folder / f"{case.name}.npz") as loaded:
                arrays[case.name] = {key: loaded[key] for key in loaded.files}
        return Answers(version, arrays)


def ask_vllms_code(export: Export, own: Answers, python: Path) -> list[Finding]:
    """vLLM's classes on this machine's processor, against transformers and our geometry."""
    answers = ask_vllm(
        export.path,
        python,
        {case.name: export.request(case) for case in export.cases},
        {name: arrays["ids"] for name, arrays in own.arrays.items()},
        image_sizes(AnyresGeometry.from_model(export.model)),
    )
    versions = "vLLM {vllm} (transformers {transformers}, torch {torch})".format(**answers.report)
    print(f"{versions} has read the folder, attention by torch", flush=True)
    return check_vllm(answers, export.path, export.model, own.arrays)


def ask_server(export: Export, own: Answers, server: Path, tokens: int) -> list[Finding]:
    """A real server's answer to the card's request. Never run on a GPU so far."""
    (case,) = (case for case in export.cases if case.name == CARD)
    body = {**export.request(case), "max_tokens": tokens, "min_tokens": tokens}
    written = own.arrays[CARD]["ids"][-tokens:].tolist()
    expected = read_tokenizer(export.path).decode(written, skip_special_tokens=True)
    command = [str(server), *vllm_server.arguments(export.path)]
    with tempfile.TemporaryDirectory(prefix="vllm-serve-") as name:
        try:
            with vllm_server.serving(command, Path(name) / "log", print) as address:
                answer = vllm_server.ask(address, body)
        except ValueError as error:
            return [Finding("vllm serve: the card's request", False, str(error))]
    same = answer.strip() == expected.strip()
    detail = (
        f"{tokens} tokens as transformers {own.version}"
        if same
        else (f"answers {answer[:80]!r}, transformers {expected[:80]!r}")
    )
    return [Finding("vllm serve: the card's request", same, detail)]


def why_no_server(export: Export, server: Path | None) -> str:
    """Why `vllm serve` is not tried; empty where it is."""
    if export.card is None:
        return "README.md has no curl request"
    if not has_gpu():
        return "no NVIDIA GPU on this machine"
    if server is None:
        return "there is a GPU, but no vllm on PATH (server=DIR/bin/vllm names one)"
    return ""


def has_gpu() -> bool:
    """Whether the driver lists one; the torch here may be the build for processors."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    done = subprocess.run([command, "-L"], capture_output=True, text=True)
    return done.returncode == 0 and "GPU 0" in done.stdout


def main(arguments: list[str]) -> None:
    """Command line; see the module's docstring."""
    ours, rest = split_arguments(arguments, ("hf", "pythons", "tokens", "vllm", "server"))
    if rest or not ours.get("tokens", "1").isdigit():
        raise ValueError(f"unknown argument {(rest or ['tokens='])[0]!r}; usage: {USAGE}")
    export = Export.open(required(ours, "hf", USAGE))
    tokens = int(ours.get("tokens") or GREEDY)
    listed = ours.get("pythons", str(HERE)).strip("[]").split(",")
    findings: list[Finding] = []
    if not certified(export.path):
        print(f"note: {export.path} has no certificate of its files; make parity writes one")
    own = ask(export, Path(sys.executable), tokens)
    print(f"transformers {own.version} loads the folder and answers")
    for python in [Path(word.strip()) for word in listed if word.strip()]:
        if not python.exists():
            print(f"not tried: {python} does not exist (make setup-serve makes {HERE})")
            continue
        findings += _shown(compare(own, ask(export, python, tokens)))
    vllm = Path(ours.get("vllm") or VLLM)
    if vllm.exists():
        findings += _shown(ask_vllms_code(export, own, vllm))
    else:
        print(f"not tried: vLLM's code, {vllm} does not exist (make setup-vllm makes {VLLM})")
    named = ours.get("server") or shutil.which("vllm")
    server = Path(named) if named else None
    if reason := why_no_server(export, server):
        print(f"not tried: vllm serve, {reason}")
    elif server is not None:
        findings += _shown(ask_server(export, own, server, tokens))
    failed = [finding.name for finding in findings if not finding.passed]
    if failed:
        raise ValueError(f"{export.path} answers differently: {', '.join(failed)}")


def _shown(findings: Sequence[Finding]) -> Sequence[Finding]:
    for finding in findings:
        print(finding.line(), flush=True)
    return findings


if __name__ == "__main__":
    sys.exit(run(main))
