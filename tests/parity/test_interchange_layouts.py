"""HF -> Megatron -> (saved by the ranks of a layout) -> HF, bit for bit."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from conf.compose import compose
from conf.schema import ModelConfig, ParallelConfig, PrecisionConfig
from models.hf_state import table
from pipeline.files import digest_and_fsync, write_json
from pipeline.handoff import read_done, write_done
from pipeline.manifest import MANIFEST
from tests.distributed import megatron, run_ranks
from tests.tools.small_backbones import OVERRIDES, write_tokenizer
from tests.tools.weights import read_weights
from tools import hf_export, hf_import
from tools.command import run
from tools.hf_config import llava_config
from tools.processor_files import special_ids

SMALL = [*OVERRIDES, "model.text.kv_heads=4"]
# One decoder layer and two vision layers of AMALIA-VL's own widths, with few words.
REAL = [
    "model=amalia_vl_9b",
    "model.vision.layers=2",
    "model.text.layers=1",
    "model.text.vocab_size=320",
    "model.text.max_positions=512",
    "model.image_token_id=300",
    "precision=bf16",
]
LAYOUTS = [
    ParallelConfig(2, tensor=2),
    ParallelConfig(4, tensor=4, sequence_parallel=True),
    ParallelConfig(2, pipeline=2),
    ParallelConfig(4, pipeline=4),
    ParallelConfig(4, tensor=2, pipeline=2),
    ParallelConfig(8, tensor=4, pipeline=2),
    ParallelConfig(8, tensor=2, pipeline=4),
    ParallelConfig(2, pipeline=2, pipeline_layers=[3, 1]),
]


def write_llava(directory: Path, tokenizer: Path, model: ModelConfig, dtype: torch.dtype) -> Path:
    """A random `LlavaNextForConditionalGeneration` directory."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for entry in table(model)
        for name, shape in zip(entry.hf, entry.shapes, strict=True)
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = llava_config(model, special_ids(tokenizer), "float32")
    write_json(directory / "config.json", config)
    return directory


def save_under(
    parallel: ParallelConfig, model: ModelConfig, params: str, source: str, target: str
) -> None:
    """Worker: read a checkpoint into this rank's part of a layout and save it anew."""
    from models.build import build_model
    from pipeline.checkpoint import TrainingState, load_model, save

    with megatron(parallel):
        from megatron.core import parallel_state

        network = build_model(
            model,
            parallel,
            PrecisionConfig(params=params),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
        load_model([network], Path(source))
        state = TrainingState([network], None, None, {"world_size": 1}, "p", "c", "v")
        save(state, Path(target), keep=1)


def round_trip(root: Path, llava: Path, parallel: ParallelConfig, overrides: list[str]) -> None:
    """Import, save under `parallel`, export, compare."""
    config = compose(overrides)
    done = read_done(root / "import")
    stage = root / "stage1"
    run_ranks(
        parallel.world_size,
        save_under,
        parallel,
        config.model,
        config.precision.params,
        str(root / "import" / done.checkpoint),
        str(stage),
        timeout=240,
    )
    checkpoint = stage / "checkpoints/step_00000000"
    digest = digest_and_fsync(checkpoint / MANIFEST)[1]
    write_done(stage, replace(done, checkpoint_digest=digest, model=asdict(config.model)))
    assert run(hf_export.main, [f"stage={stage}", f"out={root / 'hf'}"]) == 0
    first, second = read_weights(llava), read_weights(root / "hf")
    assert set(first) == set(second)
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("interchange")
    write_tokenizer(root / "tokenizer")
    write_llava(root / "llava", root / "tokenizer", compose(SMALL).model, torch.float32)
    words = [f"llava={root / 'llava'}", f"tokenizer={root / 'tokenizer'}"]
    assert run(hf_import.main, [*SMALL, *words, f"out={root / 'import'}"]) == 0
    return root


@pytest.mark.parametrize(
    "parallel", LAYOUTS, ids=lambda p: f"TP{p.tensor} PP{p.pipeline}{p.pipeline_layers or ''}"
)
def test_every_layout_comes_back_the_same(
    small: Path, tmp_path: Path, parallel: ParallelConfig
) -> None:
    (tmp_path / "import").symlink_to(small / "import")
    round_trip(tmp_path, small / "llava", parallel, SMALL)


@pytest.mark.slow
def test_layers_of_real_widths_come_back_the_same(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    llava = write_llava(
        tmp_path / "llava", tmp_path / "tokenizer", compose(REAL).model, torch.bfloat16
    )
    words = [f"llava={llava}", f"tokenizer={tmp_path / 'tokenizer'}"]
    assert run(hf_import.main, [*REAL, *words, f"out={tmp_path / 'import'}"]) == 0
    round_trip(tmp_path, llava, ParallelConfig(2, tensor=2), REAL)
