"""The GPU script tried on the CPU, with everything a bare GPU machine lacks made unimportable."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conf.compose import compose
from tools.benchmarks import gpu
from tools.benchmarks.batches import write_batches
from tools.benchmarks.gpu import __main__ as command
from tools.benchmarks.gpu.child import PARTS
from tools.benchmarks.gpu.report import LATE, OK, Report, read_report
from tools.benchmarks.gpu.shapes import real, tiny
from tools.benchmarks.synthetic import packed_row

REPOSITORY = Path(gpu.__file__).resolve().parents[3]
# What the bare machine has: torch, NumPy, megatron-core, Transformer Engine and what these need.
ABSENT = (
    "pyarrow hydra omegaconf yaml PIL tokenizers transformers webdataset jinja2 safetensors "
    "tensorboard matplotlib sklearn submitit psutil trl"
).split()
BLOCK = f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *more):
        if name.partition(".")[0] in {ABSENT}:
            return None  # as if it were not installed
        return self.finder.find_spec(name, *more)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(results, what was printed) of all parts in tiny shapes."""
    root = tmp_path_factory.mktemp("gpu")
    (root / "sitecustomize.py").write_text(BLOCK)
    shapes = tiny()
    rows = [[packed_row(shapes.curve, 256, shapes.mixture, seed)] for seed in range(6)]
    write_batches(root / "batches.npz", rows)
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            sys.executable, "-m", "tools.benchmarks.gpu", f"out={root / 'out'}", "device=cpu",
            "shape=tiny", f"batches={root / 'batches.npz'}",
        ],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return root / "out", done.stdout


def test_every_part_runs_without_what_a_bare_machine_lacks(trial: tuple[Path, str]) -> None:
    out, printed = trial
    reports = {part: read_report(out / f"{part}.json", part) for part in PARTS}
    assert {part: report.status for part, report in reports.items()} == dict.fromkeys(PARTS, OK), [
        (report.error, report.data.get("tracebacks")) for report in reports.values()
    ]
    assert printed.rstrip().splitlines()[-1].startswith("| resume | ok |")
    assert "nothing below is a GPU's figure" in printed
    assert (out / "tables.md").read_text() in printed
    assert not list(out.glob("resume_*")), "checkpoints were left behind"


def test_figures_of_the_trial(trial: tuple[Path, str]) -> None:
    out, _ = trial
    smoke, speed, parity, curve, resume = (
        read_report(out / f"{part}.json", part) for part in PARTS
    )
    assert [row[3] for row in smoke.tables[0].rows] == ["yes"] * 4
    lengths = [(row[0], row[1]) for row in speed.tables[0].rows]
    assert lengths == [("fp32", 128), ("fp32", 256), ("bf16", 128), ("bf16", 256)]
    measured = [row for row in speed.tables[1].rows if row[1] in ("weights", "gradients")]
    assert len(measured) == 8
    assert all(row[4] == pytest.approx(1, abs=0.01) for row in measured), "not as planned"
    assert len(speed.tables[2].rows) == 2
    assert parity.tables[0].rows[0][-1] == "yes"
    assert 1e-6 < parity.tables[0].rows[0][1] < 1e-2  # BF16 is another arithmetic, but the same net
    assert any("transformers is not compared" in note for note in parity.notes)
    fp32, bf16 = curve.data["fp32"], curve.data["bf16"]
    assert len(fp32) == 6 and fp32 != bf16
    assert fp32 == pytest.approx(bf16, rel=1e-3)
    assert [row[3] for row in resume.tables[0].rows] == ["bit for bit"] * 2


def test_a_part_that_hangs_is_killed_and_the_next_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The children are a stand-in: what is tested is who watches them."""
    child = tmp_path / "child.py"
    child.write_text(
        "import json, pathlib, sys, time\n"
        "words = dict(word.split('=', 1) for word in sys.argv[1:] if '=' in word)\n"
        "for part in words['parts'].split(','):\n"
        "    path = pathlib.Path(words['out']) / f'{part}.json'\n"
        "    value = dict(part=part, path='', status='running', tables=[], notes=[part])\n"
        "    path.write_text(json.dumps(value))\n"
        "    time.sleep(60 if part == 'smoke' else 0.5)\n"
        "    if part == 'parity':\n"
        "        sys.exit('no GPU today')\n"
        "    path.write_text(json.dumps({**value, 'status': 'ok'}))\n"
    )
    monkeypatch.setattr(command, "BUDGETS", {"smoke": 1.5, "parity": 30, "curve": 30})
    real_popen = subprocess.Popen

    def popen(words: list[str], **named: object) -> object:
        return real_popen([words[0], str(child), *words[3:]], **named)  # type: ignore[call-overload]

    monkeypatch.setattr(command.subprocess, "Popen", popen)
    parts = ["smoke", "parity", "curve"]
    command.run_parts(tmp_path, parts, [], command.time.monotonic() + 60, "cpu")
    reports = [read_report(tmp_path / f"{part}.json", part) for part in parts]
    assert [report.status for report in reports] == [LATE, "failed", OK]
    assert reports[0].notes == ["smoke"], "what it had written before is lost"
    assert "status 1: no GPU today" in reports[1].error


def test_failures_of_items_are_kept(tmp_path: Path) -> None:
    report = Report("smoke", tmp_path / "smoke.json")
    table = report.table("t", ["a"])

    def fails() -> None:
        report.row(table, 1)
        raise RuntimeError("CUDA is not amused\nat all")

    assert not report.attempt("item", fails)
    found = read_report(report.path, "smoke")
    assert found.status == "failed" and found.tables[0].rows == [[1]]
    assert found.notes == ["item failed: RuntimeError: CUDA is not amused at all"]
    assert "fails" in found.data["tracebacks"]["item"]


def test_the_real_layers_are_the_models() -> None:
    wanted = compose(["model=amalia_vl_9b"]).model
    found = real(layers=42).speed
    assert replace(found, vision=replace(found.vision, layers=27)) == wanted
    assert 1e9 < _parameters(real(12).curve) < 2e9


def _parameters(model: object) -> float:
    from models.flops import decoder_token_flops, encoder_flops

    vision, text = model.vision, model.text  # type: ignore[attr-defined]
    return decoder_token_flops(text) / 2 + encoder_flops(vision) / 2 / vision.grid**2


@pytest.mark.parametrize(
    "words, wrong",
    [
        (["parts=smoke"], "out= is missing"),
        (["out=x", "parts=coffee"], "parts=coffee is none of"),
        (["out=x", "device=tpu"], "device= is cuda or cpu"),
        (["out=x", "layers=many"], "take numbers"),
    ],
)
def test_arguments_are_refused(words: list[str], wrong: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=wrong):
        command.main([word.replace("out=x", f"out={tmp_path}") for word in words])


def test_facts_are_written_beside(trial: tuple[Path, str]) -> None:
    results = json.loads((trial[0] / "results.json").read_text())
    facts = results["facts"]
    assert [part["status"] for part in results["parts"]] == [OK] * len(PARTS)
    assert {"date", "commit", "command", "hardware", "versions"} <= set(facts)
