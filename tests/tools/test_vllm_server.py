"""How serve-check starts, asks and ends `vllm serve`.

A stand-in speaks its protocol here; vLLM itself runs only where there is a GPU and a vllm on PATH.
"""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tools.small_backbones import picture
from tools import serve_check, vllm_server
from tools.parity.chat_requests import card_request, with_picture
from tools.processor_files import read_tokenizer
from tools.serve_check import Answers, Export

STAND_IN = """#!{python}
import json, os, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

here = Path(__file__).parent
words = sys.argv[1:]
(here / "words.json").write_text(json.dumps(words))
(here / "pid").write_text(str(os.getpid()))
if (here / "broken").exists():
    print("loading")
    sys.exit("ValueError: the model does not fit")

class Handler(BaseHTTPRequestHandler):
    def say(self, code, value):
        data = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.say(200 if self.path == "/health" else 404, None)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        (here / "body.json").write_bytes(body)
        answer = json.loads((here / "answer.json").read_text())
        self.say(answer.get("code", 200), answer)

HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def server(tmp_path: Path) -> Path:
    path = tmp_path / "vllm"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return path


@pytest.fixture
def export(run_directory: Path) -> Export:
    return Export.open(run_directory / "hf")


def says(server: Path, text: str) -> None:
    answer = {"choices": [{"message": {"content": text}}]}
    (server.parent / "answer.json").write_text(json.dumps(answer))


def own(export: Export, text: str) -> tuple[Answers, int]:
    """Transformers' answer, as if it had written this text, and its tokens."""
    ids = read_tokenizer(export.path).encode(text, add_special_tokens=False).ids
    return Answers("4", {"card": {"ids": np.array([1, 3, *ids])}}), len(ids)


def test_the_cards_request_goes_out_and_the_answers_are_compared(
    server: Path, export: Export
) -> None:
    says(server, " um sete e um dois")
    answers, tokens = own(export, "um sete e um dois")
    (finding,) = serve_check.ask_server(export, answers, server, tokens)
    assert finding.passed, finding.detail
    body = json.loads((server.parent / "body.json").read_text())
    assert body["min_tokens"] == body["max_tokens"] == tokens and body["temperature"] == 0
    image, text = body["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text["text"] == "O que se vê nesta fotografia?"
    words = json.loads((server.parent / "words.json").read_text())
    assert words[:2] == ["serve", body["model"]] and words[words.index("--dtype") + 1] == "float32"
    assert not Path("/proc", (server.parent / "pid").read_text()).exists()

    says(server, "um oito")
    (finding,) = serve_check.ask_server(export, answers, server, tokens)
    assert not finding.passed and "'um oito'" in finding.detail and "dois" in finding.detail


def test_a_server_that_ends_or_refuses_is_a_failure_with_its_reason(
    server: Path, export: Export
) -> None:
    answers, tokens = own(export, "um")
    (server.parent / "answer.json").write_text('{"code": 400, "message": "too long"}')
    (finding,) = serve_check.ask_server(export, answers, server, tokens)
    assert not finding.passed and "too long" in finding.detail
    (server.parent / "broken").touch()
    (finding,) = serve_check.ask_server(export, answers, server, tokens)
    assert not finding.passed
    assert finding.detail == "vllm serve ended with 1: ValueError: the model does not fit"


def test_a_server_that_never_gets_ready_is_given_up_and_ended(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo loading; sleep 600 & wait"]
    with (
        pytest.raises(ValueError, match="not ready after 1 s: loading"),
        vllm_server.serving(command, tmp_path / "log", print, start=1.0),
    ):
        pass


def test_why_no_server_is_tried(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_check, "has_gpu", lambda: False)
    assert "no NVIDIA GPU" in serve_check.why_no_server(export, Path("vllm"))
    monkeypatch.setattr(serve_check, "has_gpu", lambda: True)
    assert "no vllm on PATH" in serve_check.why_no_server(export, None)
    assert serve_check.why_no_server(export, Path("vllm")) == ""
    assert "README.md" in serve_check.why_no_server(replace(export, card=None), Path("vllm"))


def test_the_cards_request_is_read_from_the_card(export: Export, tmp_path: Path) -> None:
    request = card_request(export.path)
    assert request is not None
    asked = with_picture(request, picture(4, 4), "here")
    assert asked["model"] == "here" and request["model"] == "PASTA"
    assert asked["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png")
    assert card_request(tmp_path) is None
    readme = tmp_path / "README.md"
    readme.write_text("# A model\n")
    assert card_request(tmp_path) is None
    for body in ("{", "[]", '{"messages": [{"content": "Que dia é?"}]}'):
        readme.write_text(f"curl http://localhost/v1/chat/completions -d '{body}'\n")
        with pytest.raises(ValueError, match="README.md: the curl command's body is no"):
            card_request(tmp_path)


@pytest.mark.gpu
def test_a_real_server_answers_as_transformers(export: Export) -> None:
    server = shutil.which("vllm")
    if server is None:
        pytest.skip("no vllm on PATH")
    answers = serve_check.ask(export, Path(sys.executable), 8)
    (finding,) = serve_check.ask_server(export, answers, Path(server), 8)
    assert finding.passed, finding.detail
