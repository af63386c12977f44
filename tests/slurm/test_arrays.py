"""Arrays without Slurm: items, markers, waves, elements, and the whole on this machine."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conf.compose import compose
from conf.schema import Config
from conf.schema.errors import ConfigError
from slurm import array_element, arrays
from slurm.array_element import STOPPED, Stop, run_element
from slurm.array_items import Item, TaskFolder, Wave, group, read_wave
from slurm.array_process import Ending, Processes, last_line
from slurm.array_queue import queued
from slurm.array_request import parse
from slurm.array_tasks import TASKS, Asked, items_of
from slurm.array_waves import (
    Share,
    array_job,
    items_per_element,
    moved,
    next_wave_job,
    share,
    tried_too_often,
)
from slurm.commands import QueuedJob

REPOSITORY = Path(__file__).resolve().parents[2]


def item(name: str, *words: str, **fields: object) -> Item:
    return Item(name, words or ("this",), **fields)  # type: ignore[arg-type]


def wave_of(*elements: tuple[Item, ...], number: int = 1, submission: int = 1) -> Wave:
    return Wave("commands", number, submission, ("task=commands",), 1, 1.0, elements)


@pytest.fixture
def folder(tmp_path: Path) -> TaskFolder:
    return TaskFolder.of(tmp_path / "run", "commands")


# --- arithmetic -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elements", "room", "largest", "expected"),
    [
        (300, None, None, Share(300, False)),
        (300, 300, 1001, Share(300, False)),
        (300, 100, 1001, Share(99, True)),  # the next wave's job counts too
        (100, 100, 1001, Share(100, False)),
        (101, 100, 1001, Share(99, True)),
        (300, None, 250, Share(250, True)),
        (300, 251, 250, Share(250, True)),
        (300, 250, 250, Share(249, True)),
        (2000, None, None, Share(1000, True)),
        (2, 1, None, Share(1, False)),  # nobody can submit the rest
        (1, 1, None, Share(1, False)),
        (5, 0, None, Share(0, False)),
        (5, -3, None, Share(0, False)),
    ],
)
def test_share(elements: int, room: int | None, largest: int | None, expected: Share) -> None:
    assert share(elements, room, largest) == expected


def test_waves_of_300_under_a_limit_of_100() -> None:
    """While a next wave is submitted, its own job still counts."""
    left, waves = 300, []
    while left:
        part = share(left, 100 - (1 if waves else 0), 1001)
        assert part.now + part.chained + (1 if waves else 0) <= 100
        waves.append(part.now)
        left -= part.now
        assert part.chained == bool(left)
    assert waves == [99, 98, 98, 5]


@pytest.mark.parametrize(
    ("items", "elements", "room", "largest", "expected"),
    [
        (10, None, None, None, 1),
        (32, None, None, None, 1),
        (33, None, None, None, 2),  # 8 at once, 4 rounds
        (1000, None, None, None, 32),
        (1000, None, 10, None, 100),
        (1000, None, None, 20, 50),
        (1000, None, 0, None, 1000),
        (300, 300, 100, 1001, 1),  # what is asked for is given, in waves
        (300, 100, None, None, 3),
        (3, 100, None, None, 1),
    ],
)
def test_items_per_element(
    items: int, elements: int | None, room: int | None, largest: int | None, expected: int
) -> None:
    assert items_per_element(items, elements, 8, room, largest) == expected


def test_group_keeps_order_and_loses_nothing() -> None:
    items = [item(f"i{number}") for number in range(7)]
    elements = group(items, 3)
    assert [len(element) for element in elements] == [3, 3, 1]
    assert [one for element in elements for one in element] == items


# --- markers ----------------------------------------------------------------------------------


def test_marker_holds_only_for_the_same_work(folder: TaskFolder, tmp_path: Path) -> None:
    made = tmp_path / "made"
    one = item("a", "module", "x=1", stamp="s1", result=str(made))
    wave = wave_of((one,))
    assert folder.missing([one]) == [one]
    folder.begin(one, wave)
    assert folder.tries(one, 1) == 1 and folder.tries(one, 2) == 0
    assert folder.end(one, wave, 0, {"seconds": 1.0})
    assert folder.missing([one]) == [one]  # its result is not there
    made.touch()
    assert folder.missing([one]) == []
    assert folder.tries(one, 1) == 0
    for other in (
        item("a", "module", "x=2", stamp="s1"),
        item("a", "module", "x=1", stamp="s2"),
        item("b", "module", "x=1", stamp="s1"),
    ):
        assert folder.missing([other]) == [other]
    (folder.root / "done" / "a.json").write_text('{"format": 1, "it')
    assert folder.missing([one]) == [one]


def test_failure_is_kept_until_success(folder: TaskFolder) -> None:
    one = item("a", accepted=(0, 1))
    wave = wave_of((one,))
    folder.begin(one, wave)
    assert not folder.end(one, wave, 2, {"said": "no"})
    assert folder.record("failed", "a")["said"] == "no"
    assert folder.end(one, wave, 1, {})  # a result for this item
    assert folder.record("failed", "a") == {} and folder.record("begun", "a") == {}


def test_tries_are_counted_once_a_wave_and_per_submission(folder: TaskFolder) -> None:
    one, two = item("a"), item("b")
    first, second = (
        wave_of((one, two), number=4, submission=4),
        wave_of((one,), number=5, submission=4),
    )
    folder.begin(one, first)
    folder.begin(one, first)  # requeued
    folder.begin(two, first)
    assert tried_too_often(folder, [one, two], 4) == []
    folder.begin(one, second)
    assert tried_too_often(folder, [one, two], 4) == ["a"]
    assert tried_too_often(folder, [one, two], 6) == []  # the command was given again


def test_wave_moved(folder: TaskFolder) -> None:
    one, two = item("a"), item("b")
    wave = wave_of((one,), (two,), number=2, submission=1)
    assert not moved(folder, wave)
    folder.begin(two, wave_of((two,), number=1, submission=1))
    assert not moved(folder, wave)  # that was the wave before
    folder.begin(two, wave)
    assert moved(folder, wave)


def test_wave_survives_its_file(folder: TaskFolder) -> None:
    one = item("a", "m", "k=v", stamp="s", accepted=(0, 1), result="r", shell="srun x")
    wave = wave_of((one, item("b")), (item("c"),))
    directory = folder.wave(1)
    directory.mkdir(parents=True)
    wave.write(directory)
    assert read_wave(directory) == wave
    assert folder.waves() == [1] and folder.next_number() == 2
    for damage in ("{", "[]", '{"format": 9}', '{"format": 1}'):
        (directory / "items.json").write_text(damage)
        with pytest.raises(ConfigError, match="items.json is damaged"):
            read_wave(directory)


@pytest.mark.parametrize("name", ["", "../a", "a/b", ".a", "a b", "a" * 200])
def test_names_that_are_no_file_names(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name an item"):
        item(name)


# --- elements ---------------------------------------------------------------------------------


def test_element_goes_on_after_a_failure(folder: TaskFolder) -> None:
    items = tuple(item(name) for name in "abc")
    wave = wave_of(items)
    folder.end(items[0], wave, 0, {})
    started = []

    def start(one: Item) -> Ending:
        started.append(one.name)
        return Ending(3 if one.name == "b" else 0, f"said {one.name}")

    assert run_element(folder, wave, 0, Stop(), start) == 1
    assert started == ["b", "c"]
    failed, done = folder.record("failed", "b"), folder.record("done", "c")
    assert (failed["code"], failed["said"]) == (3, "said b")
    assert done["ended"] >= done["began"] > 0 and done["said"] == "said c"
    assert run_element(folder, wave, 0, Stop(), lambda one: Ending(0, "")) == 0
    with pytest.raises(ConfigError, match="no element 1"):
        run_element(folder, wave, 1, Stop(), start)


def test_element_stops_between_items(folder: TaskFolder) -> None:
    items = tuple(item(name) for name in "abc")
    stop = Stop()

    def start(one: Item) -> Ending:
        stop.ask("stopped by SIGUSR2")
        return Ending(0, "")

    assert run_element(folder, wave_of(items), 0, stop, start) == STOPPED
    assert folder.missing(items) == list(items[1:])


def test_item_that_is_killed_with_its_element_has_not_failed(folder: TaskFolder) -> None:
    items = tuple(item(name) for name in "ab")
    stop = Stop()

    def start(one: Item) -> Ending:
        stop.ask("stopped by SIGTERM")
        return Ending(128 + signal.SIGTERM, "")

    assert run_element(folder, wave_of(items), 0, stop, start) == STOPPED
    assert folder.count("failed") == folder.count("done") == 0
    # Killed by somebody else, it has.
    quiet = run_element(folder, wave_of(items), 0, Stop(), lambda one: Ending(143, "killed"))
    assert quiet == 1 and folder.count("failed") == 2


def test_element_begins_nothing_that_would_not_fit(folder: TaskFolder) -> None:
    items = tuple(item(name) for name in "abc")
    stop = Stop(ends=time.monotonic() + 40)

    def start(one: Item) -> Ending:
        stop.longest = 20.0
        return Ending(0, "")

    assert run_element(folder, wave_of(items), 0, stop, start) == STOPPED
    assert len(folder.missing(items)) == 2


def test_stop_file_ends_an_element(folder: TaskFolder, capsys: pytest.CaptureFixture[str]) -> None:
    items = tuple(item(name) for name in "ab")
    folder.root.mkdir(parents=True)
    (folder.root.parent.parent / "STOP").touch()
    assert run_element(folder, wave_of(items), 0, Stop(), lambda one: Ending(0, "")) == STOPPED
    assert "STOP is there" in capsys.readouterr().out


def test_process_output_is_passed_on_and_its_end_told(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    ending = Processes().run(item("a", shell="echo one; echo two >&2; exit 5"))
    assert ending == Ending(5, "two")
    assert capfdbinary.readouterr().out == b"one\ntwo\n"
    noise = "echo 0: error: no room; echo 0: bye; echo srun: error: acc1: task 0: Exited; exit 1"
    assert Processes().run(item("a", shell=noise)) == Ending(1, "error: no room")
    assert Processes().run(item("a", "timeit", "-n1", "-r1", "1/0")).said.startswith("ZeroDiv")
    assert Processes().run(item("a", shell="kill -9 $$")).code == 137
    assert Processes().run(item("a", shell="exit 0")) == Ending(0, "it said nothing")


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("a\nb\n\n  \n", "b"),
        ("10 %\r50 %\r100 %", "100 %"),
        ("\x1b[31mred\x1b[0m\n", "red"),
        ("", "it said nothing"),
        ("x" * 1000, "x" * 500),
    ],
)
def test_last_line(output: str, expected: str) -> None:
    assert last_line(output) == expected


def test_signal_lets_the_item_end(folder: TaskFolder) -> None:
    """The real command, with SIGUSR2 while its first item runs; again, it does the second."""
    sleep = "import time; print('begun', flush=True); time.sleep(1)"
    items = tuple(item(name, "timeit", "-n1", "-r1", sleep) for name in "ab")
    folder.wave(1).mkdir(parents=True)
    wave_of(items).write(folder.wave(1))
    command = [sys.executable, "-m", "slurm.array_element", str(folder.wave(1))]
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    while b"begun" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGUSR2)
    process.stdout.read()
    assert process.wait(timeout=30) == STOPPED
    assert folder.missing(items) == [items[1]]
    assert subprocess.run(command, cwd=REPOSITORY, env=environment, timeout=30).returncode == 0
    assert folder.missing(items) == []


def test_element_command_refuses_nonsense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert array_element.main([str(tmp_path), "x"]) == 2
    before = {number: signal.getsignal(number) for number in array_element.STOP_SIGNALS}
    try:
        assert array_element.main([str(tmp_path), "0"]) == 1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert "items.json does not exist" in capsys.readouterr().err


# --- the tasks --------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = compose([f"runs_dir={tmp_path / 'runs'}", "run=r", f"data.root={tmp_path / 'data'}"])
    config.cluster.executor = "slurm"
    return config


def test_items_of_shards(config: Config, tmp_path: Path) -> None:
    asked = Asked(("run=r", "data=demo"), {"only": "[captions,vqa]"})
    items = items_of("shards", config, asked, tmp_path / "runs" / "r")
    assert [one.name for one in items] == ["captions", "vqa"]
    assert items[0].words == ("data_shards.build", "run=r", "data=demo", "only=[captions]")
    source = tmp_path / "runs" / "r" / "raw" / "captions" / "0.parquet"
    source.parent.mkdir(parents=True)
    source.touch()
    config.data.sources["captions"].input = str(source.parent / "*.parquet")
    again = items_of("shards", config, asked, tmp_path / "runs" / "r")
    assert again[0].stamp != items[0].stamp and again[1].stamp == items[1].stamp
    with pytest.raises(ConfigError, match="only= names nothing"):
        items_of("shards", config, Asked((), {"only": "nothing"}), tmp_path)


def test_items_of_validate(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "captions" / "shards"
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"captions-{number:06d}.tar").write_bytes(b"x" * number)
    asked = Asked(("run=r",), {"shards_per_item": "2"})
    run = tmp_path / "runs" / "r"
    items = items_of("validate", config, asked, run)
    names = ["captions.000000-000001", "captions.000002-000003", "captions.000004-end"]
    assert [one.name for one in items] == names
    assert [one.words[3] for one in items] == ["shards=0..1", "shards=2..3", "shards=4.."]
    assert items[0].accepted == (0, 1)
    (folder / "captions-000003.tar").unlink()
    changed = items_of("validate", config, asked, run)
    assert [one.name for one in changed] == names
    assert [a.stamp == b.stamp for a, b in zip(items, changed, strict=True)] == [True, False, True]
    with pytest.raises(ConfigError, match="build the shards first"):
        items_of("validate", config, Asked((), {"only": "vqa"}), run)
    with pytest.raises(ConfigError, match="not a positive whole number"):
        items_of("validate", config, Asked((), {"shards_per_item": "0"}), run)


def test_items_of_reference(tmp_path: Path) -> None:
    config = compose([f"runs_dir={tmp_path}", "run=r", "stage=stage3"])
    run = tmp_path / "r"
    with pytest.raises(ConfigError, match="end the stage before stage3 first"):
        items_of("reference", config, Asked(), run)
    (run / "stage2").mkdir(parents=True)
    (run / "stage2" / "DONE.json").write_text("{}")
    items = items_of("reference", config, Asked((), {"parts": "3"}), run)
    assert [one.words[-2:] for one in items] == [("--part", str(part)) for part in range(3)]
    path = Path(items[0].words[2])
    assert path.is_file() and path.parent == run / "arrays" / "reference"
    config.cluster.hours = 3.0
    assert items_of("reference", config, Asked((), {"parts": "3"}), run) == items
    config.stage.preference.beta = 0.5
    other = items_of("reference", config, Asked((), {"parts": "3"}), run)
    assert other[0].words[2] != items[0].words[2]
    with pytest.raises(ConfigError, match="a reference pass is for dpo"):
        items_of("reference", compose(["stage=stage1"]), Asked(), run)


def test_items_of_evaluate(config: Config, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "r"
    sets = run / "raw" / "evaluation"
    sets.mkdir(parents=True)
    for name in ("dev", "dev_pairs", "held_out"):
        (sets / f"{name}.parquet").touch()
    with pytest.raises(ConfigError, match="has no export"):
        items_of("evaluate", config, Asked(), run)
    for folder in (run / "hf", run / "stage1" / "hf", tmp_path / "base"):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    items = items_of("evaluate", config, Asked(), run)
    names = ["stage1.dev", "stage1.held_out", "stage3.dev", "stage3.held_out"]
    assert [one.name for one in items] == names
    assert items[0].words[-2:] == ("stage=stage1", "split=dev")
    assert items[1].words[-1].startswith("out=")  # it has no pairs
    (run / "hf" / "model.safetensors").write_bytes(b"new weights")
    changed = items_of("evaluate", config, Asked(), run)
    assert [a.stamp == b.stamp for a, b in zip(items, changed, strict=True)] == [
        True,
        True,
        False,
        False,
    ]
    named = Asked((), {"exports": f"[{tmp_path / 'base'}]", "questions": str(sets / "dev.parquet")})
    [one] = items_of("evaluate", config, named, run)
    assert f"pairs={sets / 'dev_pairs.parquet'}" in one.words
    with pytest.raises(ConfigError, match="gone does not exist"):
        items_of("evaluate", config, Asked((), {"exports": str(tmp_path / "gone")}), run)


def test_items_of_commands(config: Config, tmp_path: Path) -> None:
    file = tmp_path / "file"
    asked = Asked((), {"file": str(file)})
    file.write_text("# names and words\na this\n\nb json.tool 'a b'  # why\n")
    items = items_of("commands", config, asked, tmp_path)
    assert [(one.name, one.words) for one in items] == [
        ("a", ("this",)),
        ("b", ("json.tool", "a b")),
    ]
    for text, cause in (
        ("a this\na that\n", "two items of commands are named a"),
        ("a\n", "a has no command"),
        ("", "it is empty"),
        ("a 'this\n", "cannot be read as lines of words"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=cause):
            items_of("commands", config, asked, tmp_path)
    with pytest.raises(ConfigError, match="needs file="):
        items_of("commands", config, Asked(), tmp_path)


# --- the command line -------------------------------------------------------------------------


def test_parse() -> None:
    request = parse(
        ["task=validate", "run=r", "cluster=mn5", "cluster.hours=3", "+cluster.site.sbatch.x=y"]
        + ["elements=5", "throttle=2", "hours=0.5", "dry=1", "only=[a,b]", "data.max_pixels=9"]
    )
    assert request.asked.overrides == ("run=r", "data.max_pixels=9")
    assert len(request.overrides) == 5
    assert (request.elements, request.throttle, request.hours) == (5, 2, 0.5)
    assert request.dry and not request.yes and request.asked.names("only") == ["a", "b"]
    assert "stage=stage3" in parse(["task=reference"]).overrides
    for words, cause in (
        (["run=r"], "the tasks are"),
        (["task=all"], "the tasks are"),
        (["task=shards", "throttle=0"], "positive whole number"),
        (["task=shards", "elements=1.5"], "positive whole number"),
        (["task=shards", "hours=-1"], "positive number"),
        (["task=shards", "parts=3"], "parts= is for task=reference"),
        (["task=shards", "dry=perhaps"], "neither true nor false"),
    ):
        with pytest.raises(ConfigError, match=cause):
            parse(words)


# --- jobs and the queue -----------------------------------------------------------------------


def test_jobs_of_a_wave(config: Config, folder: TaskFolder) -> None:
    cluster = config.cluster
    cluster.gpus_per_node, cluster.cpus_per_node, cluster.hours = 4, 80, 12.0
    wave = wave_of((item("a"),), (item("b"),))
    job = array_job(config, TASKS["validate"], wave, folder, 8)
    assert (job.nodes, job.gpus_per_node, job.elements, job.throttle) == (1, 0, 2, 8)
    assert not job.exclusive
    last = next_wave_job(config, wave, job)
    assert last.after_any == (job.name,) and last.kind == "next_wave"
    assert last.directory.name == "001-next" and last.hours <= 0.25
    assert array_job(config, TASKS["evaluate"], wave, folder, 8).gpus_per_node == 1
    cluster.site.single_gpus = 1
    job = array_job(config, TASKS["validate"], wave, folder, 8)
    assert (job.gpus_per_node, job.cpus_per_rank) == (1, 20)
    config.parallel.world_size = 8
    job = array_job(config, TASKS["reference"], wave, folder, 8)
    assert (job.nodes, job.ranks_per_node, job.gpus_per_node) == (2, 4, 4)
    assert "export MASTER_ADDR" in job.body and "export MASTER_PORT" in job.body


def row(name: str, index: int | None, job_id: str = "7", reason: str = "None") -> QueuedJob:
    return QueuedJob(
        job_id=job_id, array_index=index, name=name, state="PENDING", reason=reason, comment="",
        user="u", partition="p", submitted=None, start=None, used=0.0, left=None, nodes=1,
        node_list="", dependency="",
    )  # fmt: skip


def test_what_is_queued_is_known_by_item(config: Config, folder: TaskFolder) -> None:
    folder.wave(3).mkdir(parents=True)
    wave_of((item("a"), item("b")), (item("c"),), number=3).write(folder.wave(3))
    rows = [row("r.commands.003", 1), row("r.stage1.001", None), row("r.validate.003", 0)]
    found = queued(folder, config, rows, own_id="")
    assert set(found.items) == {"c"} and not found.next_job and not found.held
    rows += [row("r.commands.003", 0), row("r.commands.003.next", None, job_id="8")]
    found = queued(folder, config, rows, own_id="")
    assert set(found.items) == {"a", "b", "c"} and found.next_job == "8"
    assert found.arrays == ("7",) and found.newest == 3
    assert queued(folder, config, rows, own_id="8").next_job == ""
    held = [row("r.commands.003", 0, reason="JobHeldUser")]
    assert queued(folder, config, held, own_id="").held == ("7",)


# --- the whole, on this machine ---------------------------------------------------------------


class Here:
    """A run on cluster=local whose items are lines of a file."""

    def __init__(self, root: Path, lines: list[str]) -> None:
        self.root, self.file = root, root / "items"
        self.folder = TaskFolder.of(root / "runs" / "r", "commands")
        self.file.write_text("\n".join(lines))

    def __call__(self, *words: str) -> int:
        base = ["task=commands", f"file={self.file}", f"runs_dir={self.root / 'runs'}", "run=r"]
        return arrays.main([*base, *words])


def touch(path: Path) -> str:
    return f"timeit -n1 -r1 \"open('{path}', 'a').write('x')\""


def test_local_array_goes_on_where_it_failed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    marks = [tmp_path / f"mark{number}" for number in range(3)]
    needed = tmp_path / "needed"
    lines = [f"i{number} {touch(mark)}" for number, mark in enumerate(marks)]
    lines.insert(1, f"needs timeit -n1 -r1 \"open('{needed}')\"")
    here = Here(tmp_path, lines)
    assert here("dry=1") == 0 and not any(mark.exists() for mark in marks)
    assert here() == 1
    out, err = capfd.readouterr()
    assert "1 items failed: needs" in err and "No such file" in out
    assert here.folder.record("failed", "needs")["said"].startswith("FileNotFoundError")
    needed.touch()
    assert here("throttle=2") == 0
    assert "4 items, 3 done, 1 to do" in capfd.readouterr().out
    assert [mark.read_text() for mark in marks] == ["x", "x", "x"]
    assert here() == 0
    assert [mark.read_text() for mark in marks] == ["x", "x", "x"]
    assert "i0" in (here.folder.wave(1) / "log_0.out").read_text()


def test_local_array_runs_some_at_a_time(tmp_path: Path) -> None:
    sleep = 'timeit -n1 -r1 "import time; time.sleep(0.4)"'
    here = Here(tmp_path, [f"i{number} {sleep}" for number in range(6)])
    assert here("throttle=3") == 0
    assert len(list(here.folder.wave(1).glob("log_*.out"))) == 3
    marks = [record for _, record in here.folder.records("done")]
    assert _most_at_once(marks) == 3


def _most_at_once(marks: list[dict[str, float]]) -> int:
    events = sorted([(m["began"], 1) for m in marks] + [(m["ended"], -1) for m in marks])
    now = most = 0
    for _, change in events:
        now += change
        most = max(most, now)
    return most


def test_interrupted_local_array_ends_its_item_first(tmp_path: Path) -> None:
    lines = [f'i{n} timeit -n1 -r1 "import time; print(0); time.sleep(1)"' for n in range(3)]
    here = Here(tmp_path, lines)
    words = ["task=commands", f"file={here.file}", f"runs_dir={tmp_path / 'runs'}", "run=r"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slurm.arrays", *words],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    end = time.monotonic() + 60
    while not here.folder.record("begun", "i0") and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == STOPPED
    assert b"stopped by SIGINT; the same command goes on" in errors
    assert here.folder.count("done") == 1 and here.folder.count("failed") == 0


def test_bad_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = Here(tmp_path, ["a this"])
    assert here("run=a b") == 1
    assert here("nonsense=1") == 1
    assert here("cluster=nowhere") == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)
    assert arrays.main(["continue", str(tmp_path)]) == 1
    here.folder.root.mkdir(parents=True, exist_ok=True)
    for folder in (here.folder.root, tmp_path / "runs" / "r"):
        (folder / "STOP").touch()
        assert here() == 1
        assert f"{folder}/STOP is there" in capsys.readouterr().err
        (folder / "STOP").unlink()


def test_dry_run_writes_scripts_and_needs_no_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    here = Here(tmp_path, [f"i{number} this" for number in range(9)])
    limits = "+cluster.site.queues={bulk: {hours: 24, submitted: 5}}"
    words = ["cluster=slurm", "cluster.detect=false", "cluster.qos=bulk", limits, "dry=1"]
    assert here(*words, "elements=9", "throttle=2") == 0
    script = (here.folder.wave(1) / "submit.sh").read_text()
    assert "#SBATCH --array=0-3%2" in script and "slurm.array_element" in script
    assert (here.folder.root / "001-next" / "submit.sh").is_file()
    wave = read_wave(here.folder.wave(1))
    assert (len(wave.elements), wave.waiting, wave.per_element) == (4, 5, 1)
    assert "5 more elements" in capsys.readouterr().out
    assert here(*words) == 0  # within the limit by itself, under the same number
    wave = read_wave(here.folder.wave(1))
    assert (len(wave.elements), wave.waiting, wave.per_element) == (5, 0, 2)
    assert json.loads((tmp_path / "runs" / "r" / "plan.json").read_text())["code"]
