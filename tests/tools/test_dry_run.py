"""The command: its words, its page, its exit status."""

import os

import pytest

from conf.schema import ParallelConfig
from conf.schema.errors import ConfigError
from tools import dry_run
from tools.command import run
from tools.dryrun.sample import choose, coordinates


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the command sets for itself and its processes goes away again."""
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


WORDS = ["model=tiny", "stages=[stage2]", "parallel=tp2", "precision=bf16", "jobs=0"]


def test_prints_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dry_run.main, WORDS) == 0
    shown = capsys.readouterr().out
    assert "stage2  tiny  2 ranks: tensor 2, pipeline 1, context 1, data 1" in shown
    assert "simulated 2 of 2 ranks" in shown
    assert "stage2: everything fits together" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("  tensor ")]
    ranks, seen, compared = line.split()[1:4]
    assert (ranks, seen, compared) == ("2", "1", "2")


def test_says_what_is_wrong_and_fails(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the checks of the configuration, which would have refused it before."""
    monkeypatch.setattr(dry_run, "check", lambda config, dry: None)
    assert run(dry_run.main, [*WORDS, "model.vision.heads=3"]) == 1
    shown = capsys.readouterr()
    assert "WRONG: rank 0 (tp0 cp0 dp0 pp0)" in shown.out
    assert "stage2: this would not run" in shown.out
    assert (
        shown.err.startswith("error: stage2: 1 wrong, first: rank 0") and "\n" not in shown.err[:-1]
    )


def test_refuses_what_the_configuration_alone_shows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(dry_run.main, [*WORDS, "model.vision.heads=3"]) == 1
    assert "model.vision.heads=3 is not divisible by parallel.tensor=2" in capsys.readouterr().err


@pytest.mark.parametrize("wanted", ["some", "0,x", "0,64"])
def test_ranks_that_do_not_exist(wanted: str) -> None:
    with pytest.raises(ConfigError, match="ranks="):
        choose(ParallelConfig(world_size=4), wanted)


def test_the_sample_has_two_members_of_every_group() -> None:
    """Else a difference between members of the group could not be seen."""
    layout = ParallelConfig(
        world_size=128, tensor=4, pipeline=2, context=2, distributed_optimizer=True
    )
    sample = choose(layout, "sample")
    places = [coordinates(layout, rank) for rank in sample.ranks]
    assert len(sample.ranks) + len(sample.writers) == 128
    assert len(sample.ranks) == 16 + 2 * 2 * 3
    for replica in (0, 4, 7):
        for stage in (0, 1):
            here = {
                (p.tensor, p.context) for p in places if (p.data, p.pipeline) == (replica, stage)
            }
            assert {(0, 0), (3, 0), (0, 1)} <= here
