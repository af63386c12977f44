"""serve-check passes a true export, names what is wrong with another, and says what it did not try.

The environments of `make setup-serve` and `make setup-vllm` are asked where they exist.
"""

import json
import math
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from models.anyres import AnyresGeometry
from tests.models.test_hf_state import KEYS_9B, model_9b
from tests.tools.parity.test_gate import change_json, change_weights
from tools import hf_export, serve_check
from tools.command import run
from tools.hf_config import llava_config
from tools.parity import hf_side, network
from tools.parity.cases import image_sizes
from tools.parity.finding import Finding
from tools.parity.vllm_checks import VllmAnswers, ask_vllm, check_vllm
from tools.processor_files import special_ids
from tools.serve_check import Answers, Export

ROOT = Path(__file__).parents[2]
TOKENS = 8


def environment(python: Path, verb: str) -> Any:
    path = ROOT / python
    return pytest.mark.skipif(not path.exists(), reason=f"no {python}: make {verb} makes it")


with_transformers_5 = environment(serve_check.HERE, "setup-serve")
with_vllm = environment(serve_check.VLLM, "setup-vllm")


@pytest.fixture(scope="module")
def export(run_directory: Path) -> Export:
    return Export.open(run_directory / "hf")


@pytest.fixture(scope="module")
def own(export: Export) -> Answers:
    """This environment's transformers, in this process instead of one that imports torch again."""

    def call(command: list[str], *_: Any) -> None:
        assert command[1].endswith("hf_side.py")
        hf_side.main(command[2:])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "_run", call)
        return serve_check.ask(export, Path(sys.executable), TOKENS)


def failed(findings: list[Finding]) -> dict[str, str]:
    return {
        finding.name.rpartition(": ")[2]: finding.detail
        for finding in findings
        if not finding.passed
    }


def changed(answers: Answers, case: str, key: str, change: Callable[[Any], Any]) -> Answers:
    arrays = {name: dict(of_case) for name, of_case in answers.arrays.items()}
    arrays[case][key] = change(arrays[case][key])
    return Answers("another", arrays)


def test_the_cards_own_question_is_among_the_cases(export: Export, own: Answers) -> None:
    assert export.card is not None
    card = export.request(export.cases[-1])
    (message,) = card["messages"]
    image, text = message["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == export.cases[-1].text == "O que se vê nesta fotografia?"
    assert card["max_tokens"] == 128 and card["model"] == str(export.path)
    assert own.arrays["card"]["ids"].size > TOKENS


def test_equal_answers_pass_and_others_are_named(own: Answers) -> None:
    assert not failed(serve_check.compare(own, own))
    another = changed(own, "tall", "ids", lambda ids: ids[::-1])
    assert failed(serve_check.compare(own, another)) == {"tokens": "tall, ids"}
    another = changed(own, "wide", "pixels", lambda pixels: pixels + np.float32(1e-3))
    assert set(failed(serve_check.compare(own, another))) == {"pixels"}
    another = changed(own, "text only", "logits", lambda logits: logits + 2e-5)
    assert set(failed(serve_check.compare(own, another))) == {"logits"}


@pytest.fixture
def here_only(own: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of this environment that were given before; no GPU."""
    monkeypatch.setattr(serve_check, "ask", lambda *_: own)
    monkeypatch.setattr(serve_check, "has_gpu", lambda: False)


@pytest.mark.usefixtures("here_only")
def test_what_is_not_tried_is_said(export: Export, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"hf={export.path}", "pythons=[nowhere/python]", "vllm=nowhere/vllm", "tokens=8"]
    assert run(serve_check.main, words) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].endswith("has no certificate of its files; make parity writes one")
    assert [line for line in told if line.startswith("not tried: ")] == [
        "not tried: nowhere/python does not exist (make setup-serve makes .venv-serve/bin/python)",
        "not tried: vLLM's code, nowhere/vllm does not exist "
        "(make setup-vllm makes .venv-vllm/bin/python)",
        "not tried: vllm serve, no NVIDIA GPU on this machine",
    ]


@pytest.mark.usefixtures("here_only")
def test_a_failure_is_the_commands_failure(
    export: Export,
    own: Answers,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    another = changed(own, "tall", "logits", lambda logits: -logits)
    answers = iter([own, another])
    monkeypatch.setattr(serve_check, "ask", lambda *_: next(answers))
    words = [f"hf={export.path}", f"pythons=[{sys.executable}]", "vllm=nowhere"]
    assert run(serve_check.main, words) == 1
    captured = capsys.readouterr()
    assert f"FAIL {own.version} and another: logits" in captured.out
    assert "answers differently" in captured.err


def test_other_folders_and_words_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert run(serve_check.main, [f"hf={tmp_path}"]) == 1
    assert "is not llava_next" in capsys.readouterr().err
    assert run(serve_check.main, [f"hf={tmp_path}", "gpu=1"]) == 1
    assert "usage: " in capsys.readouterr().err


@with_transformers_5
@pytest.mark.slow
def test_transformers_5_answers_the_same(export: Export, own: Answers) -> None:
    theirs = serve_check.ask(export, ROOT / serve_check.HERE, TOKENS)
    assert theirs.version.startswith("5.")
    assert not failed(serve_check.compare(own, theirs))


@with_vllm
@pytest.mark.slow
def test_vllms_own_code_reads_the_export(export: Export, own: Answers) -> None:
    findings = serve_check.ask_vllms_code(export, own, ROOT / serve_check.VLLM)
    assert not failed(findings)
    names = {finding.name.partition(": ")[2] for finding in findings}
    assert names == {
        "configuration",
        "weights",
        "image tokens",
        "chats",
        "pixels as trained",
        "pixels by default",
        "features",
        "logits",
        "greedy answers",
    }


@with_vllm
@pytest.mark.slow
def test_vllms_own_code_finds_planted_faults(
    run_directory: Path, tmp_path: Path, export: Export, own: Answers
) -> None:
    """Several at once, for each start of vLLM takes seconds; with the names of the model in memory,
    all of which but the planted one must land."""
    folder = tmp_path / "hf"
    words = [f"stage={run_directory / 'import'}", f"out={folder}", "names=new"]
    assert run(hf_export.main, words) == 0
    layer = "model.language_model.layers.1."

    def rename(tensors: dict[str, Any]) -> None:
        tensors[f"{layer}self_attn.query.weight"] = tensors.pop(f"{layer}self_attn.q_proj.weight")
        tensors[f"{layer}mlp.down_proj.weight"] = tensors[f"{layer}mlp.down_proj.weight"].T

    change_weights(folder, rename)
    change_json(folder / "config.json", lambda config: config["image_grid_pinpoints"].pop(3))
    change_json(folder / "config.json", lambda config: config["text_config"].update(rope_theta=2.0))
    template = folder / "chat_template.jinja"
    template.write_text("{{ bos_token }}" + template.read_text())
    answers = ask_vllm(
        folder,
        ROOT / serve_check.VLLM,
        {case.name: export.request(case) for case in export.cases},
        {name: arrays["ids"] for name, arrays in own.arrays.items()},
        image_sizes(AnyresGeometry.from_model(export.model)),
        network=False,
    )
    found = failed(check_vllm(answers, folder, export.model, own.arrays))
    assert "rope_theta is 2.0, trained with 10000.0" in found["configuration"]
    refused = answers.report["weights"]["refused"]
    assert set(refused) == {f"{layer}self_attn.query.weight", f"{layer}mlp.down_proj.weight"}
    assert "language_model.model.layers.1.self_attn.qkv_proj.weight" in str(
        answers.report["weights"]["unfilled"]
    )
    assert "is refused" in found["weights"]
    assert "tokens, trained with" in found["image tokens"]
    assert "2 BOS tokens" in found["chats"]


@with_vllm
@pytest.mark.slow
def test_the_9bs_names_and_shapes_land_in_vllms_model(export: Export, tmp_path: Path) -> None:
    """By shape alone, from a file of 19 GB that is all hole."""
    folder, model = tmp_path / "hf", model_9b()
    shutil.copytree(export.path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = llava_config(model, special_ids(folder), "bfloat16")
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for line in KEYS_9B.read_text().splitlines():
        if not line.startswith("#"):
            name, shape = line.split("\t")
            start, end = end, end + 2 * math.prod(json.loads(shape))
            entry = {"dtype": "BF16", "shape": json.loads(shape), "data_offsets": [start, end]}
            header[name] = entry
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    sizes = image_sizes(AnyresGeometry.from_model(model))
    answers = ask_vllm(folder, ROOT / serve_check.VLLM, {}, {}, sizes, network=False)
    assert not failed(check_vllm(answers, folder, model, {}))
    assert len(answers.report["weights"]["left_out"]) == 18
    assert answers.report["tokens"]["most"] == 7776


def true_answers(export: Export, own: Answers) -> VllmAnswers:
    """What vLLM would say of a true export; for what each check looks at, without vLLM."""
    geometry = AnyresGeometry.from_model(export.model)
    report = {
        "vllm": "0",
        "errors": {},
        "config": {
            "architecture": "LlavaNextForConditionalGeneration",
            "class": "vllm.LlavaNextForConditionalGeneration",
            "multimodal": True,
            "max_model_len": export.model.text.max_positions,
            "dtype": "bfloat16",
            "vocabulary": export.model.text.vocab_size,
            "rope": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        "tokens": {
            "counts": [geometry.n_tokens(*size) for size in image_sizes(geometry)],
            "most": 96,
        },
        "content_format": "openai",
        "weights": {"left_out": [], "refused": {}, "unfilled": {}},
    }
    arrays = {}
    for name, theirs in own.arrays.items():
        arrays[name] = {"ids": theirs["ids_processor"]}
        if "pixels" in theirs:
            tiles = np.concatenate(list(theirs["pixels"]))
            tiles = tiles[np.abs(tiles).max(axis=(1, 2, 3)) > 0]
            arrays[name] |= {"pixels": tiles, "default_pixels": tiles + np.float32(1 / 127.5)}
            arrays[name]["features"] = theirs["features"]
        before = np.zeros((int(theirs["first"]), theirs["logits"].shape[1]), np.float32)
        arrays[name]["logits"] = np.concatenate([before, theirs["logits"]])
    return VllmAnswers(report, arrays)


def lose(part: str, **values: Any) -> Callable[[VllmAnswers], None]:
    return lambda answers: answers.report[part].update(values)


def shift(key: str, by: float) -> Callable[[VllmAnswers], None]:
    def plant(answers: VllmAnswers) -> None:
        answers.arrays["wide"][key] = answers.arrays["wide"][key] + np.float32(by)

    return plant


def unable(answers: VllmAnswers) -> None:
    answers.report["errors"]["network"] = "OSError: no memory"
    for arrays in answers.arrays.values():
        arrays.pop("logits"), arrays.pop("features", None)


LAST = "vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias"
STRETCHED = {"rope_theta": 1e4, "rope_type": "yarn"}
# fault -> what plants it, the checks that fail, words of the first one's line
FAULTS: dict[str, tuple[Callable[[VllmAnswers], Any], tuple[str, ...], str]] = {
    "class": (lose("config", architecture="LlavaForIt"), ("configuration",), "LlavaForIt"),
    "length": (lose("config", max_model_len=256), ("configuration",), "max_model_len is 256"),
    "stretch": (lose("config", rope=STRETCHED), ("configuration",), "rope_type is yarn"),
    "lost": (lose("weights", left_out=["image_newline"]), ("weights",), "image_newline is left"),
    "used": (lose("weights", left_out=[LAST.replace(".2.", ".1.")]), ("weights",), "layers.1"),
    "count": (
        lambda answers: answers.report["tokens"]["counts"].reverse(),
        ("image tokens",),
        "tokens, trained with",
    ),
    "room": (lose("tokens", most=95), ("image tokens",), "keeps room for 95"),
    "format": (
        lambda answers: answers.report.update(content_format="string"),
        ("chats",),
        "'string' content",
    ),
    "silent": (
        lambda answers: answers.arrays.pop("tall"),
        ("chats", "greedy answers"),
        "tall: no answer",
    ),
    "broken": (lose("errors", weights="KeyError: x"), ("weights",), "KeyError: x"),
    "unable": (unable, ("logits",), "no memory"),
    "pixels": (shift("pixels", 1e-3), ("pixels as trained",), "worst: wide"),
    "resized": (shift("default_pixels", 0.1), ("pixels by default",), "worst: wide"),
    "features": (shift("features", 2e-4), ("features",), "worst: wide"),
    "logits": (shift("logits", 2e-4), ("logits",), "worst: wide"),
    "greedy": (
        lambda answers: answers.arrays["wide"].update(logits=-answers.arrays["wide"]["logits"]),
        ("greedy answers", "logits"),
        "wide: token 0 of the answer",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_check_sees_what_it_is_for(export: Export, own: Answers, fault: str) -> None:
    plant, names, words = FAULTS[fault]
    answers = true_answers(export, own)
    assert not failed(check_vllm(answers, export.path, export.model, own.arrays))
    plant(answers)
    found = failed(check_vllm(answers, export.path, export.model, own.arrays))
    assert set(found) == set(names) and words in found[names[0]], found


def test_a_configuration_that_vllm_refuses_is_the_only_finding(
    export: Export, own: Answers
) -> None:
    report = {"vllm": "0", "errors": {"config": "ValueError: unknown"}, "config": None}
    (finding,) = check_vllm(VllmAnswers(report, {}), export.path, export.model, own.arrays)
    assert not finding.passed and finding.detail == "config: ValueError: unknown"


def test_tensors_behind_the_feature_layer_may_be_left_out(export: Export, own: Answers) -> None:
    answers = true_answers(export, own)
    names = [LAST, "model.vision_tower.vision_model.post_layernorm.weight"]
    answers.report["weights"]["left_out"] = names
    assert not failed(check_vllm(answers, export.path, export.model, own.arrays))


def test_a_python_without_vllm_is_told(export: Export) -> None:
    with pytest.raises(ValueError, match="does not start: .*found for vllm"):
        ask_vllm(export.path, Path(sys.executable), {}, {}, [])
