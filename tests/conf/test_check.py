"""One test for each rule: a configuration that cannot run is refused, and says what to change."""

import pytest

from conf.check import check
from conf.compose import compose, options
from conf.hardware import Hardware
from conf.schema.errors import ConfigError

H100 = Hardware(cuda=True, capability=(9, 0), transformer_engine=True)
REAL = ["model=amalia_vl_9b", "data=amalia", "precision=bf16", "cluster.gpus_per_node=128"]


def refused(*overrides: str, hardware: Hardware | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        check(compose(list(overrides)), hardware)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_the_presets_can_run(stage: str) -> None:
    for parallel in options("parallel"):
        if not parallel.startswith(("h100", "a100", "h200")):
            check(compose([f"stage={stage}", f"parallel={parallel}"]))
        check(compose([f"stage={stage}", f"parallel={parallel}", *REAL]))
    for model in ("amalia_vl_9b", "amalia_vl_9b_patch14"):
        check(compose([*REAL, f"model={model}", f"stage={stage}", "parallel=h100_64"]))
    check(compose([*REAL, f"stage={stage}", "parallel=h100_64", "precision=fp8"]), H100)


# Override, what the message must say.
CASES = [
    # tensor parallelism
    (
        "parallel=tp2 model.text.heads=3 model.text.kv_heads=1",
        "model.text.heads=3 is not divisible",
    ),
    ("parallel=tp2 model.text.kv_heads=1", "model.text.kv_heads=1 is not divisible"),
    ("parallel=tp2 model.text.intermediate_size=321", "model.text.intermediate_size=321"),
    ("parallel=tp2 model.text.vocab_size=833", "model.text.vocab_size=833"),
    ("parallel=tp2 model.vision.heads=3", "model.vision.heads=3"),
    ("parallel=tp2 model.vision.intermediate_size=255", "model.vision.intermediate_size=255"),
    ("parallel=tp2 model.text.hidden_size=127", "(the connector)=127"),
    # pipeline
    ("parallel=pp2 model.text.layers=1", "fewer than parallel.pipeline=2"),
    ("parallel=pp2 parallel.pipeline_layers=[1,2]", "add up to model.text.layers=4"),
    ("parallel=pp2 parallel.pipeline_layers=[0,4]", "2 positive numbers"),
    ("parallel=pp2 parallel.pipeline_layers=[4]", "names 1 chunks"),
    ("parallel=pp2 parallel.virtual_pipeline=3", "3 = 6 chunks"),
    ("parallel=pp2 parallel.virtual_pipeline=0", "virtual_pipeline=0: it must be positive"),
    ("parallel.virtual_pipeline=2", "needs parallel.pipeline > 1"),
    (
        "parallel=pp2 parallel.virtual_pipeline=2 stage.micro_batch_size=1 "
        "stage.global_batch_size=3",
        "make it a multiple of 2",
    ),
    # ranks and batch
    ("parallel=tp2 parallel.world_size=3", "parallel.world_size=3 is not a multiple"),
    ("parallel=tp2 parallel.world_size=1", "parallel.world_size=1 is not a multiple"),
    ("parallel=dp2 stage.global_batch_size=6", "use a multiple of 8"),
    ("parallel=cp2 stage.document_multiple=2", "2 * parallel.context = 4"),
    ("parallel=tp2_sp stage.document_multiple=1 stage.sequence_length=513", "round it up"),
    ("parallel.sequence_parallel=true", "needs parallel.tensor > 1"),
    ("stage.sequence_length=510", "stage.document_multiple=4"),
    ("parallel.world_size=0", "parallel.world_size=0: it must be positive"),
    ("parallel.recompute=some", "parallel.recompute='some'"),
    # overlap
    ("parallel.overlap_param_gather=true", "needs parallel.distributed_optimizer=true"),
    (
        "parallel=dp2_dist parallel.overlap_grad_reduce=false",
        "needs parallel.overlap_grad_reduce=true",
    ),
    # one image must fit
    ("stage.sequence_length=128", "use at least 160"),
    ("stage=stage3 stage.sequence_length=160", "use at least 320"),
    ("stage.max_tiles_per_pack=4", "less than the 5 tiles"),
    # the network
    ("model.text.heads=5", "model.text.kv_heads=2"),
    ("model.text.head_dim=31", "model.text.head_dim=31 is odd"),
    ("model.vision.hidden_size=97", "model.vision.heads=4"),
    ("model.vision.patch_size=33", "model.vision.patch_size=33"),
    ("model.vision.feature_layer=-6", "model.vision.feature_layer=-6"),
    ("model.vision.heads=0", "model.vision.heads=0: it must be positive"),
    ("model.image_token_id=832", "enlarge the vocabulary"),
    ("model.pinpoints=[[32,33]]", "model.pinpoints entry [32, 33]"),
    ("model.pinpoints=[]", "pinpoints"),
    ("model.max_tiles=0", "model.max_tiles=0"),
    # stage and objective
    ("stage.number=4", "stage.number=4"),
    ("stage.name=stage2", "name it stage1"),
    ("stage.objective=ppo", "stage.objective='ppo'"),
    ("stage.objective=dpo", "data.sources.captions does not have"),
    ("stage=stage3 stage.objective=sft", "data.sources.preferences holds preference pairs"),
    ("~data.mix.stage1", "data.mix has no stage1"),
    ("+data.mix.stage1.nothing=1", "data.sources does not have"),
    ("data.mix.stage1.captions=-1", "weights must be >= 0"),
    ("+data.curriculum.stage1.a.until=0.5", "data.curriculum.stage1: its phases end at [0.5]"),
    ("+data.curriculum.stage1.a={until:1,weights:{nothing:1}}", "data.sources does not have"),
    (
        "+data.curriculum.stage1.a={until:1,weights:{preferences:1}}",
        "take it out of data.curriculum.stage1",
    ),
    ("data.weigh_by=bytes", "data.weigh_by='bytes' is none of samples, tokens"),
    ("data.shuffle_shards=0", "data.shuffle_shards=0"),
    ("stage.max_tiles_over_mean=0.9", "stage.max_tiles_over_mean=0.9"),
    (
        "stage.max_tiles_over_mean=1.1 stage.max_tiles_per_pack=9",
        "not beside stage.max_tiles_per_pack",
    ),
    ("stage.epochs=1", "exactly one"),
    ("stage.steps=null", "exactly one"),
    ("stage.steps=0", "stage.steps=0"),
    ("stage.lr.connector=0", "trains nothing"),
    ("stage.lr.connector=-1", "negative"),
    ("stage.optimizer.beta2=1.0", "stage.optimizer.beta2"),
    ("stage.optimizer.weight_decay=-1", "stage.optimizer.weight_decay"),
    ("stage.optimizer.schedule=triangle", "stage.optimizer.schedule"),
    ("stage.optimizer.warmup_ratio=1", "stage.optimizer.warmup_ratio"),
    ("stage.optimizer.min_lr_ratio=2", "stage.optimizer.min_lr_ratio"),
    ("stage.optimizer.clip_grad=0", "stage.optimizer.clip_grad"),
    ("stage.preference.beta=0", "stage.preference.beta"),
    ("stage.seed=-1", "stage.seed"),
    ("stage.checkpoint.keep=0", "stage.checkpoint.keep"),
    # data, precision, place
    ("data.sources.captions.format=csv", "data.sources.captions.format"),
    ("precision.params=fp16", "precision.params"),
    ("run=../elsewhere", "plain directory name"),
    ("cluster.executor=cloud", "cluster.executor"),
    ("cluster.gpus_per_node=1 parallel=dp2", "cluster.gpus_per_node"),
]


@pytest.mark.parametrize(("overrides", "message"), CASES)
def test_refused(overrides: str, message: str) -> None:
    assert message in refused(*overrides.split())


def test_nan_is_not_positive() -> None:
    assert "stage.optimizer.clip_grad" in refused("stage.optimizer.clip_grad=nan")


def test_all_reasons_come_at_once() -> None:
    message = refused("parallel=tp2", "model.text.vocab_size=833", "stage.global_batch_size=7")
    assert "2 things to change" in message
    assert "model.text.vocab_size=833" in message and "stage.global_batch_size=7" in message


def test_tensor_advice_works() -> None:
    message = refused("parallel.world_size=4", "parallel.tensor=4", "stage.global_batch_size=8")
    assert "use parallel.tensor=2" in message
    check(compose(["parallel.world_size=4", "parallel.tensor=2"]))


def test_fused_attention_needs_a_head_size_on_a_gpu_only() -> None:
    overrides = ["model.text.head_dim=36"]
    check(compose(overrides))
    assert "model.text.head_dim=36" in refused(*overrides, hardware=H100)
    assert "model.text.head_dim=36" in refused(*overrides, "cluster.gpus_per_node=1")
