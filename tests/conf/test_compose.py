"""Composition: choices and overrides become typed values, everything else is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conf.compose import DIRECTORY, compose, dump, from_mapping, load, options, to_mapping
from conf.schema.data import PhaseConfig
from conf.schema.errors import ConfigError


def test_defaults_are_the_laptops_demo() -> None:
    config = compose()
    assert (config.model.name, config.cluster.name) == ("tiny", "local")
    assert config.parallel.world_size == 1
    assert config.stage.name == "stage1"


def test_overrides_win_over_the_demo_sizes_which_win_over_the_recipe() -> None:
    recipe = compose(["stage=stage2", "data=amalia"]).stage
    demo = compose(["stage=stage2", "data=demo"]).stage
    ours = compose(["stage=stage2", "data=demo", "stage.steps=7"]).stage
    assert recipe.steps == 49000 and recipe.sequence_length == 16384
    assert demo.steps != 49000 and demo.sequence_length < 16384
    assert ours.steps == 7 and ours.sequence_length == demo.sequence_length
    assert compose(["stage=stage2", "data=demo", "~demo"]).stage == recipe


def test_recipe_carries_what_is_published() -> None:
    first, second, third = (compose([f"stage=stage{n}", "data=amalia"]).stage for n in (1, 2, 3))
    assert (first.steps, first.global_batch_size) == (2000, 128)
    assert first.lr.vision == first.lr.language == 0 < first.lr.connector
    assert min(second.lr.vision, second.lr.connector, second.lr.language) > 0
    assert third.objective == "dpo" and (third.steps, third.epochs) == (None, 1.0)


def test_every_scalar_of_every_group_can_be_overridden() -> None:
    config = compose(
        [
            "model.vision.feature_layer=-1",
            "model.pinpoints=[[32,64],[64,32]]",
            "parallel.pipeline_layers=[1,3]",
            "parallel.pipeline=2",
            "precision.params=bf16",
            "stage.lr.vision=1e-6",
            "data.images.max_pixels=9",
            "cluster.threads_per_rank=3",
            "+data.mix.stage1.questions=0.25",
            "init_from=somewhere",
        ]
    )
    assert config.model.vision.feature_layer == -1
    assert config.model.pinpoints == [[32, 64], [64, 32]]
    assert config.parallel.pipeline_layers == [1, 3]
    assert config.stage.lr.vision == 1e-6
    assert config.data.mix["stage1"] == {"captions": 1.0, "questions": 0.25}
    assert (config.cluster.threads_per_rank, config.init_from) == (3, "somewhere")


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("stage.lr.vison=1", "stage.lr.vision"),
        ("modl=tiny", "model"),
        ("tensor=2", "parallel.tensor"),
        ("+model.foo=1", "model.foo"),
        ("stage.lr={visio: 1.0}", "stage.lr.vision"),
        ("model=tny", "tiny"),
        ("data=nowhere", "demo"),
        ("model=null", "tiny"),
        ("stage.steps=many", "stage.steps"),
        ("stage.steps.a=2", "stage.steps"),
        ("model.vision.hidden_size=96.5", "model.vision.hidden_size"),
        ("data.mix.stage1.new=1", "+data.mix.stage1.new"),
        ("data.sources.captions.colums={}", "data.sources.captions.colums"),
        ("run=???", "run"),
        ("run=${nothing}", "nothing"),
        ("stage.seed=choice(1,2)", "stage.seed"),
        ("data.mix.stage1.captions=many", "data.mix.stage1.captions"),
        ("data.curriculum.stage1.warm.until=1", "+data.curriculum.stage1"),
        ("+data.curriculum.stage1.warm.untl=1", "data.curriculum.stage1.warm has untl"),
        ("+data.curriculum.stage1.warm.until=soon", "data.curriculum.stage1.warm.until='soon'"),
        ("+data.curriculum.stage1.warm=0.3", "data.curriculum.stage1.warm=0.3 is no phase"),
        ("+data.curriculum.stage1.warm={weights: {a: 1}}", "warm has weights; a phase has until"),
        (
            "+data.curriculum.stage1.warm={until: 1, weights: {captions: true}}",
            "data.curriculum.stage1.warm.weights.captions=True is not a number",
        ),
        ("no equals sign", "KEY=VALUE"),
        ("stage.name", "KEY=VALUE"),
        ("model@elsewhere=tiny", "model@elsewhere"),
    ],
)
def test_what_is_not_a_setting_is_refused_in_one_line(override: str, named: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([override])
    assert named in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        [
            "+data.curriculum.stage2={warm: {until: 0.3, weights: {captions: 1}}, "
            "rest: {until: 1, weights: {vqa: 3, text: 1.0}}}"
        ],
        [
            "+data.curriculum.stage2.rest.until=1",
            "+data.curriculum.stage2.rest.weights={vqa: 3, text: 1}",
            "+data.curriculum.stage2.warm.weights.captions=1",
            "+data.curriculum.stage2.warm.until=0.3",
        ],
    ],
)
def test_a_curriculum_may_be_given_on_the_command_line(words: list[str], tmp_path: Path) -> None:
    data = compose(["stage=stage2", *words]).data
    data.check()
    warm, rest = data.phases("stage2")
    assert warm == PhaseConfig(0.3, {"captions": 1.0})
    assert rest == PhaseConfig(1.0, {"vqa": 3.0, "text": 1.0})
    assert data.drawn("stage2") == ["captions", "text", "vqa"]
    assert data.shares("stage2") == pytest.approx({"captions": 0.3, "vqa": 0.525, "text": 0.175})
    assert data.phases("stage1") == [PhaseConfig(1.0, data.mix["stage1"])]
    path = tmp_path / "config.yaml"
    path.write_text(dump(compose(["stage=stage2", *words])))
    assert load(path).data == data


REAL = ["model=amalia_vl_9b", "data=amalia", "stage=stage2"]


def test_the_cluster_chooses_layout_and_precision() -> None:
    config = compose(["cluster=mn5", *REAL])
    assert (config.parallel.world_size, config.parallel.tensor) == (64, 4)
    assert config.precision.params == "bf16"
    assert compose(["cluster=mn5", *REAL[:2], "stage=stage1"]).parallel.world_size == 8
    assert compose(["cluster=slurm"]).parallel.world_size == 2


def test_what_is_given_wins_over_the_clusters_choice() -> None:
    given = compose(["parallel=h100_128", "precision=fp8", "cluster=mn5", *REAL])
    assert (given.parallel.world_size, given.precision.fp8_recipe) == (128, "tensorwise")
    smaller = compose(["cluster=mn5", *REAL, "parallel.world_size=32", "precision.params=fp32"])
    assert (smaller.parallel.world_size, smaller.parallel.tensor) == (32, 4)
    assert smaller.precision.params == "fp32"
    several = compose(["cluster=mn5", *REAL, "parallel={world_size: 16, recompute: full}"])
    assert (several.parallel.world_size, several.parallel.recompute) == (16, "full")


def test_without_a_layout_the_defaults_hold() -> None:
    config = compose(["cluster=local", *REAL])
    assert (config.parallel.world_size, config.precision.params) == (1, "fp32")


def test_a_layout_that_comes_too_late_is_refused() -> None:
    for key, group in (("layouts.tiny.stage1=dp2", "parallel"), ("precisions.tiny=bf16", "prec")):
        with pytest.raises(ConfigError, match=f"too late to choose {group}"):
            compose(["cluster=slurm", f"cluster.{key}"])


@pytest.fixture
def own_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "conf"
    shutil.copytree(DIRECTORY, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.setattr("conf.compose.DIRECTORY", copy)
    return copy / "cluster"


def test_a_cluster_of_ones_own_builds_on_another(own_clusters: Path) -> None:
    (own_clusters / "mine.yaml").write_text(
        "defaults: [mn5, _self_]\nname: mine\nhours: 6\n"
        "layouts: {tiny: {stage2: tp2}, amalia_vl_9b: {stage2: h100_128}}\n"
    )
    config = compose(["cluster=mine", *REAL])
    assert (config.cluster.name, config.cluster.hours) == ("mine", 6)
    assert (config.parallel.world_size, config.precision.params) == (128, "bf16")
    assert compose(["cluster=mine", "stage=stage2"]).parallel.tensor == 2
    assert compose(["cluster=mine", "stage=stage3"]).parallel.world_size == 2  # mn5's


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("layouts: {tiny: {stage1: dp3}}", "names parallel 'dp3' for tiny"),
        ("precisions: {tiny: fp4}", "names precision 'fp4' for tiny"),
        ("layouts: [tiny]", "layouts holds"),
        ("layouts: {tiny: dp2}", "layouts holds"),
        ("layouts: {tiny: {stage1: [dp2]}}", "names parallel"),
    ],
)
def test_a_layout_that_does_not_exist_is_named(own_clusters: Path, line: str, message: str) -> None:
    (own_clusters / "mine.yaml").write_text(f"name: mine\nexecutor: slurm\n{line}\n")
    with pytest.raises(ConfigError, match=message) as error:
        compose(["cluster=mine"])
    assert "mine.yaml" in str(error.value) and "\n" not in str(error.value)


def test_every_yaml_file_composes() -> None:
    for group in ("model", "parallel", "precision", "cluster"):
        for option in options(group):
            compose([f"{group}={option}"])
    for stage in options("stage"):
        for data in options("data"):
            compose([f"stage={stage}", f"data={data}"])


def test_a_wrong_key_in_a_yaml_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "conf"
    shutil.copytree(DIRECTORY, copy, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    tiny = copy / "model" / "tiny.yaml"
    tiny.write_text(tiny.read_text() + "max_tils: 3\n")
    monkeypatch.setattr("conf.compose.DIRECTORY", copy)
    with pytest.raises(ConfigError, match=r"max_tils .* did you mean model.max_tiles"):
        compose()


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    for overrides in ([], ["stage=stage3", "model=amalia_vl_9b", "data=amalia", "parallel=pp2"]):
        config = compose(overrides)
        path = tmp_path / "config.yaml"
        path.write_text(dump(config), encoding="utf-8")
        assert load(path) == config
        assert from_mapping(to_mapping(config), "test") == config


@pytest.mark.parametrize(
    "text",
    ["", "- 1\n", "model: [", "nonsense: 1\n", "!!python/object:os.system {}\n", "run: demo\n"],
)
def test_load_refuses_other_files_by_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        load(path)


def test_load_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load(tmp_path / "none.yaml")


def test_submit_side_imports_no_torch() -> None:
    code = (
        "import sys, conf.compose, conf.check, slurm.submit\n"
        "conf.check.check(conf.compose.compose())\n"
        "print([m for m in ('torch', 'megatron', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
