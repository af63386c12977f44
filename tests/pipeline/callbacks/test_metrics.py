"""A resumed run's metrics hold each step once."""

import json
from pathlib import Path

from pipeline.callbacks.metrics import keep_steps_up_to
from pipeline.callbacks.progress import duration


def test_later_steps_and_cut_lines_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": step / 10}) for step in range(1, 6)]
    path.write_text("\n".join(lines) + '\n{"step": 6, "lo')
    keep_steps_up_to(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_missing_file_is_fine(tmp_path: Path) -> None:
    keep_steps_up_to(tmp_path / "metrics.jsonl", 3)


def test_duration() -> None:
    assert [duration(s) for s in (0.2, 59.7, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
