"""A stage refuses a wrong predecessor and names the field."""

import dataclasses
from pathlib import Path

import pytest

from conf.schema import ModelConfig, TextConfig, VisionConfig
from pipeline.handoff import Done, HandoffError, check_predecessor, read_done, write_done

MODEL = ModelConfig(
    name="tiny",
    vision=VisionConfig(
        hidden_size=8, intermediate_size=16, layers=2, heads=2, image_size=8, patch_size=4
    ),
    text=TextConfig(
        hidden_size=8,
        intermediate_size=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=4,
        vocab_size=64,
        max_positions=64,
    ),
    image_token_id=9,
)
DONE = Done(
    stage="stage1",
    number=1,
    checkpoint="checkpoints/step_00000002",
    checkpoint_digest="c",
    step=2,
    model=dataclasses.asdict(MODEL),
    tokenizer_digest="t",
    geometry_digest="g",
)


def test_round_trip(tmp_path: Path) -> None:
    write_done(tmp_path, DONE)
    assert read_done(tmp_path) == DONE
    check_predecessor(DONE, tmp_path, 2, MODEL, "t", "g")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match="has not finished; run it first"):
        read_done(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1, "stage": "x"}', '{"format": 9}'])
def test_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "DONE.json").write_text(text)
    with pytest.raises((HandoffError, ValueError), match=r"DONE\.json"):
        read_done(tmp_path)


def test_checkpoint_outside_the_stage(tmp_path: Path) -> None:
    write_done(tmp_path, dataclasses.replace(DONE, checkpoint="../../elsewhere"))
    with pytest.raises(HandoffError, match="outside its folder"):
        read_done(tmp_path)


def test_wrong_stage(tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match="stage 3 begins from number 2"):
        check_predecessor(DONE, tmp_path, 3, MODEL, "t", "g")


def test_wrong_shape_is_named(tmp_path: Path) -> None:
    wider = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, hidden_size=16))
    with pytest.raises(HandoffError, match=r"model\.text\.hidden_size is 8 there and 16 here"):
        check_predecessor(DONE, tmp_path, 2, wider, "t", "g")


def test_wrong_tokenizer_and_geometry(tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match=r"geometry differs.*tokenizer differs"):
        check_predecessor(DONE, tmp_path, 2, MODEL, "other", "other")
